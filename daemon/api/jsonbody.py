"""Bytes from a stranger to a JSON object, or an error that says what is wrong.

Python's parser accepts more than JSON (NaN, duplicate keys, lone surrogates), builds values of any number,
and only stops nesting at the interpreter's own recursion limit. So the shape is counted before anything is
built: what passes costs a bounded amount of memory and of stack, here and in the worker that gets it next.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from ai_assistant.daemon.jsonshape import excess
from ai_assistant.errors import InvalidArgument

MAX_DEPTH = 64
"""Nested lists and objects. A JSON schema written by hand stays below 20."""
MAX_VALUES = 100_000
"""List elements and object members in all; about 100 bytes of memory each."""
MAX_INTEGER_DIGITS = 20
"""Enough for every 64-bit integer."""

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a request body.

    Raises:
        InvalidArgument: no JSON object, invalid UTF-8, too deep, too many values, duplicate keys, NaN or
            Infinity, numbers that no machine type holds, or half a surrogate pair.
    """
    if not data.strip():
        raise InvalidArgument("the body is empty", hint="send a JSON object")
    if wrong := excess(data, depth=MAX_DEPTH, values=MAX_VALUES):
        raise InvalidArgument(f"the body {wrong}")
    try:
        # `bytes` would make json guess UTF-16 and UTF-32; HTTP says UTF-8.
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise InvalidArgument(f"the body is nested more than {MAX_DEPTH} deep") from None
    if not isinstance(value, dict):
        raise InvalidArgument("the body must be a JSON object")
    if _SURROGATE_ESCAPE.search(data):
        _check_strings(value)
    return value


def _check_strings(value: object) -> None:
    """Half a surrogate pair can be escaped in JSON but is no text: nothing later could encode it."""
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, str):
            try:
                each.encode()
            except UnicodeEncodeError:
                raise InvalidArgument("the body has half a surrogate pair in a string") from None
        elif isinstance(each, dict):
            todo.extend(each.keys())
            todo.extend(each.values())
        elif isinstance(each, list):
            todo.extend(each)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidArgument(f"{key[:80]!r} is given twice", param=key[:80])
            seen.add(key)
    return made


def _constant(name: str) -> NoReturn:
    raise InvalidArgument(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidArgument(f"the number {digits[:40]} is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise InvalidArgument(f"the number {digits[:MAX_INTEGER_DIGITS]}… is too large")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)
