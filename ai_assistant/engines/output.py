"""What a caller sees of the tokens: text, held back where it must be, or a tool call."""

from __future__ import annotations

import json
from typing import Protocol

from ai_assistant.engines.contract import ToolCall
from ai_assistant.engines.text import StopMatcher, Utf8Decoder
from ai_assistant.engines.tools import ToolReader, parse_call


class Output(Protocol):
    """Fed with the bytes of each token; tells what may be shown."""

    stopped: bool

    def feed(self, piece: bytes) -> str: ...

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """What was held back, and the tool calls, if the text was such."""

    @property
    def complete(self) -> bool:
        """Whether what was generated under a grammar is already a whole JSON value."""


class PlainOutput:
    """Text as it comes. With a schema the text is kept as well, to know when it is complete."""

    def __init__(self, stops: tuple[str, ...], *, keep: bool = False) -> None:
        self._decoder = Utf8Decoder()
        self._matcher = StopMatcher(stops)
        self._kept: list[str] | None = [] if keep else None

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def feed(self, piece: bytes) -> str:
        text = self._decoder.feed(piece)
        if self._kept is not None:
            self._kept.append(text)
        return self._matcher.feed(text)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        return self._matcher.feed(self._decoder.finish()) + self._matcher.finish(), ()

    @property
    def complete(self) -> bool:
        return self._kept is not None and _is_json("".join(self._kept))


class ForcedCall:
    """A call that a grammar enforces: none of its text is shown."""

    stopped = False

    def __init__(self, names: frozenset[str]) -> None:
        self._decoder = Utf8Decoder()
        self._names = names
        self._text: list[str] = []

    def feed(self, piece: bytes) -> str:
        self._text.append(self._decoder.feed(piece))
        return ""

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        call = parse_call("".join(self._text), self._names)
        return "", (call,) if call else ()

    @property
    def complete(self) -> bool:
        return _is_json("".join(self._text))


class AutoCalls:
    """Text, or calls if the model writes such: `<tool_call>…</tool_call>`, or one bare JSON object."""

    def __init__(self, stops: tuple[str, ...], names: frozenset[str]) -> None:
        self._plain = PlainOutput(stops)
        self._reader = ToolReader(names)

    @property
    def stopped(self) -> bool:
        return self._plain.stopped

    def feed(self, piece: bytes) -> str:
        return self._reader.feed(self._plain.feed(piece))

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        rest, _ = self._plain.finish()
        shown = self._reader.feed(rest)
        more, calls = self._reader.finish()
        return shown + more, calls

    @property
    def complete(self) -> bool:
        return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
