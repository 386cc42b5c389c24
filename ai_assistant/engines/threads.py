"""How many threads decode, by measurement: all cores when they are ours, fewer while others hold some of them.

A step ends when its slowest thread does. Where somebody else computes on some of the cores, the threads there
hold up all others at every barrier, and fewer threads can be faster; on a machine whose cores are all taken
alike they are not. So nothing is assumed: the first steps and every slow one are a reason to try, and what was
faster stays.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

DECODES = 32
"""Tokens of a step up to which it is one of decoding. Larger ones have so much work between barriers that all
threads are best, and their time depends on their size."""
_SLOW = 1.3
"""Times the quiet step, from which something is thought to be in the way."""
_BETTER = 0.92
"""A trial wins when its steps take at most this share: noise must not move the count to and fro."""
_AS_GOOD = 1.03
"""All threads are taken back as soon as they are no slower than this."""
_WINDOW = 7
"""Steps that are compared; a median of them does not see one that was disturbed."""
_TRIAL = 4
"""Steps of a trial, of which the first, in which the team of threads is changed, does not count."""
_LOST = 1.15
"""A trial with a step that took so much longer ends there: steps of large models are long."""
_BACK_S = 1.3
"""Time after which fewer threads are compared with all again: full speed is back within two seconds."""
_RETRY_S, _RETRY_MOST_S = 1.0, 30.0
"""Time until the next trial after one that did not help, doubled each time: trials cost a little."""
_FORGET = 1.002
"""Growth of the quiet time per step, as contexts grow and clocks fall."""


def _middle(seconds: Collection[float]) -> float:
    """The median of an odd number of steps; once per token, and `statistics` takes its time."""
    return sorted(seconds)[len(seconds) // 2]


def levels_of(most: int) -> tuple[int, ...]:
    """The counts that are tried, most first: all, three quarters, half and a quarter."""
    wanted = (most, most * 3 // 4, most // 2, most // 4)
    return tuple(sorted({max(1, each) for each in wanted}, reverse=True))


class ThreadControl:
    """Decides the number of threads of each step. Pure: time comes in as the seconds that steps took.

    Args:
        most: threads when nothing is in the way, at least 1.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"at least one thread, not {most}")
        self._levels = levels_of(most)
        self._level = 0
        self._trial: int | None = None
        """The level that is being tried instead."""
        self._shape = 0
        self._quiet: dict[int, float] = {}
        """Seconds of an undisturbed step with all threads, by its shape."""
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._tried: list[float] = []
        self._since = 0.0
        self._retry = _RETRY_S
        self._untried = True
        """Fewer threads than these were not tried yet: not since the load, or since these won."""

    @property
    def most(self) -> int:
        return self._levels[0]

    def for_step(self, tokens: int) -> int:
        """Threads for a step of so many tokens."""
        if tokens > DECODES:
            return self.most
        return self._levels[self._level if self._trial is None else self._trial]

    def after_step(self, seconds: float, tokens: int) -> None:
        """Learn from a step that has been computed with what `for_step` said. Nonsense is ignored."""
        if len(self._levels) == 1 or not 0 < tokens <= DECODES or not 0 < seconds < math.inf:
            return
        shape = tokens.bit_length()
        if shape != self._shape:
            # Steps of other sizes cannot be compared; what is known of the machine stays.
            self._shape, self._trial = shape, None
            self._recent.clear()
        self._since += seconds
        if self._trial is not None:
            self._tried.append(seconds)
            lost = len(self._tried) > 1 and seconds > _LOST * _middle(self._recent)
            if lost or len(self._tried) == _TRIAL:
                self._judge()
            return
        self._recent.append(seconds)
        if len(self._recent) < _WINDOW:
            return
        now = _middle(self._recent)
        if self._level == 0:
            quiet = min(now, self._quiet.get(shape, now) * _FORGET)
            self._quiet[shape] = quiet
            if self._untried or (now > quiet * _SLOW and self._since >= self._retry):
                self._try(1)
        elif self._since >= _BACK_S:
            self._try(0)
        elif self._untried and self._level + 1 < len(self._levels):
            self._try(self._level + 1)

    def _try(self, level: int) -> None:
        self._trial = level
        self._untried = False
        self._tried.clear()
        self._since = 0.0

    def _judge(self) -> None:
        level, self._trial = self._trial, None
        assert level is not None
        tried, now = _middle(self._tried[1:]), _middle(self._recent)
        fewer = level > self._level
        if tried <= now * (_BETTER if fewer else _AS_GOOD):
            self._level = level
            self._retry = _RETRY_S
            self._untried = fewer
            self._recent.clear()
        elif fewer and level + 1 < len(self._levels):
            # With three of four threads there may still be one on a core that somebody holds.
            self._try(level + 1)
        elif self._level == 0:
            self._retry = min(_RETRY_MOST_S, self._retry * 2)
