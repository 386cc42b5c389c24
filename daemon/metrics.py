"""What happened so far, kept for whoever measures: counts and histograms of each model, and of the interfaces.

Plain Python and no client library: that one registers collectors of the process when it is imported, and takes a lock
for each number. Everything runs on the daemon's one loop, so recording is a bisection and a few additions. What is
true right now (memory, queues, caches) is not kept here but asked for when somebody looks.

Numbers of a worker are not trusted: what is not finite or is negative is left out.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ai_assistant.engines.contract import Usage

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of times."""
RATES = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0)
"""Upper bounds of tokens per second."""

MAX_MODELS = 128
"""So many models have numbers at a time; a next one takes the place of what was not used for longest."""
RECENT_S = 60.0
_RECENT = 1024

OUTCOMES = ("done", "failed", "refused", "cancelled")
"""refused: there was no room for it (Busy, OutOfMemory), so that trying again may help."""
EVICTIONS = ("memory", "idle", "asked")
"""To make room for another model, for not being used, by somebody's wish."""


class Histogram:
    """Counts of values up to each of `bounds`, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        if 0.0 <= value < math.inf:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, how many values are at most that), the last bound being infinity."""
        found, so_far = [], 0
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            so_far += count
            found.append((bound, so_far))
        return found


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _rates() -> Histogram:
    return Histogram(RATES)


@dataclass(slots=True, eq=False)
class ModelMetrics:
    """Of one model since the start of the daemon. Seconds, tokens, tokens per second."""

    requests: Counter[str] = field(default_factory=Counter)
    """By outcome."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: Histogram = field(default_factory=_seconds)
    ttft_s: Histogram = field(default_factory=_seconds)
    tpot_s: Histogram = field(default_factory=_seconds)
    prefill_rate: Histogram = field(default_factory=_rates)
    decode_rate: Histogram = field(default_factory=_rates)
    loads: int = 0
    load_failures: int = 0
    load_s: float = 0.0
    evictions: Counter[str] = field(default_factory=Counter)
    """By reason."""
    restarts: int = 0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """(when, time to first token) of the last answers."""
    used: float = 0.0
    """When something was last recorded."""


class Metrics:
    """Records what happens. Each method is a few additions and never raises.

    Args:
        clock: seconds of a clock that only goes forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.models: dict[str, ModelMetrics] = {}
        self.http: Counter[tuple[str, int]] = Counter()
        """By endpoint (a route, never the path that somebody sent) and status."""
        self.connections: Callable[[], int] = lambda: 0

    def of(self, name: str) -> ModelMetrics:
        """Where a model's numbers go."""
        found = self.models.get(name)
        if found is None:
            if len(self.models) >= MAX_MODELS:
                del self.models[min(self.models, key=lambda each: self.models[each].used)]
            found = self.models[name] = ModelMetrics()
        found.used = self.clock()
        return found

    def observe(self, name: str, usage: Usage, ttft_s: float | None = None) -> None:
        """A generation has finished; `ttft_s` is None when it gave no token."""
        model = self.of(name)
        read = max(0, usage.prompt_tokens - usage.cached_tokens)
        model.prompt_tokens += max(0, usage.prompt_tokens)
        model.completion_tokens += max(0, usage.completion_tokens)
        model.cached_tokens += max(0, usage.cached_tokens)
        model.queue_s.observe(usage.queue_s)
        if read and usage.prefill_s > 0:
            model.prefill_rate.observe(read / usage.prefill_s)
        if usage.completion_tokens > 0 and usage.decode_s > 0:
            model.tpot_s.observe(usage.decode_s / usage.completion_tokens)
            model.decode_rate.observe(usage.completion_tokens / usage.decode_s)
        if ttft_s is not None and 0.0 <= ttft_s < math.inf:
            model.ttft_s.observe(ttft_s)
            model.recent.append((self.clock(), ttft_s))

    def read(self, name: str, tokens: int) -> None:
        """Texts were turned into vectors, scores or labels."""
        self.of(name).prompt_tokens += max(0, tokens)

    def ended(self, name: str, outcome: str) -> None:
        """A request has ended; one of `OUTCOMES`."""
        self.of(name).requests[outcome] += 1

    def loaded(self, name: str, seconds: float) -> None:
        model = self.of(name)
        model.loads += 1
        model.load_s += max(0.0, seconds)

    def load_failed(self, name: str) -> None:
        self.of(name).load_failures += 1

    def evicted(self, name: str, reason: str) -> None:
        """The model was unloaded; one of `EVICTIONS`."""
        self.of(name).evictions[reason] += 1

    def restarted(self, name: str) -> None:
        """The model's worker crashed."""
        self.of(name).restarts += 1

    def forget(self, name: str) -> None:
        """The model is gone: another one of that name begins anew, and nobody learns that there was one."""
        self.models.pop(name, None)

    def recent_ttft(self, name: str) -> list[float]:
        """Times to the first token of the last minute, ascending."""
        model = self.models.get(name)
        since = self.clock() - RECENT_S
        return sorted(ttft for when, ttft in model.recent if when >= since) if model is not None else []


def quantile(ascending: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of them do not exceed; None of none."""
    if not ascending:
        return None
    return ascending[min(len(ascending) - 1, max(0, math.ceil(share * len(ascending)) - 1))]
