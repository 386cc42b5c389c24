"""How much the machine suffers from lack of memory, as the kernel measures it (pressure stall information)."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path

PRESSING = 10.0
"""Percent of the last ten seconds in which something waited for memory: worth giving caches back."""
URGENT = 40.0
"""The same, when a model has to go even if the pressure does not grow any more."""


def some_avg10(root: Path) -> float | None:
    """Percent of the last 10 s in which at least one task waited for memory; None where nothing measures it."""
    try:
        with (root / "proc/pressure/memory").open() as file:
            line = file.readline(256)
    except (OSError, UnicodeDecodeError):
        return None
    kind, _, rest = line.partition(" ")
    values = dict(each.partition("=")[::2] for each in rest.split())
    try:
        found = float(values["avg10"])
    except (KeyError, ValueError):
        return None
    return found if kind == "some" and math.isfinite(found) and found >= 0 else None


class Relief(StrEnum):
    NOTHING = "nothing"
    TRIM = "trim"
    """Idle models give back what they can have again without loading."""
    UNLOAD = "unload"


class Gauge:
    """Decides by what was measured before and is measured now."""

    def __init__(self) -> None:
        self._before = 0.0

    def wanted(self, pressure: float | None, *, trimmed: bool) -> Relief:
        """What to do now.

        Args:
            pressure: percent, see `some_avg10`.
            trimmed: every idle model has already given back what it can.
        """
        now, before = pressure or 0.0, self._before
        self._before = now
        if now < PRESSING:
            return Relief.NOTHING
        if not trimmed:
            return Relief.TRIM
        return Relief.UNLOAD if now > before or now >= URGENT else Relief.NOTHING
