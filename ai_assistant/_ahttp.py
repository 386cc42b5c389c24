"""HTTP over the API's unix socket on asyncio streams, for the asynchronous client.

Only what this one service needs: one request per connection, and bodies with a length, in chunks, or
up to the end of the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ai_assistant import _wire
from ai_assistant._http import refused
from ai_assistant._sse import SSEParser
from ai_assistant._transport import connect_failed, went_away
from ai_assistant.engines.contract import Event
from ai_assistant.errors import InternalError

_PIECE = 64 * 1024
_MAX_HEADERS = 100
_BROKEN = (OSError, EOFError, asyncio.LimitOverrunError, ValueError)


class Exchange:
    """One request and its answer on a connection of its own; closing it early cancels the request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float | None) -> None:
        self._reader = reader
        self._writer = writer
        self._timeout = timeout_s
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def start(cls, path: str, method: str, target: str, body: bytes | None, timeout_s: float | None) -> Exchange:
        """
        Raises:
            AIAssistantError: the service cannot be reached, or its answer is an error.
        """
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(path)
        except (OSError, ValueError) as error:
            raise connect_failed(error, path) from error
        self = cls(reader, writer, timeout_s)
        try:
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
        try:
            self._writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + (body or b""))
            async with asyncio.timeout(self._timeout):
                await self._writer.drain()
        except TimeoutError as error:
            raise went_away(error) from error
        except OSError:
            pass  # a refusal may already lie in the receive buffer; if not, reading fails and says so

    async def _line(self) -> bytes:
        async with asyncio.timeout(self._timeout):
            return (await self._reader.readuntil(b"\n")).rstrip(b"\r\n")

    async def _read_head(self) -> None:
        try:
            while self.status < 200:  # 1xx answers come before the real one
                version, code, *_ = (await self._line()).split(b" ", 2)
                if not version.startswith(b"HTTP/1."):
                    raise InternalError("this is not the API socket: it does not speak HTTP")
                self.status, self.headers = int(code), {}
                while line := await self._line():
                    name, _, value = line.decode("latin-1").partition(":")
                    self.headers[name.strip().lower()] = value.strip()
                    if len(self.headers) > _MAX_HEADERS:
                        raise InternalError("the service sent too many headers")
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
                        piece = await self._some(min(size, _PIECE))
                        size -= len(piece)
                        yield piece
                    await self._line()
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left:
                    piece = await self._some(min(left, _PIECE))
                    left -= len(piece)
                    yield piece
            else:
                while piece := await self._some(_PIECE, ended=True):
                    yield piece
        except _BROKEN as error:
            raise went_away(error) from error

    async def _some(self, most: int, *, ended: bool = False) -> bytes:
        async with asyncio.timeout(self._timeout):
            piece = await self._reader.read(most)
        if not piece and not ended:
            raise EOFError
        return piece

    def close(self) -> None:
        # abort() and not close(): what was not sent yet is of no use, and the daemon must notice at once.
        self._writer.transport.abort()


async def call(path: str, method: str, target: str, body: Any = None, *, timeout_s: float | None) -> bytes:
    exchange = await Exchange.start(path, method, target, None if body is None else _wire.dump(body), timeout_s)
    try:
        return await exchange.read()
    finally:
        exchange.close()


async def events(exchange: Exchange) -> AsyncGenerator[Event]:
    """The answer's events; ends after `Finished`."""
    parser, decoder = SSEParser(), _wire.EventDecoder()
    try:
        async for piece in exchange.pieces():
            for data in parser.feed(piece):
                for event in decoder.feed(data):
                    yield event
                if decoder.done:
                    return
        raise went_away()
    finally:
        exchange.close()
