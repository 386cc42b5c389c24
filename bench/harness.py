"""What every bench shares: runs in turn, medians with their bounds, one row per claim.

A bench makes pairs of samples – ours and the other's, one after the other in the same run, so that whatever
else the machine does hits both – and from them a `Row` per claim. Statistics are on medians: a disturbed run
is an outlier and not a shift. Bounds are the 2.5th and 97.5th percentile of a paired bootstrap.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TextIO, TypeVar

T = TypeVar("T")

MIN_PAIRS = 7
ROUNDS = 4000
# "At least 1.00 ×" may be a little less in one run of a noisy machine; see design: Commands.
_NOISE = 0.03
_SEED = 20_250_101


@dataclass(frozen=True, slots=True)
class Row:
    """One claim. `ours` and `other` are medians in the claim's unit; `low` and `high` bound the ratio."""

    claim: str
    ours: float
    other: float
    ratio: float
    low: float
    high: float
    goal: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Bounds:
    value: float
    low: float
    high: float


def pairs(
    ours: Callable[[int], T], other: Callable[[int], T], count: int, *, least: int = MIN_PAIRS
) -> tuple[list[T], list[T]]:
    """Run both `count` times in turn; who goes first alternates, so that neither always finds a warm machine.

    Args:
        least: pairs that the bounds need; fewer than `MIN_PAIRS` only where one takes minutes.

    Raises:
        ValueError: fewer than that.
    """
    if count < least:
        raise ValueError(f"at least {least} pairs, not {count}")
    mine: list[T] = []
    theirs: list[T] = []
    for index in range(count):
        if index % 2:
            mine.append(ours(index))
            theirs.append(other(index))
        else:
            theirs.append(other(index))
            mine.append(ours(index))
    return mine, theirs


def ratio(ours: Sequence[float], other: Sequence[float]) -> Bounds:
    """Median of ours ÷ median of the other, with 95 % bounds."""
    return _bootstrap(ours, other, lambda mine, theirs: median(mine) / median(theirs))


def difference(ours: Sequence[float], other: Sequence[float]) -> Bounds:
    """Median over the pairs of ours − other, with 95 % bounds: for small amounts on top of a varying one."""
    return _bootstrap(ours, other, lambda mine, theirs: median(a - b for a, b in zip(mine, theirs, strict=True)))


def _bootstrap(
    ours: Sequence[float], other: Sequence[float], statistic: Callable[[list[float], list[float]], float]
) -> Bounds:
    if len(ours) != len(other) or not ours:
        raise ValueError("samples come in pairs")
    rng = random.Random(_SEED)
    drawn = []
    everything = range(len(ours))
    for _ in range(ROUNDS):
        chosen = rng.choices(everything, k=len(ours))
        drawn.append(statistic([ours[each] for each in chosen], [other[each] for each in chosen]))
    drawn.sort()
    low, high = drawn[round(0.025 * (ROUNDS - 1))], drawn[round(0.975 * (ROUNDS - 1))]
    return Bounds(statistic(list(ours), list(other)), low, high)


def at_least(claim: str, ours: Sequence[float], other: Sequence[float], goal: float = 1.0) -> Row:
    """More is better: the ratio reaches the goal, or its lower bound is within the noise of it."""
    found = ratio(ours, other)
    holds = found.value >= goal or found.low >= goal - _NOISE
    return _row(claim, ours, other, found, f"≥ {goal:.2f} ×", holds)


def at_most(claim: str, ours: Sequence[float], other: Sequence[float], goal: float) -> Row:
    """Less is better: the ratio is within the goal, which has its tolerance in it already."""
    found = ratio(ours, other)
    return _row(claim, ours, other, found, f"≤ {goal:.2f} ×", found.value <= goal)


def adds_at_most(
    claim: str, ours: Sequence[float], other: Sequence[float], goal: float, unit: str
) -> tuple[Row, Bounds]:
    """The median difference is within the goal. Returns the row and the difference itself."""
    found = difference(ours, other)
    row = _row(claim, ours, other, ratio(ours, other), f"+ ≤ {goal:g} {unit}", found.value <= goal)
    return row, found


def limit(claim: str, value: float, most: float, unit: str) -> Row:
    """An amount that has no peer: the goal itself is the other."""
    share = value / most
    return Row(claim, value, most, share, share, share, f"≤ {most:g} {unit}", value <= most)


def _row(claim: str, ours: Sequence[float], other: Sequence[float], found: Bounds, goal: str, holds: bool) -> Row:
    return Row(claim, median(ours), median(other), found.value, found.low, found.high, goal, holds)


def report(rows: Iterable[Row], *, as_json: bool = False, out: TextIO | None = None) -> int:
    """Print the rows; returns the exit status: 1 when a claim does not hold, or there is none."""
    out = out or sys.stdout
    found = list(rows)
    if as_json:
        for row in found:
            print(json.dumps(asdict(row), ensure_ascii=False), file=out)
    else:
        lines = [("name", "ours", "other", "ratio", "goal", "holds")] + [_cells(row) for row in found]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            cells = [cell.ljust(width) if not n else cell.rjust(width) for n, (cell, width) in
                     enumerate(zip(line, widths, strict=True))]  # fmt: skip
            print("  ".join(cells).rstrip(), file=out)
    return 0 if found and all(row.holds for row in found) else 1


def _cells(row: Row) -> tuple[str, str, str, str, str, str]:
    bounds = "" if row.low == row.high else f" [{row.low:.3f}, {row.high:.3f}]"
    return (
        row.claim, f"{row.ours:.4g}", f"{row.other:.4g}", f"{row.ratio:.3f}{bounds}",
        row.goal, "yes" if row.holds else "NO",
    )  # fmt: skip


def arguments(description: str, *, default_pairs: int = MIN_PAIRS) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object per claim and line")
    parser.add_argument("--pairs", type=int, default=default_pairs, help=f"pairs to run (default {default_pairs})")
    return parser


def note(text: str) -> None:
    """Something for a person who waits; never part of the result."""
    print(text, file=sys.stderr, flush=True)
