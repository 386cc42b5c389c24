"""How long requests that wait were told to wait: what a refused one is told to come back after."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ai_assistant.engines.contract import Queued

LONGEST_S = 600
"""Nobody is sent away for longer, whatever an estimate says."""


class Waits:
    """When each waiting request of a model expects its turn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turns: dict[str, dict[object, float]] = {}

    def told(self, model: str, who: object, event: Queued) -> None:
        """A request has heard that it waits; `who` stands for it until `over`."""
        if event.eta_s is not None and math.isfinite(event.eta_s):
            self._turns.setdefault(model, {})[who] = self._clock() + max(0.0, event.eta_s)

    def over(self, model: str, who: object) -> None:
        """It does not wait any more; nothing if it never did."""
        waiting = self._turns.get(model)
        if waiting is not None and waiting.pop(who, None) is not None and not waiting:
            del self._turns[model]

    def retry_after_s(self, model: str) -> int | None:
        """Whole seconds, at least 1, until the last one that waits has its turn; None when nobody waits."""
        waiting = self._turns.get(model)
        if not waiting:
            return None
        left = max(waiting.values()) - self._clock()
        return max(1, min(LONGEST_S, math.ceil(left)))
