from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from ai_assistant.daemon import jobs as module
from ai_assistant.daemon.jobs import Job, JobState, JobTable
from ai_assistant.errors import Busy, InternalError, NoSpace, NoSuchJob


async def finish(job: Job) -> Mapping[str, Any]:
    job.report(0.5, "half")
    return {"name": "x"}


async def forever(job: Job) -> Mapping[str, Any]:
    await asyncio.sleep(3600)
    return {}


async def test_a_job_that_succeeds() -> None:
    seen: list[tuple[str, float]] = []
    table = JobTable(changed=lambda job: seen.append((str(job.state), job.progress)))
    job = table.start("import", ":1.1", 0, finish)
    await job.wait()
    await asyncio.sleep(0)
    assert (job.state, job.progress, job.message, job.result) == (JobState.DONE, 1.0, "half", {"name": "x"})
    assert ("running", 0.5) in seen
    assert seen[-1] == ("done", 1.0)
    assert table.get(job.number) is job


async def test_failures_keep_their_name() -> None:
    async def full(job: Job) -> Mapping[str, Any]:
        raise NoSpace("full")

    async def broken(job: Job) -> Mapping[str, Any]:
        raise ZeroDivisionError

    table = JobTable()
    job = table.start("import", "", 0, full)
    with pytest.raises(NoSpace):
        await job.wait()
    assert job.state is JobState.FAILED
    job = table.start("import", "", 0, broken)
    with pytest.raises(InternalError) as caught:
        await job.wait()
    assert "ZeroDivision" not in caught.value.message


@pytest.mark.parametrize("started", [False, True])
async def test_cancelling(started: bool) -> None:
    table = JobTable()
    job = table.start("load", "", 0, forever)
    if started:
        await asyncio.sleep(0)
    job.cancel()
    assert job.task is not None
    await asyncio.wait([job.task])
    await asyncio.sleep(0)
    assert job.state is JobState.CANCELLED
    assert job.error is not None
    assert job.error.name == "Cancelled"
    job.cancel()


async def test_unfinished_jobs_of_one_caller_are_limited() -> None:
    table = JobTable(per_owner=2)
    made = [table.start("load", ":1.1", 0, forever) for _ in range(2)]
    with pytest.raises(Busy):
        # A second connection of the same user is the same user.
        table.start("load", ":1.2", 0, forever)
    table.start("load", ":1.3", 1000, forever)
    made[0].cancel()
    await asyncio.sleep(0.01)
    table.start("load", ":1.1", 0, forever)
    await table.close()


async def test_ended_jobs_go_after_a_while() -> None:
    removed: list[int] = []
    table = JobTable(removed=lambda job: removed.append(job.number), keep_s=0.05)
    job = table.start("load", "", 0, finish)
    await job.wait()
    await asyncio.sleep(0.1)
    assert removed == [job.number]
    with pytest.raises(NoSuchJob):
        table.get(job.number)


async def test_only_so_many_ended_jobs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_COUNT", 3)
    removed: list[int] = []
    table = JobTable(removed=lambda job: removed.append(job.number))
    for _ in range(5):
        await table.start("load", "", 0, finish).wait()
        await asyncio.sleep(0)
    assert removed == [1, 2]
    await table.close()


async def test_progress_stays_in_range() -> None:
    table = JobTable()
    job = table.start("load", "", 0, forever)
    job.report(7.0)
    assert job.progress == 1.0
    job.report(-1.0)
    assert job.progress == 0.0
    await table.close()
