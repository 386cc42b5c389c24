"""Time that strangers' wishes may take: making plans for devices, which one request can ask for again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from ai_assistant.engines.hetero import PARAM
from ai_assistant.errors import Busy

PLANNING_S = 30.0
SHARE = 0.1


class Allowance:
    """Seconds that may be spent: so many at once, and a share of the time that passes.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, seconds: float = PLANNING_S, share: float = SHARE, clock: Callable[[], float] = time.monotonic):
        self._most, self._share, self.clock = seconds, share, clock
        self._left, self._at = seconds, clock()

    def check(self) -> None:
        """Raises Busy: everything is spent."""
        now = self.clock()
        self._left = min(self._most, self._left + (now - self._at) * self._share)
        self._at = now
        if self._left <= 0:
            raise Busy(
                "too many ways to divide this model were asked for lately",
                hint=f"use the same {PARAM} for all requests, or try again in {-self._left / self._share + 1:.0f} s",
                param=PARAM,
            )

    def spend(self, seconds: float) -> None:
        self._left -= seconds
