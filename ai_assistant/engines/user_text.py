"""Keeps what users write from becoming a model's control tokens: nobody ends a message or forges a role by writing so.

A template is text with control tokens written out, and what it makes has to be read with them. So places in the
values that a template is given which could be read as one (or become part of one together with the template's own
text) are put between two characters that occur nowhere else. They pass through the template like any others, and tell
afterwards which stretches are to be read as plain text. Values without such places, nearly all, are not touched, and
the prompt is the same as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ai_assistant.errors import InvalidArgument

MAX_DEPTH = 128
"""Of objects within a message or tool."""
_RARE = range(0x1342E, 0x13000, -1)
"""Hieroglyphs: printable, so that no way of printing escapes them, without case, and in nobody's control tokens."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to be tokenised by itself; with `special`, names of control tokens in it mean these tokens."""

    text: str
    special: bool


class Specials:
    """The names of a model's control tokens, and where they occur. May be used from any thread."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted({each for each in names if each}, key=lambda each: (-len(each), each)))
        self._longest = max(map(len, self._names), default=0)
        pattern = "|".join(map(re.escape, self._names)) or "(?!)"
        self._exact = re.compile(pattern)
        # A template may change the case of what it prints.
        self._loose = re.compile(pattern, re.IGNORECASE)
        self._heads = frozenset(each[:2].casefold() for each in self._names)
        self._prefixes = frozenset(each[:n] for each in self._names for n in range(1, len(each)))
        self._suffixes = frozenset(each[n:] for each in self._names for n in range(1, len(each)))

    def inside(self, text: str) -> bool:
        folded = text.casefold()
        return any(each in folded for each in self._heads) and self._loose.search(text) is not None

    def count(self, text: str) -> int:
        return len(self._exact.findall(text))

    def crosses(self, text: str, at: int) -> bool:
        """Whether a name goes from before `at` to behind it."""
        start = max(0, at - self._longest + 1)
        window = text[start : at + self._longest - 1]
        return any(
            start + begin < at < start + begin + len(each)
            for each in self._names
            for begin in _occurrences(window, each)
        )

    def wrap(self, text: str, begin: str, end: str) -> str:
        """The text with its dangerous places marked; the same object if there is none."""
        core = text.strip()
        if not core:
            return text
        marked = core
        if self.inside(core):
            marked = self._loose.sub(lambda found: f"{begin}{found[0]}{end}", core)
        longest = min(self._longest - 1, len(core))
        if len(core) < self._longest and any(core in each for each in self._names):
            marked = f"{end}{marked}{end}"
        else:
            if any(core[:n] in self._suffixes for n in range(1, longest + 1)):
                marked = end + marked
            if any(core[-n:] in self._prefixes for n in range(1, longest + 1)):
                marked += end
        return text if marked is core else text.replace(core, marked, 1)

    def blank(self, text: str) -> str:
        """The text with harmless characters in place of the names in it."""
        return self._loose.sub(lambda found: "x" * len(found[0]), text) if self.inside(text) else text


def _occurrences(text: str, name: str) -> Iterable[int]:
    at = text.find(name)
    while at >= 0:
        yield at
        at = text.find(name, at + 1)


def mapped(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """A copy of a JSON value with every text in it changed, names in objects too; the same object if none is."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"messages and tools may be nested {MAX_DEPTH} deep at most", param="messages")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        pairs = [(key, change(key) if isinstance(key, str) else key, each) for key, each in value.items()]
        out = {new: mapped(each, change, depth + 1) for _, new, each in pairs}
        same = all(key is new and out[new] is each for key, new, each in pairs)
        return value if same else out
    if isinstance(value, list | tuple):
        items = [mapped(each, change, depth + 1) for each in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def render_apart(render: Callable[[Any], str], values: Any, specials: Specials) -> list[Piece]:
    """What `render` makes of `values`, in the pieces in which it has to be tokenised.

    Raises:
        InvalidArgument: a text contains control tokens and the template prints it in a way that hides where.
    """
    # Without names of its own, "end" marks nothing: a look whether there is anything to mark.
    if mapped(values, lambda text: specials.wrap(text, "(", ")")) is values:
        return [Piece(render(values), True)]
    begin, end = _unused(values)
    marked = render(mapped(values, lambda text: specials.wrap(text, begin, end)))
    pieces = _cut(marked, begin, end, specials)
    # Of the names that are left as tokens, none may be there on account of what a user wrote.
    own = specials.count(render(mapped(values, specials.blank)))
    if sum(specials.count(each.text) for each in pieces if each.special) > own:
        raise InvalidArgument(
            "the messages contain the model's control tokens, and its chat template hides where",
            hint="leave them out, or write them apart",
            param="messages",
        )
    return pieces


def _unused(values: Any) -> tuple[str, str]:
    used: set[str] = set()

    def note(text: str) -> str:
        used.update(text)
        return text

    mapped(values, note)
    free = [chr(code) for code in _RARE if chr(code) not in used][:2]
    if len(free) < 2:
        raise InvalidArgument("the messages contain every hieroglyph that there is", param="messages")
    return free[0], free[1]


def _cut(marked: str, begin: str, end: str, specials: Specials) -> list[Piece]:
    parts: list[tuple[str, bool]] = []
    plain = False
    for part in re.split(f"([{begin}{end}])", marked):
        if part in (begin, end):
            plain = part == begin
        elif part:
            parts.append((part, plain))
    text = "".join(part for part, _ in parts)
    out: list[Piece] = []
    at = 0
    for part, is_plain in parts:
        joins = out and out[-1].special and not is_plain and not specials.crosses(text, at)
        if joins:
            out[-1] = Piece(out[-1].text + part, True)
        else:
            out.append(Piece(part, not is_plain))
        at += len(part)
    return out
