"""The filters of chat templates: Jinja's, each within the limits, and replacements for those that have none."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from ai_assistant.engines.template_limits import (
    MAX_RANGE,
    TemplateLimit,
    check_length,
    check_search,
    checked,
    replaced_length,
    tick,
    weigh,
)

_UNAVAILABLE = frozenset({
    "batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "striptags", "urlencode", "urlize",
    "wordwrap", "xmlattr",
})  # fmt: skip
"""Filters that grow text, take the square of its length in time, or have no place in a prompt."""
_MAX_DIGITS = 300
_MAX_PRECISION = 30

Filter = Callable[..., Any]


def limited(filters: Mapping[str, Filter]) -> dict[str, Filter]:
    """The filters of an environment, made fit for templates of strangers."""
    found = {**filters, **_OWN}
    return {name: _limit(each) for name, each in found.items() if name not in _UNAVAILABLE}


def _limit(function: Filter) -> Filter:
    # `wraps` copies the marks by which Jinja knows that a filter wants its context.
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tick()
        return checked(function(*args, **kwargs))

    return call


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    if indent is not None:
        indent = max(0, min(int(indent), 16))
    weigh(value)
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    before, old, new = str(text), str(old), str(new)
    check_length(replaced_length(before, old, new))
    return before.replace(old, new, -1 if count is None else count)


def _join(values: Any, separator: Any = "", attribute: Any = None) -> str:
    items = list(values)
    if attribute is not None:
        items = [each.get(attribute, "") if isinstance(each, Mapping) else "" for each in items]
    texts, between = [str(each) for each in weigh(items)], str(separator)
    check_length(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    fill = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = str(text).splitlines(keepends=True) or [""]
    check_length(len(str(text)) + len(fill) * len(lines))
    return "".join(
        fill + line if (first or number) and (blank or line.strip()) else line for number, line in enumerate(lines)
    )


def _string(value: Any) -> str:
    return str(checked(value))


def _trim(value: Any, chars: str | None = None) -> str:
    text = str(checked(value))
    if chars is not None:
        check_search(text, chars)
    return text.strip(chars)


def _escape(value: Any) -> str:
    return html.escape(str(checked(value)))


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    try:
        if isinstance(value, str):
            return int(value, base) if len(value) <= _MAX_DIGITS else default
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _float(value: Any, default: float = 0.0) -> float:
    try:
        return float(value) if not isinstance(value, str) or len(value) <= _MAX_DIGITS else default
    except (TypeError, ValueError, OverflowError):
        return default


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > _MAX_PRECISION:
        raise TemplateLimit("the model's chat template rounds absurdly")
    if method == "common":
        return float(round(value, precision))
    factor = 10.0**precision
    scaled = value * factor
    whole = -int(-scaled // 1) if method == "ceil" else int(scaled // 1)
    return float(whole / factor)


def _sum(values: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Of numbers only: a sum of lists takes the square of their length."""
    total = start
    for each in values:
        item = (each.get(attribute, 0) if isinstance(each, Mapping) else 0) if attribute is not None else each
        if not isinstance(item, int | float) or not isinstance(total, int | float):
            raise TemplateLimit("the model's chat template adds what are no numbers")
        total = checked(total + item)
    return total


def _list(values: Any) -> list[Any]:
    if isinstance(values, str) and len(values) > MAX_RANGE:
        raise TemplateLimit("the model's chat template makes absurdly large values")
    return list(values)


_OWN: dict[str, Filter] = {
    "tojson": _tojson, "replace": _replace, "join": _join, "indent": _indent, "string": _string, "safe": _string,
    "trim": _trim, "e": _escape, "escape": _escape, "forceescape": _escape, "int": _int, "float": _float,
    "round": _round, "sum": _sum, "list": _list,
}  # fmt: skip
