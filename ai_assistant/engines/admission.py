"""Who waits for a sequence, in which order, and for how long yet."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

from ai_assistant.engines.contract import Priority
from ai_assistant.engines.task import Slot, Task

OVERTAKING = 4
"""Interactive tasks that go before a waiting batch task until it is its turn."""


class Line:
    """Tasks that wait: interactive before batch, within one first come, first served. Not for several threads."""

    def __init__(self) -> None:
        self._interactive: deque[Task] = deque()
        self._batch: deque[Task] = deque()
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._interactive) + len(self._batch)

    def __iter__(self) -> Iterator[Task]:
        """In the order in which they would be served if nobody else came."""
        interactive, batch, overtaken = iter(self._interactive), deque(self._batch), self._overtaken
        for task in interactive:
            if batch and overtaken >= OVERTAKING:
                yield batch.popleft()
                overtaken = 0
            yield task
            overtaken = overtaken + 1 if batch else 0
        yield from batch

    def add(self, task: Task) -> None:
        (self._batch if task.priority == Priority.BATCH else self._interactive).append(task)

    def next(self) -> Task:
        """Take the next one; there must be one."""
        if self._batch and (not self._interactive or self._overtaken >= OVERTAKING):
            self._overtaken = 0
            return self._batch.popleft()
        self._overtaken = self._overtaken + 1 if self._batch else 0
        return self._interactive.popleft()

    @property
    def any_cancelled(self) -> bool:
        return any(each.cancelled for each in self._interactive) or any(each.cancelled for each in self._batch)

    def take_cancelled(self) -> list[Task]:
        gone = [each for each in self if each.cancelled]
        for line in (self._interactive, self._batch):
            kept = [each for each in line if not each.cancelled]
            line.clear()
            line.extend(kept)
        return gone

    def clear(self) -> list[Task]:
        """Take all."""
        tasks = list(self)
        self._interactive.clear()
        self._batch.clear()
        return tasks


def expected_starts(running_s: Sequence[float], waiting_s: Sequence[float]) -> list[float]:
    """When each of those who wait gets a sequence, in seconds from now.

    Args:
        running_s: what each sequence has left to do, in seconds; 0 for a free one.
        waiting_s: what those who wait will take, in their order.
    """
    ends = list(running_s)
    heapq.heapify(ends)
    starts: list[float] = []
    for each in waiting_s:
        start = heapq.heappop(ends)
        starts.append(start)
        heapq.heappush(ends, start + each)
    return starts


def expected_seconds(
    waiting: Sequence[Task], slots: Sequence[Slot], *, reading: float, writing: float, usual: float | None
) -> list[float] | None:
    """When each of those who wait gets a slot, in seconds from now; None before anything was measured.

    Args:
        reading, writing: tokens per second, all sequences together.
        usual: tokens of an answer, of those before.
    """
    if not reading or not writing:
        return None
    each_writes = writing / max(1, sum(each.task is not None for each in slots))

    def left(task: Task, unread: int) -> float:
        # Answers rarely use what they may; those before say how much.
        limit = task.limit if usual is None or task.ignore_end else min(task.limit, max(usual, task.produced + 1))
        return unread / reading + max(0.0, limit - task.produced) / each_writes

    running = [
        0.0 if each.task is None else left(each.task, max(0, len(each.task.prompt) - each.length)) for each in slots
    ]
    return expected_starts(running, [left(each, len(each.prompt)) for each in waiting])
