"""A generation from the scheduler's side, and a sequence of the context that it runs in."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.contract import Chunk, Event, Finished, FinishReason, Priority, Usage
from ai_assistant.engines.output import Output
from ai_assistant.engines.sampling import Sampler
from ai_assistant.errors import AIAssistantError


class Task:
    """`events` carries Event values and, last, perhaps an error."""

    __slots__ = (
        "cached", "cancelled", "ended", "events", "first", "ignore_end", "last_token", "limit", "order", "output",
        "paused", "priority", "produced", "prompt", "sampler", "started", "submitted", "told", "told_at", "top",
    )  # fmt: skip

    def __init__(
        self,
        prompt: Tokens,
        limit: int,
        sampler: Sampler,
        output: Output,
        top: int | None,
        *,
        priority: str = Priority.INTERACTIVE,
        ignore_end: bool = False,
    ) -> None:
        self.prompt = prompt
        self.limit = limit
        self.sampler = sampler
        self.output = output
        self.top = top
        self.priority = priority
        self.ignore_end = ignore_end
        self.events: queue.SimpleQueue[Event | AIAssistantError] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.cancelled = False
        self.paused = False
        self.produced = 0
        self.cached = 0
        self.last_token = -1
        self.order = 0
        """The how manieth to get a sequence."""
        self.told = -1
        """The position in the queue that its reader knows of."""
        self.told_at = 0.0
        self.submitted = time.monotonic()
        self.started = 0.0
        self.first = 0.0

    def finish(self, reason: FinishReason) -> None:
        now = time.monotonic()
        rest, calls = self.output.finish()
        if rest:
            self.events.put(Chunk(rest))
        if calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        first = self.first or now
        usage = Usage(
            len(self.prompt), self.produced, self.cached,
            queue_s=self.started - self.submitted, prefill_s=first - self.started, decode_s=now - first,
        )  # fmt: skip
        self.events.put(Finished(reason, usage, calls))
        self.ended.set()
        self.sampler.close()

    def fail(self, error: AIAssistantError) -> None:
        self.sampler.close()
        self.events.put(error)
        self.ended.set()


class Slot:
    """One sequence of the context: what its cache holds, and the task that uses it."""

    __slots__ = ("cells", "goal", "id", "leader", "length", "reach", "task", "used")

    def __init__(self, number: int, context: int) -> None:
        self.id = number
        self.cells: Tokens = np.zeros(context, dtype=np.int32)
        self.length = 0
        """Tokens in the cache; those of a task's prompt first."""
        self.task: Task | None = None
        self.leader: Task | None = None
        """Who reads the beginning of this prompt right now; until then this one waits."""
        self.goal = 0
        """How much of it."""
        self.reach = 0
        """Tokens to guess ahead next time."""
        self.used = 0.0

    def common(self, prompt: Tokens) -> int:
        """Length of the prefix that the cache and `prompt` share."""
        return common(self.cells[: self.length], prompt)


def common(one: Tokens, other: Tokens) -> int:
    """Length of the prefix that two rows of tokens share."""
    count = min(len(one), len(other))
    # Most pairs differ at once, and then the whole need not be looked at.
    if count > 64 and not np.array_equal(one[:16], other[:16]):
        count = 16
    different = np.flatnonzero(one[:count] != other[:count])
    return int(different[0]) if len(different) else count
