"""HTTP over the API's unix socket with the standard library, for the synchronous client."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from typing import Any

from ai_assistant import _wire
from ai_assistant._sse import SSEParser
from ai_assistant._transport import connect_failed, no_http, went_away
from ai_assistant.engines.contract import Event
from ai_assistant.errors import AIAssistantError, Busy

DRAIN_S = 1.0
_PIECE = 64 * 1024
_BROKEN = (OSError, http.client.HTTPException)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Exchange:
    """One request and its answer on a connection of its own; closing it early cancels the request."""

    def __init__(self, path: str, method: str, target: str, body: bytes | None, timeout: float | None) -> None:
        """
        Raises:
            AIAssistantError: the service cannot be reached, or its answer is an error.
        """
        self._connection = _UnixConnection(path, timeout)
        self._response: http.client.HTTPResponse | None = None
        self._socket: socket.socket | None = None
        try:
            try:
                self._connection.connect()
            except (OSError, ValueError) as error:
                raise connect_failed(error, path) from error
            # http.client lets go of the socket when the answer is the last on its connection.
            self._socket = self._connection.sock
            headers = {"Connection": "close"} | ({"Content-Type": "application/json"} if body is not None else {})
            self._response = self._exchange(method, target, body, headers)
            if self._response.status >= 400:
                raise refused(self._response.status, self._response.headers.get("Retry-After"), self.read())
        except BaseException:
            self.close()
            raise

    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        # A service that refuses a large body answers and closes before it has read it all, so a failed
        # send is only final when there is no answer to read either.
        sending: Exception | None = None
        try:
            self._connection.request(method, target, body, headers)
        except (BrokenPipeError, ConnectionResetError) as error:
            sending = error
        except _BROKEN as error:
            raise went_away(error) from error
        try:
            return self._connection.getresponse()
        except _BROKEN as error:
            if type(error) is http.client.BadStatusLine:  # its subclass means that the connection ended
                raise no_http() from error
            raise went_away(sending or error) from error

    def read(self) -> bytes:
        assert self._response is not None
        try:
            return self._response.read()
        except _BROKEN as error:
            raise went_away(error) from error

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives."""
        assert self._response is not None
        while True:
            try:
                piece = self._response.read1(_PIECE)
            except (*_BROKEN, ValueError, AttributeError) as error:  # the last two: closed by another thread
                raise went_away(error) from error
            if not piece:
                return
            yield piece

    def drain(self) -> None:
        """Take the end of a body that has told all, so that the service does not see a client that left early."""
        assert self._socket is not None
        with contextlib.suppress(AIAssistantError, OSError):
            self._socket.settimeout(DRAIN_S)
            for _ in self.pieces():
                pass

    def close(self) -> None:
        if self._socket is not None:
            # Wakes a thread that is reading; close() alone would leave it waiting.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._response is not None:
            self._response.close()
        self._connection.close()


def refused(status: int, retry_after: str | None, body: bytes) -> AIAssistantError:
    """The error in an answer with a status of 400 and above."""
    try:
        parsed: Any = _wire.load(body)
    except AIAssistantError:
        parsed = None
    error = _wire.error_from(parsed, status)
    if isinstance(error, Busy) and retry_after and not error.hint:
        error.hint = f"try again in {retry_after} s"
    return error


def call(path: str, method: str, target: str, body: Any = None, *, timeout: float | None) -> bytes:
    exchange = Exchange(path, method, target, None if body is None else _wire.dump(body), timeout)
    try:
        return exchange.read()
    finally:
        exchange.close()


def events(exchange: Exchange, decoder: _wire.EventDecoder | _wire.ChoicesDecoder | None = None) -> Iterator[Event]:
    """The answer's events; ends after `Finished`."""
    parser, decoder = SSEParser(), decoder or _wire.EventDecoder()
    try:
        for piece in exchange.pieces():
            for data in parser.feed(piece):
                yield from decoder.feed(data)
                if decoder.done:
                    exchange.drain()
                    return
        raise went_away()
    finally:
        exchange.close()
