"""HTTP over the API's unix socket on asyncio, for the asynchronous client.

Only what this one service needs: one request per connection, and bodies with a length, in chunks, or
up to the end of the connection. On a bare socket, since asyncio's streams throw away an answer that was
received when sending fails – which is how a service refuses a body that is too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from typing import Any

from ai_assistant import _wire
from ai_assistant._http import DRAIN_S, refused
from ai_assistant._sse import SSEParser
from ai_assistant._transport import connect_failed, no_http, went_away
from ai_assistant.engines.contract import Event
from ai_assistant.errors import AIAssistantError

_PIECE = 64 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_BROKEN = (OSError, EOFError, ValueError)


class Exchange:
    """One request and its answer on a connection of its own; closing it early cancels the request."""

    def __init__(self, timeout_s: float | None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._timeout = timeout_s
        self._buffer = bytearray()
        self._receiving = False
        self._closed = False
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def start(cls, path: str, method: str, target: str, body: bytes | None, timeout_s: float | None) -> Exchange:
        """
        Raises:
            AIAssistantError: the service cannot be reached, or its answer is an error.
        """
        self = cls(timeout_s)
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.get_running_loop().sock_connect(self._socket, path)
            except (OSError, ValueError) as error:
                raise connect_failed(error, path) from error
            await self._send(method, target, body)
            await self._read_head()
            if self.status >= 400:
                raise refused(self.status, self.headers.get("retry-after"), await self.read())
        except BaseException:
            self.close()
            raise
        return self

    async def _send(self, method: str, target: str, body: bytes | None) -> None:
        head = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close"]
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                await loop.sock_sendall(self._socket, "\r\n".join([*head, "", ""]).encode("latin-1"))
                await loop.sock_sendall(self._socket, body or b"")
        except TimeoutError as error:
            raise went_away(error) from error
        except OSError:
            pass  # the refusal may lie in the receive buffer already; if not, reading fails and says so

    async def _receive(self) -> bytes:
        """What has come, or b"" at the end of the connection."""
        if self._is_closed():
            raise EOFError
        self._receiving = True
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.get_running_loop().sock_recv(self._socket, _PIECE)
        finally:
            self._receiving = False
            if self._is_closed():  # meanwhile, by another task
                self._socket.close()

    def _is_closed(self) -> bool:
        return self._closed

    async def _line(self) -> bytes:
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            if start > _MAX_HEAD_BYTES:
                raise ValueError("a line without end")
            piece = await self._receive()
            if not piece:
                raise EOFError
            self._buffer += piece
        line = bytes(self._buffer[:end]).rstrip(b"\r")
        del self._buffer[: end + 1]
        return line

    async def _read_head(self) -> None:
        try:
            while self.status < 200:  # 1xx answers come before the real one
                version, _, rest = (await self._line()).partition(b" ")
                if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
                    raise no_http()
                self.status, self.headers, size = int(rest[:3]), {}, 0
                while line := await self._line():
                    size += len(line)
                    if size > _MAX_HEAD_BYTES:
                        raise ValueError("headers without end")
                    name, _, value = line.decode("latin-1").partition(":")
                    self.headers[name.strip().lower()] = value.strip()
        except _BROKEN as error:
            raise went_away(error) from error

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it arrives."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while size := int((await self._line()).partition(b";")[0], 16):
                    while size:
                        piece = await self._some(size)
                        size -= len(piece)
                        yield piece
                    await self._line()
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left:
                    piece = await self._some(left)
                    left -= len(piece)
                    yield piece
            else:
                while piece := await self._some(_PIECE, ended=True):
                    yield piece
        except _BROKEN as error:
            raise went_away(error) from error

    async def _some(self, most: int, *, ended: bool = False) -> bytes:
        if not self._buffer:
            self._buffer += await self._receive()
        piece = bytes(self._buffer[:most])
        del self._buffer[:most]
        if not piece and not ended:
            raise EOFError
        return piece

    def patience(self, seconds: float) -> None:
        self._timeout = seconds

    def close(self) -> None:
        """Idempotent. A receive that another task waits in ends, and then closes the socket itself."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._receiving:
            self._socket.close()


async def call(path: str, method: str, target: str, body: Any = None, *, timeout_s: float | None) -> bytes:
    exchange = await Exchange.start(path, method, target, None if body is None else _wire.dump(body), timeout_s)
    try:
        return await exchange.read()
    finally:
        exchange.close()


async def events(
    exchange: Exchange, decoder: _wire.EventDecoder | _wire.ChoicesDecoder | None = None
) -> AsyncGenerator[Event]:
    """The answer's events; ends after `Finished`."""
    parser, decoder = SSEParser(), decoder or _wire.EventDecoder()
    try:
        pieces = exchange.pieces()
        async for piece in pieces:
            for data in parser.feed(piece):
                for event in decoder.feed(data):
                    yield event
                if decoder.done:
                    # Or the service would see a client that left early.
                    exchange.patience(DRAIN_S)
                    with contextlib.suppress(AIAssistantError):
                        async for _ in pieces:
                            pass
                    return
        raise went_away()
    finally:
        exchange.close()
