"""How deep and how large JSON is, counted before anything is built from it.

A few bytes of JSON can cost a hundred times as much memory once they are lists and objects, and a deep nest
costs time in every later step. Counting costs one pass and keeps nothing.
"""

from __future__ import annotations

import re

# Possessive, so that an unfinished string of 8 MiB costs one pass and no backtracking stack.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_QUOTE, _COMMA = b'",'


def excess(data: bytes, *, depth: int, values: int) -> str:
    """What is too much about these bytes, "" if nothing is. They need not be JSON.

    Args:
        depth: most lists and objects inside each other.
        values: most list elements and object members in all.
    """
    opened = data.count(b"[") + data.count(b"{")
    # Much of what comes is a single flat object; those in strings are counted here, too, so it is only a hint.
    if opened <= depth and opened + data.count(b",") <= values and data.count(b'"') <= 4 * values:
        return ""
    return _counted(data, depth, values)


def _counted(data: bytes, most_depth: int, most_values: int) -> str:
    depth = values = strings = 0
    for token in _TOKEN.finditer(data):
        first = data[token.start()]
        if first == _QUOTE:
            strings += 1
        elif first in b"[{":
            depth += 1
            values += 1
            if depth > most_depth:
                return f"is nested more than {most_depth} deep"
        elif first == _COMMA:
            values += 1
        else:
            depth -= 1
        # A member is two strings: its name and its value.
        if values > most_values or strings > 2 * most_values:
            return f"has more than {most_values} values"
    return ""
