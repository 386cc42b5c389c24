"""Long work: it outlives the call that started it, tells its progress, and can be cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ai_assistant.errors import AIAssistantError, Busy, Cancelled, InternalError, NoSuchJob

log = logging.getLogger(__name__)

KEEP_S = 600.0
KEEP_COUNT = 64


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


@dataclass(eq=False, slots=True)
class Job:
    """One piece of work. `created` in Unix seconds, `progress` from 0 to 1."""

    number: int
    kind: str
    owner: str
    """Bus name of the caller, for limits; empty for the daemon's own."""
    owner_uid: int
    created: int
    state: JobState = JobState.QUEUED
    progress: float = 0.0
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The message in numbers, for programs; see the method that made the job."""
    error: AIAssistantError | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    _changed: Callable[[Job], None] = lambda job: None
    task: asyncio.Task[None] | None = None

    def report(self, progress: float, message: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        """Tell how far it is (clamped to 0–1); from the event loop only."""
        self.progress = min(1.0, max(0.0, progress))
        if message is not None:
            self.message = message
        if details is not None:
            self.details = details
        self._changed(self)

    def cancel(self) -> None:
        """Ask it to stop; it is `CANCELLED` when it has cleaned up. Nothing happens after the end."""
        if self.task is not None and self.state not in ENDED:
            self.task.cancel()

    async def wait(self) -> None:
        """Until it has ended, however; raises what it failed with."""
        if self.task is not None:
            await asyncio.wait([self.task])
        if self.error is not None:
            raise self.error


class JobTable:
    """All jobs.

    Args:
        added, changed, removed: told about each job, on the event loop.
        per_owner: unfinished jobs that one user may have.
    """

    def __init__(
        self,
        *,
        added: Callable[[Job], None] = lambda job: None,
        changed: Callable[[Job], None] = lambda job: None,
        removed: Callable[[Job], None] = lambda job: None,
        per_owner: int = 16,
        keep_s: float = KEEP_S,
    ) -> None:
        self.added, self.changed, self.removed = added, changed, removed
        self._per_owner = per_owner
        self._keep_s = keep_s
        self._jobs: dict[int, Job] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._next = 1

    def start(self, kind: str, owner: str, owner_uid: int, work: Callable[[Job], Awaitable[Mapping[str, Any]]]) -> Job:
        """Start `work`, which gets the job and returns its result.

        Raises:
            Busy: the user has too many unfinished jobs.
        """
        self.check_room(owner_uid)
        job = Job(self._next, kind, owner, owner_uid, int(time.time()))
        job._changed = lambda each: self.changed(each)
        self._next += 1
        self._jobs[job.number] = job
        self.added(job)
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        # A task that is cancelled before its first step never runs its body.
        job.task.add_done_callback(lambda task: self._ended(job))
        return job

    def check_room(self, owner_uid: int) -> None:
        """Raise Busy when that user may not start another job."""
        running = sum(1 for job in self._jobs.values() if job.owner_uid == owner_uid and job.state not in ENDED)
        if running >= self._per_owner:
            raise Busy(f"you have {running} unfinished jobs", hint="wait for one of them, or cancel it")

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[Mapping[str, Any]]]) -> None:
        job.state = JobState.RUNNING
        self.changed(job)
        try:
            job.result = await work(job)
            job.progress = 1.0
            job.state = JobState.DONE
        except AIAssistantError as error:
            job.error = error
            job.state = JobState.CANCELLED if isinstance(error, Cancelled) else JobState.FAILED
        except Exception:
            log.exception("defect in a job of kind %s", job.kind)
            job.error = InternalError("internal error", hint="the journal has the details")
            job.state = JobState.FAILED

    def _ended(self, job: Job) -> None:
        if job.state not in ENDED:
            job.error = Cancelled("the job was cancelled")
            job.state = JobState.CANCELLED
        if job.error is not None and job.state is JobState.FAILED:
            log.warning("%s failed: %s", job.kind, job.error.message)
        self.changed(job)
        loop = asyncio.get_running_loop()
        self._timers[job.number] = loop.call_later(self._keep_s, self._drop, job.number)
        ended = [number for number in self._timers if number in self._jobs]
        for number in ended[: max(0, len(ended) - KEEP_COUNT)]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        timer = self._timers.pop(number, None)
        if timer is not None:
            timer.cancel()
        job = self._jobs.pop(number, None)
        if job is not None:
            self.removed(job)

    def get(self, number: int) -> Job:
        """Raises NoSuchJob."""
        try:
            return self._jobs[number]
        except KeyError:
            raise NoSuchJob(f"there is no job {number}") from None

    async def close(self) -> None:
        """Cancel everything and wait until it has cleaned up."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=10)
        for timer in self._timers.values():
            timer.cancel()
