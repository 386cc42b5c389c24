"""Ranges of integers in GBNF."""

from __future__ import annotations


def integer_range(low: int | None, high: int | None) -> list[str]:
    """Alternatives that match exactly the integers from `low` to `high` (None: no bound), without leading zeros."""
    parts: list[str] = []
    if low is None or low < 0:
        # Negative numbers are "-" and a magnitude from −high (at least 1) to −low.
        least = 1 if high is None or high >= 0 else -high
        parts += [f'"-" {each}' for each in _natural_range(least, None if low is None else -low)]
    if high is None or high >= 0:
        parts += _natural_range(max(low or 0, 0), high)
    return parts


def _natural_range(low: int, high: int | None) -> list[str]:
    if high is None:
        digits = len(str(low))
        more = f"[1-9] [0-9]{{{digits},15}}" if digits < 16 else ""
        return [*_natural_range(low, 10**digits - 1), *([more] if more else [])]
    parts: list[str] = []
    while low <= high:
        # The numbers with as many digits as `low` …
        end = min(high, 10 ** len(str(low)) - 1)
        parts += _same_length(str(low), str(end))
        low = end + 1
    return parts


def _same_length(low: str, high: str) -> list[str]:
    """Alternatives for the numbers from `low` to `high`, which have equally many digits."""
    if not low:
        return ['""']
    tail = len(low) - 1
    any_tail = f" [0-9]{{{tail}}}" if tail else ""
    if low == "0" * len(low) and high == "9" * len(high):
        return [f"[0-9]{{{len(low)}}}"]
    if low[0] == high[0]:
        return [f'"{low[0]}" ({" | ".join(_same_length(low[1:], high[1:]))})'] if tail else [f'"{low[0]}"']
    if not tail:
        return [f"[{low}-{high}]"]
    parts: list[str] = []
    first, last = int(low[0]), int(high[0])
    if low[1:] != "0" * tail:
        parts.append(f'"{first}" ({" | ".join(_same_length(low[1:], "9" * tail))})')
        first += 1
    if high[1:] != "9" * tail:
        end = f'"{last}" ({" | ".join(_same_length("0" * tail, high[1:]))})'
        last -= 1
    else:
        end = ""
    if first <= last:
        parts.append(f"[{first}-{last}]{any_tail}")
    return [*parts, *([end] if end else [])]
