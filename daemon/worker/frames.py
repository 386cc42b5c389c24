"""Frames between daemon and worker: four bytes of big-endian length, then a JSON object in UTF-8.

Both sides read the other's bytes as hostile: a length beyond the limit, bytes that are no JSON object,
or one that is nested absurdly raise `ProtocolError`, after which the connection is of no further use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_FRAME = 16 << 20
_HEAD = 4


class ProtocolError(Exception):
    """The peer does not speak the protocol."""


def encode(message: Mapping[str, Any]) -> bytes:
    """One frame.

    Raises:
        ValueError: it would be larger than MAX_FRAME.
    """
    try:
        body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair is legal in JSON and in a str, but has no UTF-8.
        body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes is larger than {MAX_FRAME}")
    return len(body).to_bytes(_HEAD, "big") + body


class FrameReader:
    """Cuts a byte stream into messages; holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that are complete now.

        Raises:
            ProtocolError
        """
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _HEAD:
                length = int.from_bytes(buffer[at : at + _HEAD], "big")
                if not 2 <= length <= MAX_FRAME:
                    raise ProtocolError(f"a frame of {length} bytes")
                end = at + _HEAD + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[at + _HEAD : end])
                at = end
                yield _parse(body)
        finally:
            del buffer[:at]


def _parse(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is no JSON: {type(error).__name__}") from error
    if not isinstance(message, dict):
        raise ProtocolError("a frame that is no object")
    return message


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
