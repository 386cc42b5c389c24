"""The daemon's side of a worker: one connection, one model, any number of concurrent requests.

The worker runs hostile model files in native code, so it is not trusted: what it sends is parsed
strictly, what it may make the daemon hold is bounded, and its end, however it comes about, turns every
pending request into `WorkerCrashed`. Nothing here imports numpy, jinja2 or llama_cpp.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ai_assistant.daemon.worker import messages
from ai_assistant.daemon.worker.frames import FrameReader, ProtocolError, encode
from ai_assistant.engines.contract import Chunk, Event, Finished, GenerateRequest, LoadOptions, ModelInfo
from ai_assistant.errors import AIAssistantError, Busy, InternalError, InvalidArgument, WorkerCrashed

MAX_UNSENT = 64 << 20
"""Bytes that wait for a worker that does not read."""
_MERGE_ABOVE = 32
"""Unread chunks of plain text beyond these are joined, so that a slow reader costs bytes, not objects."""
_MAX_UNREAD = 16 << 20
"""Bytes of events (see `_weight`) that one request may leave unread."""
PING_EVERY_S = 15.0
PING_TIMEOUT_S = 15.0
STALLED_ROUNDS = 20
"""Pings without a finished step of the engine in between. Five minutes, because one step of a large model on a
small machine may read a whole batch of prompt tokens."""
_RESTARTED = "it is being restarted; try again"


class WorkerClient:
    """A connected worker. All methods belong to the loop that connected it.

    While anything but a load is pending, the worker is asked every `ping_every_s` how many steps it has made
    (who loads has a limit of its own). No answer within `ping_timeout_s`, or `stalled_rounds` answers in a row
    without a new step, end the connection as a crash does. Nothing is asked while nothing is pending.

    Attributes:
        died: done when the connection has ended, by `close` or otherwise; its result says why.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        ping_every_s: float = PING_EVERY_S,
        ping_timeout_s: float = PING_TIMEOUT_S,
        stalled_rounds: int = STALLED_ROUNDS,
    ) -> None:
        """Take over a connected, stream-oriented unix socket."""
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.died: asyncio.Future[str] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self._closing = False
        self._ping_every_s = ping_every_s
        self._ping_timeout_s = ping_timeout_s
        self._stalled_rounds = stalled_rounds
        self._guard: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: str) -> WorkerClient:
        """Connect to the worker socket; systemd starts a process for it.

        Raises:
            WorkerCrashed: there is none.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, path)
        except OSError as error:
            sock.close()
            raise WorkerCrashed(f"no worker can be started: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def load(
        self, fd: int, options: LoadOptions, on_progress: Callable[[float], None] | None = None
    ) -> ModelInfo:
        """Hand over the model, as the first thing on the connection. The descriptor stays the caller's.

        It should be one that nobody else reads through, because copies of a descriptor share a position.

        Raises:
            InvalidModel, OutOfMemory, NotSupported: the worker refuses it.
            WorkerCrashed: it did not survive it.
        """
        if self._transport is not None or self._closing:
            raise InternalError("a worker loads one model only")
        frame = encode({"op": "load", "id": 0, "options": {**asdict(options), "extra": dict(options.extra)}})
        pending = self._pending[0] = _Pending("load")
        pending.progress = on_progress
        try:
            # The descriptor travels with the first byte; a fresh socket has room for at least that.
            sent = socket.send_fds(self._sock, [frame], [fd])
            await self._loop.sock_sendall(self._sock, frame[sent:])
            transport, _ = await self._loop.create_unix_connection(lambda: _Wire(self), sock=self._sock)
        except OSError as error:
            self._end(f"the worker is gone: {error.strerror}")
            self._sock.close()
            raise WorkerCrashed("the worker died before it could load the model") from error
        self._transport = transport
        try:
            info: ModelInfo = await pending.next()
        finally:
            self._pending.pop(0, None)
        return info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        """Events of one generation; closing the generator cancels it.

        Raises:
            ContextOverflow, InvalidArgument, Busy, NotSupported, InvalidModel: from the engine.
            WorkerCrashed: the worker died.
        """
        number, pending = self._request("generate", {"request": request.to_dict()})
        try:
            while True:
                event: Event = await pending.next()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._forget(number, pending)

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """Vectors in the order of `texts`, and the number of tokens read."""
        found: tuple[list[list[float]], int] = await self._call("embed", {"texts": list(texts)})
        return found

    async def tokenize(self, text: str) -> list[int]:
        found: list[int] = await self._call("tokenize", {"text": text})
        return found

    async def ping(self) -> int:
        """Ask the worker's reader, which answers while it generates, too: the steps it has made so far."""
        steps: int = await self._call("ping", {})
        return steps

    async def close(self) -> None:
        """End the connection, which ends the worker; idempotent."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()
        elif not self.died.done():
            self._sock.close()
            self._end("closed")
        await asyncio.wait([self.died])

    async def _call(self, op: str, values: Mapping[str, Any]) -> Any:
        number, pending = self._request(op, values)
        try:
            return await pending.next()
        finally:
            self._forget(number, pending)

    def _request(self, op: str, values: Mapping[str, Any]) -> tuple[int, _Pending]:
        number = self._next
        self._next += 1
        try:
            frame = encode({"op": op, "id": number, **values})
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArgument(f"the request cannot be passed on: {error}") from error
        self._write(frame)
        pending = self._pending[number] = _Pending(op)
        if self._guard is None or self._guard.done():
            self._guard = self._loop.create_task(self._watch(), name="worker-guard")
        return number, pending

    async def _watch(self) -> None:
        """End the connection if the worker stops answering or working before everything is answered."""
        stalled, before = 0, -1
        while True:
            await asyncio.sleep(self._ping_every_s)
            if all(each.ended for each in self._pending.values()):
                return
            try:
                async with asyncio.timeout(self._ping_timeout_s):
                    steps = await self.ping()
            except TimeoutError:
                self._give_up("does not answer")
                return
            except WorkerCrashed:
                return
            except AIAssistantError:
                # Refused, or no place behind what was sent before: neither shows any progress.
                steps = before
            stalled, before = (stalled + 1, before) if steps == before else (0, steps)
            if stalled >= self._stalled_rounds:
                self._give_up("makes no progress")
                return

    def _give_up(self, how: str) -> None:
        self._end(f"the worker {how}", WorkerCrashed(f"the worker that held the model {how}", hint=_RESTARTED))
        if self._transport is not None:
            self._transport.abort()

    def _write(self, frame: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing() or self.died.done():
            raise WorkerCrashed("the worker that held the model is gone")
        if transport.get_write_buffer_size() + len(frame) > MAX_UNSENT:
            raise Busy("the worker does not read its requests", hint="try again later")
        transport.write(frame)

    def _forget(self, number: int, pending: _Pending) -> None:
        self._pending.pop(number, None)
        if not pending.ended and self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode({"op": "cancel", "id": number}))

    # Called by the wire.

    def _received(self, message: dict[str, Any]) -> None:
        number = message.get("id")
        # Unknown numbers are ordinary: events that were under way when a request was cancelled.
        pending = self._pending.get(number) if isinstance(number, int) and not isinstance(number, bool) else None
        if pending is None or pending.ended:
            return
        kind = message.get("event")
        if kind == "error":
            pending.end(messages.error(message))
        elif kind == "progress" and pending.op == "load":
            if pending.progress is not None:
                pending.progress(messages.progress(message))
        elif kind == "loaded" and pending.op == "load":
            pending.put(messages.model_info(message.get("info")))
            pending.ended = True
        elif kind == "result" and pending.op in messages.RESULTS:
            pending.put(messages.RESULTS[pending.op](message.get("value")))
            pending.ended = True
        elif kind in ("chunk", "finished") and pending.op == "generate":
            event = messages.event(message)
            pending.ended = isinstance(event, Finished)
            pending.put(event)
        else:
            raise ProtocolError(f"an unexpected event {str(kind)[:40]!r}")

    def _end(self, reason: str, error: WorkerCrashed | None = None) -> None:
        if not self.died.done():
            self.died.set_result(reason)
        if self._guard is not None and self._guard is not asyncio.current_task(self._loop):
            self._guard.cancel()
        pending, self._pending = self._pending, {}
        for each in pending.values():
            if not each.ended:
                each.end(error or WorkerCrashed("the worker that held the model died", hint=_RESTARTED))


class _Pending:
    """What has arrived for one request and was not read yet."""

    __slots__ = ("_failure", "_items", "_waiter", "ended", "op", "progress", "unread")

    def __init__(self, op: str) -> None:
        self.op = op
        self.ended = False
        self.progress: Callable[[float], None] | None = None
        self.unread = 0
        self._items: deque[tuple[Any, int]] = deque()
        self._failure: AIAssistantError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        size = _weight(item)
        self.unread += size
        if self.unread > _MAX_UNREAD:
            # Either a reader that sleeps, or a worker that floods: both end here, without the daemon.
            self._items.clear()
            self.end(Busy("the answer is not being read"))
            return
        if len(self._items) >= _MERGE_ABOVE and isinstance(item, Chunk) and not item.logprobs:
            last, before = self._items[-1]
            if isinstance(last, Chunk) and not last.logprobs and len(last.text) < 4096:
                self._items[-1] = (Chunk(last.text + item.text), before + size)
                return
        self._items.append((item, size))
        self._notify()

    def end(self, error: AIAssistantError) -> None:
        self.ended = True
        self._failure = error
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        """The next item; after the last one, the error that ended the request."""
        while not self._items:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item, size = self._items.popleft()
        self.unread -= size
        return item


def _weight(item: Any) -> int:
    """About the bytes that an item takes while it waits."""
    if not isinstance(item, Chunk):
        return 0  # The last one of its request.
    return len(item.text) + sum(256 * (1 + len(each.top)) + len(each.bytes) for each in item.logprobs) + 1


class _Wire(asyncio.Protocol):
    def __init__(self, client: WorkerClient) -> None:
        self._client = client
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._client._received(message)
        except (ProtocolError, ValueError) as error:
            self._client._end(f"the worker does not speak the protocol: {error}")
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._client._end("closed" if self._client._closing else f"the worker is gone{f': {exc}' if exc else ''}")
