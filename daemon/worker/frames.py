"""Frames between daemon and worker: four bytes of big-endian length, then a JSON object in UTF-8.

Both sides read the other's bytes as hostile: a length beyond the limit, bytes that are no JSON object,
or one that is nested absurdly raise `ProtocolError`, after which the connection is of no further use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_FRAME = 16 << 20
MAX_EVENT = 4 << 20
"""What a worker sends that is not the result of an embedding or of a tokenisation: a token, the end of an answer."""
MAX_FILES = 32
"""Descriptors that go with a load, the model's included."""
_HEAD = 4


class ProtocolError(Exception):
    """The peer does not speak the protocol."""


def encode(message: Mapping[str, Any], limit: int = MAX_FRAME) -> bytes:
    """One frame.

    Raises:
        ValueError: it would be larger than `limit`.
    """
    try:
        body = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair is legal in JSON and in a str, but has no UTF-8.
        body = json.dumps(message, separators=(",", ":")).encode()
    return framed(body, limit)


def framed(body: bytes, limit: int = MAX_FRAME) -> bytes:
    """A frame around JSON; see `encode`."""
    if len(body) > limit:
        raise ValueError(f"a message of {len(body)} bytes is larger than {limit}")
    return len(body).to_bytes(_HEAD, "big") + body


class FrameReader:
    """Cuts a byte stream into messages; holds at most one incomplete frame.

    Args:
        longest: the most bytes that a frame may have now.
        check: sees the bytes of each frame before they are parsed, and may raise ProtocolError.

    Attributes:
        size: bytes of the frame of the last message.
    """

    def __init__(
        self, longest: Callable[[], int] = lambda: MAX_FRAME, check: Callable[[bytes], None] = lambda _body: None
    ) -> None:
        self._buffer = bytearray()
        self._longest = longest
        self._check = check
        self.size = 0

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
                if not 2 <= length <= min(self._longest(), MAX_FRAME):
                    raise ProtocolError(f"a frame of {length} bytes")
                end = at + _HEAD + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[at + _HEAD : end])
                at = end
                self.size = _HEAD + length
                self._check(body)
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
