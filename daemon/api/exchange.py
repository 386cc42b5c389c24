"""One request and its answer: reading within bounds, and working only as long as somebody waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ai_assistant.daemon.api.errors import HttpError, error_response
from ai_assistant.daemon.api.jsonbody import parse_object
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.api.rendering import error_event
from ai_assistant.daemon.contract import Peer, caller
from ai_assistant.errors import AIAssistantError, Busy, InvalidArgument, NotSupported, ServiceUnavailable, Timeout

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]


DRAIN_BYTES = 64 * 1024
DRAIN_S = 2.0


class ClientGone(Exception):
    """Nobody is there to read an answer."""


class Meter(Protocol):
    """Counts what a key has used."""

    def spend(self, tokens: int) -> None: ...


class Held:
    """Bytes of request bodies that are in memory now, over all requests."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.now = 0

    def add(self, count: int) -> None:
        if self.now + count > self._most:
            raise Busy("too much is being sent at once", hint="try again in a moment")
        self.now += count


class Exchange:
    """What an endpoint is given."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, held: Held) -> None:
        self.scope = scope
        self.started = False
        """The status has been sent: an error can only be told inside the answer."""
        self.streaming = False
        self.status = 0
        self._receive = receive
        self._send = send
        self._limits = limits
        self._held = held
        self._mine = 0
        self._began = False
        """Some of the body was asked for."""
        # Each request has a task of its own, and so has what is set here.
        state = scope.get("state", {})
        self.key: Meter | None = state.get("key")
        """What came with the request over the network; None on the unix socket."""
        peer = state.get("peer")
        caller.set(peer.uid if isinstance(peer, Peer) else -1)

    @property
    def path_params(self) -> MutableMapping[str, Any]:
        found: MutableMapping[str, Any] = self.scope.get("path_params", {})
        return found

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            InvalidArgument: it is none; see `parse_object`.
            HttpError: 413 too long, 415 compressed, 408 not all came in time.
            Busy: others are sending too much already.
            ClientGone
        """
        self._check_headers()
        try:
            async with asyncio.timeout(self._limits.body_s):
                data = await self._read()
        except TimeoutError:
            late = Timeout(f"the body did not come within {self._limits.body_s:g} s")
            raise HttpError(408, late, close=True) from None
        try:
            return parse_object(data)
        finally:
            # The bytes go here; an answer may take minutes more.
            self.close()

    async def respond(self, response: Response) -> None:
        self.status = response.status_code
        if not self._began:
            await self._drain()
        await response(self.scope, self._receive, self.send)

    async def send(self, message: Message) -> None:
        self.started = True
        await self._send(message)

    async def stream(self, pieces: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None) -> None:
        """Send each piece as it comes; cancelled when the client goes away."""
        self.status = 200
        more = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.streaming = True
        await self.send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS + more})
        # Closed at once and not when it is collected: that is what frees the model for others.
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self.finish()

    async def finish(self, piece: bytes = b"") -> None:
        """End a stream."""
        self.streaming = False
        await self._send({"type": "http.response.body", "body": piece, "more_body": False})

    async def fail(
        self,
        error: AIAssistantError,
        status: int = 0,
        *,
        close: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Tell an error in the way that is still possible."""
        if self.streaming:
            await self.finish(error_event(error))
        elif not self.started:
            await self.respond(error_response(error, status, close=close, headers=headers))

    async def stopping(self) -> None:
        """The server cancels what has not ended in time; the client is told why, and the task ends here."""
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        await self.fail(ServiceUnavailable("the daemon is stopping", hint="try again in a moment"))

    @asynccontextmanager
    async def while_waiting(self) -> AsyncIterator[None]:
        """Run the body only as long as the client is there; to be entered after the request has been read.

        One task watches for the whole exchange, so that a token costs none.

        Raises:
            ClientGone: out of the block, wherever it was.
        """
        work = asyncio.current_task()
        assert work is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            work.cancel()

        watcher = asyncio.create_task(watch(), name="api: is the client there?")
        try:
            yield
        except asyncio.CancelledError:
            if gone and not work.uncancel():
                raise ClientGone from None
            raise
        finally:
            watcher.cancel()

    def spend(self, tokens: int) -> None:
        """Count tokens for the key that asked."""
        if self.key is not None:
            self.key.spend(tokens)

    def close(self) -> None:
        """Give back what `json` has counted."""
        self._held.now -= self._mine
        self._mine = 0

    def _check_headers(self) -> None:
        for name, value in self.scope["headers"]:
            if name == b"content-length" and int(value) > self._limits.body_bytes:
                raise self._too_long()
            if name == b"content-encoding" and value.lower() != b"identity":
                unread = NotSupported("the body must not be compressed", hint="send it without Content-Encoding")
                raise HttpError(415, unread, close=True)

    async def _read(self) -> bytes:
        self._began = True
        data = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            if len(data) + len(piece) > self._limits.body_bytes:
                raise self._too_long()
            self._held.add(len(piece))
            self._mine += len(piece)
            data += piece
            if not message.get("more_body"):
                return bytes(data)

    async def _drain(self) -> None:
        """Throw away a small body that the answer does not need.

        Closing with unread bytes is a reset, and a client that still writes never sees why it was refused.
        """
        headers = dict(self.scope["headers"])
        length = headers.get(b"content-length", b"0")
        waits = b"expect" in headers  # it sends nothing before it is told to
        if waits or int(length) > DRAIN_BYTES or (length == b"0" and b"transfer-encoding" not in headers):
            return
        self._began = True
        left = DRAIN_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._limits.body_s, DRAIN_S)):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return

    def _too_long(self) -> HttpError:
        error = InvalidArgument(f"the body is longer than {self._limits.body_bytes} bytes")
        return HttpError(413, error, close=True)
