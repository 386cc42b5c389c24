"""What a caller sees of the tokens: text, held back where it must be, or a tool call."""

from __future__ import annotations

from typing import Protocol

from ai_assistant.engines.contract import ToolCall
from ai_assistant.engines.text import StopMatcher, Utf8Decoder
from ai_assistant.engines.tools import ToolReader, parse_calls


class Output(Protocol):
    """Fed with the bytes of each token; tells what may be shown."""

    stopped: bool

    def feed(self, piece: bytes) -> str: ...

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """What was held back, and the tool calls, if the text was such."""

    @property
    def complete(self) -> bool:
        """Whether a grammar was followed to its end: a whole JSON object or list was written."""


class _JsonEnd:
    """Knows when an object or list that a grammar keeps valid is complete, looking at each character once."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.reached = False

    def feed(self, text: str) -> None:
        for each in text:
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = each == "\\"
                self._quoted = each != '"'
            elif each == '"':
                self._quoted = True
            elif each in "{[":
                self._depth += 1
            elif each in "}]":
                self._depth -= 1
                self.reached = self._depth <= 0


class PlainOutput:
    """Text as it comes. Under a schema it also knows when the answer is complete."""

    def __init__(self, stops: tuple[str, ...], *, enforced: bool = False) -> None:
        self._decoder = Utf8Decoder()
        self._matcher = StopMatcher(stops)
        self._end = _JsonEnd() if enforced else None

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def feed(self, piece: bytes) -> str:
        text = self._decoder.feed(piece)
        if self._end is not None:
            self._end.feed(text)
        return self._matcher.feed(text)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        return self._matcher.feed(self._decoder.finish()) + self._matcher.finish(), ()

    @property
    def complete(self) -> bool:
        return self._end is not None and self._end.reached


class ForcedCall:
    """One call, or a list of calls, that a grammar enforces: none of its text is shown."""

    stopped = False

    def __init__(self, names: frozenset[str]) -> None:
        self._decoder = Utf8Decoder()
        self._names = names
        self._text: list[str] = []
        self._end = _JsonEnd()

    def feed(self, piece: bytes) -> str:
        text = self._decoder.feed(piece)
        self._text.append(text)
        self._end.feed(text)
        return ""

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        return "", parse_calls("".join(self._text), self._names)

    @property
    def complete(self) -> bool:
        return self._end.reached


class AutoCalls:
    """Text, or calls if the model writes such: `<tool_call>…</tool_call>`, or nothing but what is known as calls.

    Args:
        parallel: whether more than the first call counts.
    """

    def __init__(self, stops: tuple[str, ...], names: frozenset[str], *, parallel: bool = True) -> None:
        self._plain = PlainOutput(stops)
        self._reader = ToolReader(names, parallel=parallel)

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
        return self._reader.complete
