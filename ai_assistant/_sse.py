"""Server-sent events, the part of them that a client needs: bytes in, the data of whole events out."""

from __future__ import annotations

import re

from ai_assistant.errors import InternalError

MAX_EVENT_BYTES = 16 * 1024 * 1024
_LINE_END = re.compile(rb"\r\n|\n|\r")


class SSEParser:
    """Takes the stream in pieces of any size: a piece may end inside a line, a character or a CRLF."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._after_cr = False
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[str]:
        """The data of each event that this piece completes, in order.

        Raises:
            InternalError: an event is larger than `MAX_EVENT_BYTES`.
        """
        if self._after_cr and piece[:1] == b"\n":
            piece = piece[1:]
            self._after_cr = False
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        self._buffer += piece
        events: list[str] = []
        start = 0
        for end in _LINE_END.finditer(self._buffer, self._scanned):
            self._line(bytes(self._buffer[start : end.start()]), events)
            start = end.end()
        del self._buffer[:start]
        # What is left holds no line end, so the next piece is searched from there on.
        self._scanned = len(self._buffer)
        if self._size + len(self._buffer) > MAX_EVENT_BYTES:
            raise InternalError(f"the service sent an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
            self._data, self._size = [], 0
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
