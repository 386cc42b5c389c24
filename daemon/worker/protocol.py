"""The daemon's side of a worker: one connection, one model, any number of concurrent requests.

The worker runs hostile model files in native code, so it is not trusted: what it sends is parsed
strictly, what it may make the daemon hold is bounded, and its end, however it comes about, turns every
pending request into `WorkerCrashed`. Nothing here imports numpy, jinja2 or llama_cpp.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ai_assistant.daemon.jsonshape import excess
from ai_assistant.daemon.worker import messages
from ai_assistant.daemon.worker.frames import MAX_EVENT, MAX_FILES, MAX_FRAME, FrameReader, ProtocolError, encode
from ai_assistant.daemon.worker.pending import MAX_ANSWER, Pending
from ai_assistant.engines.contract import (
    EngineStats,
    Event,
    Finished,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
    Placement,
)
from ai_assistant.engines.hetero import Wish
from ai_assistant.errors import AIAssistantError, Busy, InternalError, InvalidArgument, WorkerCrashed

MAX_UNSENT = 64 << 20
"""Bytes that wait for a worker that does not read."""
MAX_LATE = 32 << 20
"""Bytes of answers to requests that were given up, until each of these has ended."""
MAX_LEAVING = 4096
"""Requests that were given up and that the worker has not ended."""
_LARGE = ("embed", "rerank", "classify", "tokenize", "detokenize")
_MAX_DEPTH = 16
_MAX_VALUES = 100_000
_MAX_NUMBERS = 4_000_000
_MAX_VECTORS = 1 << 12
_MAX_QUOTES = 64
_LAST = ("finished", "result", "error", "loaded")
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
        placement: where the model's layers are, known before anything is loaded to a device beside the processor.
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
        self.placement = Placement()
        self._transport: asyncio.Transport | None = None
        self._pending: dict[int, Pending] = {}
        self._leaving: dict[int, tuple[str, int]] = {}
        """Requests that nobody waits for any more: the operation, and the bytes that came since."""
        self._late = 0
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
        self,
        fd: int,
        options: LoadOptions,
        on_progress: Callable[[float], None] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> ModelInfo:
        """Hand over the model, as the first thing on the connection. The descriptors stay the caller's.

        They should be such that nobody else reads through, because copies of a descriptor share a position.

        Args:
            files: descriptors that go with the model, by what they are: "draft", "spill", or a file's name.

        Raises:
            InvalidModel, OutOfMemory, NotSupported: the worker refuses it.
            WorkerCrashed: it did not survive it.
        """
        if self._transport is not None or self._closing:
            raise InternalError("a worker loads one model only")
        others = dict(files or {})
        if "model" in others or len(others) >= MAX_FILES:
            raise InternalError("these files cannot go with a model")
        names = ["model", *others]
        settings = {**asdict(options), "extra": dict(options.extra)}
        frame = encode({"op": "load", "id": 0, "options": settings, "files": names})
        pending = self._pending[0] = Pending("load")
        pending.progress = on_progress
        try:
            # The descriptors travel with the first byte; a fresh socket has room for at least that.
            sent = socket.send_fds(self._sock, [frame], [fd, *others.values()])
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
            if self._pending.pop(0, None) is not None and not pending.ended:
                self._leaving[0] = ("load", 0)
        return info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        """Events of one generation; closing the generator cancels it.

        Raises:
            ContextOverflow, InvalidArgument, Busy, NotSupported, InvalidModel: from the engine.
            WorkerCrashed: the worker died.
        """
        # With log-probabilities, a token of the answer is a hundred times as long.
        room = MAX_ANSWER if request.logprobs is None else 4 * MAX_ANSWER
        number, pending = self._request("generate", {"request": request.to_dict()}, room)
        try:
            while True:
                event: Event = await pending.next()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._forget(number, pending)

    async def embed(self, texts: Sequence[str], wish: Wish | None = None) -> tuple[list[list[float]], int]:
        """Vectors in the order of `texts`, and the number of tokens read.

        Args:
            wish: for devices; is told which ones it were, as with the others that take one.
        """
        vectors, tokens = await self._read("embed", {"texts": list(texts)}, wish)
        if len(vectors) != len(texts):
            raise self._lied("embedded something else than the texts")
        return vectors, tokens

    async def tokenize(self, text: str) -> list[int]:
        found: list[int] = await self._call("tokenize", {"text": text})
        return found

    async def detokenize(self, tokens: Sequence[int]) -> str:
        found: str = await self._call("detokenize", {"tokens": list(tokens)})
        return found

    async def rerank(self, query: str, documents: Sequence[str], wish: Wish | None = None) -> tuple[list[float], int]:
        """A score for each document, and the number of tokens read."""
        scores, tokens = await self._read("rerank", {"query": query, "documents": list(documents)}, wish)
        if len(scores) != len(documents):
            raise self._lied("scored something else than the documents")
        return scores, tokens

    async def classify(
        self, texts: Sequence[str], wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        """The labels of each text with their probabilities, and the number of tokens read."""
        labels, tokens = await self._read("classify", {"texts": list(texts)}, wish)
        if len(labels) != len(texts):
            raise self._lied("classified something else than the texts")
        return labels, tokens

    async def _read(self, op: str, values: dict[str, Any], wish: Wish | None) -> tuple[Any, int]:
        if wish is not None:
            values["hetero_compute"] = wish.text
        found, tokens, devices = await self._call(op, values)
        if wish is not None:
            wish.devices = devices
        return found, tokens

    async def stats(self) -> EngineStats:
        """What the engine does right now."""
        found: EngineStats = await self._call("stats", {})
        return found

    async def trim(self) -> int:
        """Let the engine drop what it can have again without loading; the bytes that it freed."""
        freed: int = await self._call("trim", {})
        return freed

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

    def _request(self, op: str, values: Mapping[str, Any], room: int = MAX_ANSWER) -> tuple[int, Pending]:
        number = self._next
        try:
            frame = encode({"op": op, "id": number, **values})
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArgument(f"the request cannot be passed on: {error}") from error
        self._write(frame)
        self._next += 1
        pending = self._pending[number] = Pending(op, room)
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

    def _lied(self, how: str) -> WorkerCrashed:
        self._give_up(how)
        return WorkerCrashed(f"the worker that held the model {how}", hint=_RESTARTED)

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

    def _forget(self, number: int, pending: Pending) -> None:
        """Nobody waits any more: what has not ended is cancelled, and its last event is waited for."""
        if self._pending.pop(number, None) is None or pending.ended:
            return
        if self._transport is not None and not self._transport.is_closing():
            self._leaving[number] = (pending.op, 0)
            self._transport.write(encode({"op": "cancel", "id": number}))

    # Called by the wire.

    def _expects_large(self) -> bool:
        return any(each.op in _LARGE for each in self._pending.values()) or any(
            op in _LARGE for op, _ in self._leaving.values()
        )

    def _longest(self) -> int:
        return MAX_FRAME if self._expects_large() else MAX_EVENT

    def _check(self, body: bytes) -> None:
        """Whether what is built from these bytes is bounded; a result is numbers, and may have many."""
        if (
            self._expects_large()
            and body.count(b"[") + body.count(b"{") <= _MAX_VECTORS
            and body.count(b",") <= _MAX_NUMBERS
            and body.count(b'"') <= _MAX_QUOTES
        ):
            return
        if wrong := excess(body, depth=_MAX_DEPTH, values=_MAX_VALUES):
            raise ProtocolError(f"a frame that {wrong}")

    def _received(self, message: dict[str, Any], size: int) -> None:
        number = message.get("id")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self._next:
            raise ProtocolError("an answer to a request that was never made")
        if number in self._leaving:
            self._came_late(number, message.get("event"), size)
            return
        pending = self._pending.get(number)
        if pending is None or pending.ended:
            raise ProtocolError("an answer to a request that has ended")
        pending.room -= size
        if pending.room < 0:
            self._forget(number, pending)
            pending.end(InternalError("the answer is absurdly long", hint="lower max_tokens"))
            return
        self._take(number, pending, message)

    def _came_late(self, number: int, kind: Any, size: int) -> None:
        op, before = self._leaving[number]
        if kind in _LAST:
            del self._leaving[number]
            self._late -= before
            return
        self._leaving[number] = (op, before + size)
        self._late += size
        if self._late > MAX_LATE or len(self._leaving) > MAX_LEAVING:
            raise ProtocolError("cancelled requests that do not end")

    def _take(self, number: int, pending: Pending, message: dict[str, Any]) -> None:
        kind = message.get("event")
        if kind == "error":
            pending.end(messages.error(message))
        elif kind == "progress" and pending.op == "load":
            if pending.progress is not None:
                pending.progress(messages.progress(message))
        elif kind == "placing" and pending.op == "load":
            self.placement = messages.placement(message.get("placement"))
        elif kind == "loaded" and pending.op == "load":
            self.placement = messages.placement(message.get("placement"))
            pending.put(messages.model_info(message.get("info")))
            pending.ended = True
        elif kind == "result" and pending.op in messages.RESULTS:
            pending.put(messages.RESULTS[pending.op](message.get("value")))
            pending.ended = True
        elif kind in ("chunk", "finished", "queued") and pending.op == "generate":
            event = messages.event(message)
            pending.ended = isinstance(event, Finished)
            if not pending.put(event):
                # Either a reader that sleeps, or a worker that floods: both end here, without the daemon.
                self._forget(number, pending)
                pending.end(Busy("the answer is not being read"))
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


class _Wire(asyncio.Protocol):
    def __init__(self, client: WorkerClient) -> None:
        self._client = client
        self._reader = FrameReader(client._longest, client._check)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._client._received(message, self._reader.size)
        except (ProtocolError, ValueError) as error:
            self._client._end(f"the worker does not speak the protocol: {error}")
            if self._transport is not None:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._client._end("closed" if self._client._closing else f"the worker is gone{f': {exc}' if exc else ''}")
