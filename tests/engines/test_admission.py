"""Who is served next, how prompts share a step, and when somebody who waits may begin."""

from __future__ import annotations

import random

from ai_assistant.engines.admission import OVERTAKING, Line, expected_starts
from ai_assistant.engines.shares import shares, step_room
from ai_assistant.engines.task import Task
from tests.support import fake_context


def _task(priority: str) -> Task:
    return fake_context.task([1], priority=priority)


def test_interactive_goes_first_and_within_one_first_come() -> None:
    line = Line()
    tasks = [_task("batch"), _task("interactive"), _task("batch"), _task("interactive")]
    for each in tasks:
        line.add(each)
    order = [tasks[1], tasks[3], tasks[0], tasks[2]]
    assert list(line) == order
    assert [line.next() for _ in tasks] == order
    assert len(line) == 0


def test_batch_is_not_starved() -> None:
    line = Line()
    batch = _task("batch")
    line.add(batch)
    served: list[Task] = []
    for _ in range(OVERTAKING + 1):
        line.add(_task("interactive"))
        line.add(_task("interactive"))
        served.append(line.next())
    assert served.index(batch) == OVERTAKING


def test_the_foretold_order_is_the_order() -> None:
    rng = random.Random(1)
    line = Line()
    for _ in range(200):
        for _ in range(rng.randrange(3)):
            line.add(_task(rng.choice(["batch", "interactive"])))
        expected = list(line)
        if expected:
            assert line.next() is expected[0]
    expected = list(line)
    assert [line.next() for _ in expected] == expected


def test_the_cancelled_leave_the_line() -> None:
    line = Line()
    tasks = [_task(kind) for kind in ("batch", "interactive", "batch")]
    for each in tasks:
        line.add(each)
    assert line.take_cancelled() == []
    tasks[0].cancelled = tasks[1].cancelled = True
    assert line.any_cancelled
    assert set(line.take_cancelled()) == set(tasks[:2])
    assert line.clear() == tasks[2:]
    assert len(line) == 0


def test_shares_of_a_step() -> None:
    assert shares([10, 500, 500], 508) == [10, 249, 249]
    assert shares([500, 500, 500], 100) == [33, 33, 34]
    assert shares([1, 1], 100) == [1, 1]
    assert shares([], 100) == []
    assert shares([5, 5, 5], 2) == [0, 1, 1]
    rng = random.Random(2)
    for _ in range(300):
        wanted, room = [rng.randrange(1, 600) for _ in range(rng.randrange(1, 9))], rng.randrange(600)
        given = shares(wanted, room)
        assert sum(given) == min(room, sum(wanted))
        assert all(0 <= part <= want for part, want in zip(given, wanted, strict=True))
        # Who gets less than another, by more than one, got all that it wanted.
        assert all(part >= max(given) - 1 or part == want for part, want in zip(given, wanted, strict=True))


def test_when_those_who_wait_may_begin() -> None:
    assert expected_starts([5.0, 2.0], [10.0, 1.0, 1.0]) == [2.0, 5.0, 6.0]
    assert expected_starts([0.0], []) == []


def test_reading_takes_no_longer_than_others_can_wait() -> None:
    assert step_room(512, 0, 0.0) == 512
    assert step_room(512, 4, 0.0) == 508
    assert step_room(512, 4, 200.0) == 60
    assert step_room(512, 0, 200.0) == 200
    assert step_room(512, 4, 1.0) == 32
    assert step_room(512, 0, 1.0) == 128
    assert step_room(8, 8, 1.0) == 0
