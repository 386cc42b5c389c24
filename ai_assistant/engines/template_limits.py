"""How much a chat template may do: time, steps, and the size of every value that it makes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from typing import Any

from ai_assistant.errors import InvalidModel

MAX_TEXT = 16 << 20
"""Characters of any value that a template makes, and of its output."""
MAX_STEPS = 500_000
MAX_SECONDS = 3.0
MAX_RANGE = 100_000
MAX_NODES = 200_000
"""Values in a list or object, counted as often as they are reachable: `[x, x]` doubles them."""
MAX_BITS = 1024
"""Of any integer. Arithmetic on longer ones takes the square of their length."""
MAX_FORMAT = 4096
"""Characters of a text with placeholders."""
_MAX_SEARCH = 1 << 28
"""Text length times pattern length, where Python's search may take as many steps."""

_TEXT_METHODS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower "
    "isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_METHODS = {
    str: frozenset(_TEXT_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    float: frozenset({"is_integer"}),
    int: frozenset(),
    bytes: frozenset(),
    range: frozenset({"count", "index"}),
    type: frozenset(),
}
"""The methods of Python's own types that a template may call; the others can hang, grow, or mean nothing here."""
_VIEWS = (KeysView, ValuesView, ItemsView)
_PADDING = frozenset({"ljust", "rjust", "zfill"})
_SPLITTING = frozenset({"split", "rsplit", "splitlines"})
_SEARCHING = frozenset({"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"})


class TemplateLimit(InvalidModel):
    """The template does too much work; a defect of the model, not of the request."""

    @property
    def name(self) -> str:
        return "InvalidModel"


class _Budget(threading.local):
    """What the rendering on this thread may still use."""

    steps = 0
    until = float("inf")

    @contextmanager
    def fresh(self) -> Iterator[None]:
        self.steps = 0
        self.until = time.monotonic() + MAX_SECONDS
        try:
            yield
        finally:
            self.until = float("inf")

    def step(self) -> str:
        """Called by every turn of a loop; prints as nothing."""
        self.steps += 1
        if self.steps > MAX_STEPS or time.monotonic() > self.until:
            raise TemplateLimit("the model's chat template runs too long")
        return ""


BUDGET = _Budget()


def tick() -> None:
    """Look at the clock."""
    if time.monotonic() > BUDGET.until:
        raise TemplateLimit("the model's chat template runs too long")


def check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise TemplateLimit("the model's chat template makes absurdly long text")


def checked(value: Any) -> Any:
    """The value itself, if its size is within all limits."""
    if isinstance(value, str | bytes):
        check_length(len(value))
    elif isinstance(value, int):
        check_bits(value.bit_length())
    elif isinstance(value, _VIEWS):
        # Printing a view prints what is in it, which nothing could weigh later.
        return weigh(list(value))
    elif isinstance(value, list | tuple | dict):
        weigh(value)
    return value


def check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimit("the model's chat template computes absurdly large numbers")


def check_integers(operator: str, left: Any, right: Any) -> None:
    """Refuse arithmetic whose operands or result would be too long, before it is done."""
    for each in (left, right):
        if isinstance(each, int):
            check_bits(each.bit_length())
    if operator == "*" and isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())
    if operator == "**":
        if not isinstance(left, int | float) or not isinstance(right, int | float) or abs(right) > MAX_BITS:
            raise TemplateLimit("the model's chat template computes absurd powers")
        if isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * abs(right))


def check_method(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a method of a text, number or collection that takes or makes too much."""
    owner = getattr(method, "__self__", None)
    kind = next((each for each in _METHODS if isinstance(owner, each)), None)
    if kind is None:
        return
    name = getattr(method, "__name__", "")
    if name not in _METHODS[kind]:
        raise TemplateLimit(f"the model's chat template calls {kind.__name__}.{name[:40]}, which is not available")
    if not isinstance(owner, str):
        return
    if name in _PADDING and any(isinstance(each, int) and each > MAX_RANGE for each in args):
        raise TemplateLimit("the model's chat template pads text absurdly")
    if name in _SEARCHING:
        for each in (*args, *kwargs.values()):
            if isinstance(each, str):
                check_search(owner, each)
    if name in _SPLITTING:
        separator = next((each for each in (*args, *kwargs.values()) if isinstance(each, str)), "")
        # Runs of white space are not counted: at most every other character is between two.
        pieces = owner.count(separator) if separator else len(owner) // 16
        if pieces > MAX_NODES:
            raise TemplateLimit("the model's chat template cuts text into absurdly many pieces")
    if name == "replace" and len(args) >= 2:
        check_length(replaced_length(owner, str(args[0]), str(args[1])))
    if name == "join" and args:
        check_length(len(owner) * _count_of(args[0]))


def check_search(text: str, pattern: str) -> None:
    if len(text) * len(pattern) > _MAX_SEARCH:
        raise TemplateLimit("the model's chat template searches for absurdly long text")


def check_format(pattern: str, values: Iterable[Any]) -> None:
    """Refuse widths that are large or come from a value, and values that could be repeated too often."""
    if len(pattern) > MAX_FORMAT or re.search(r"\d{4}|\*|:[^}:]*\{", pattern):
        raise TemplateLimit("the model's chat template formats text absurdly")
    places = max(pattern.count("{"), pattern.count("%"))
    check_length(places * max((_printed(each) for each in values), default=0))


def _printed(value: Any) -> int:
    """About the characters of the printed value."""
    if isinstance(value, str):
        return len(value)
    return sum(len(each) if isinstance(each, str) else 24 for each in _inside(value))


def weigh(value: Any) -> Any:
    """The value itself, if it has at most MAX_NODES values and MAX_TEXT characters inside."""
    length = 0
    for each in _inside(value):
        if isinstance(each, str):
            length += len(each)
            if length > MAX_TEXT:
                raise TemplateLimit("the model's chat template makes absurdly large values")
    return value


def _inside(value: Any) -> Iterator[Any]:
    """A value and all that can be reached from it, with the names in objects, each time that it can."""
    count = 0
    todo = [value]
    while todo:
        each = todo.pop()
        yield each
        count += 1
        if isinstance(each, list | tuple):
            more: Iterable[Any] = each
        elif isinstance(each, dict):
            more = (*each.keys(), *each.values())
        else:
            continue
        count += len(each)
        if count > MAX_NODES:
            raise TemplateLimit("the model's chat template makes absurdly large values")
        todo.extend(more)


def replaced_length(text: str, old: str, new: str) -> int:
    """Characters of `text.replace(old, new)`."""
    if len(new) <= len(old):
        return len(text)
    count = text.count(old) if old else len(text) + 1
    return len(text) + count * (len(new) - len(old))


def _count_of(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else MAX_RANGE
