"""The scheduler over a context without a model: whatever is shared, copied, put aside or guessed, answers stay."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from ai_assistant.engines.contract import Chunk, Finished, FinishReason, Queued
from ai_assistant.engines.scheduler import Scheduler
from ai_assistant.engines.speculation import Lookup, Speculation
from ai_assistant.engines.spill import SpillStore
from ai_assistant.engines.task import Task
from ai_assistant.errors import AIAssistantError, Cancelled, InternalError, InvalidModel, OutOfMemory
from tests.support import fake_context
from tests.support.fake_context import FakeContext, following, text

Make = Callable[..., Scheduler]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Scheduler] = []

    def start(context: FakeContext, **options: Any) -> Scheduler:
        made.append(fake_context.scheduler(context, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


def _events(task: Task) -> list[Any]:
    events: list[Any] = []
    while True:
        event = task.events.get(timeout=30)
        if isinstance(event, AIAssistantError):
            raise event
        events.append(event)
        if isinstance(event, Finished):
            return events


def _answer(task: Task) -> tuple[str, Finished]:
    events = _events(task)
    return "".join(each.text for each in events if isinstance(each, Chunk)), events[-1]


def _prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(fake_context.VOCABULARY) for _ in range(length)]


class _Gate:
    """Holds the engine's thread before a decode, so that a test decides what is there at which step."""

    def __init__(self, context: FakeContext) -> None:
        self._allowed = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._context = context
        context.before_decode = self._before

    def _before(self) -> None:
        self._arrived.release()
        assert self._allowed.acquire(timeout=30)

    def arrive(self) -> None:
        """Wait until a batch is made."""
        assert self._arrived.acquire(timeout=30)

    def step(self) -> None:
        """Let it be decoded, and wait for the next."""
        self._allowed.release()
        self.arrive()

    def open(self) -> None:
        self._context.before_decode = lambda: None
        self._allowed.release()


def test_an_answer(make: Make) -> None:
    scheduler = make(FakeContext())
    prompt = _prompt(1, 150)
    task = fake_context.task(prompt, 20)
    scheduler.submit(task)
    answer, last = _answer(task)
    assert answer == text(following(prompt, 20))
    assert last.reason is FinishReason.LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (150, 20, 0)
    assert task.sampler.closed  # type: ignore[attr-defined]


def test_ends_and_stops(make: Make) -> None:
    prompt = _prompt(2, 30)
    row = following(prompt, 40)
    end = row[10]
    scheduler = make(FakeContext(), vocabulary=fake_context.Letters(end))
    first = row.index(end)
    for options, expected, reason in (
        ({}, row[:first], FinishReason.STOP),
        ({"ignore_end": True}, row, FinishReason.LENGTH),
        ({"stops": (text(row[3:5]),)}, row[:3], FinishReason.STOP),
    ):
        task = fake_context.task(prompt, 40, **options)
        scheduler.submit(task)
        answer, last = _answer(task)
        assert answer == text(expected)
        assert last.reason is reason


def test_a_step_has_every_writer_and_equal_parts_of_the_prompts(make: Make) -> None:
    context = FakeContext(4)
    gate = _Gate(context)
    scheduler = make(context, batch_tokens=32)
    writer = fake_context.task(_prompt(1, 5), 100)
    scheduler.submit(writer)
    gate.arrive()
    others = [fake_context.task(_prompt(number, 60 if number < 4 else 8), 3) for number in (2, 3, 4)]
    for each in others:
        scheduler.submit(each)
    gate.step()
    gate.step()
    parts = dict(context.batches[1])
    sizes = sorted(parts.values())
    assert sum(sizes) == 32
    assert sizes == [1, 8, 11, 12]
    writer.cancelled = True
    gate.open()
    for each in others:
        assert _answer(each)[0] == text(following(each.prompt.tolist(), 3))


def test_batch_prompts_leave_room_but_go_on(make: Make) -> None:
    context = FakeContext(2)
    gate = _Gate(context)
    scheduler = make(context, batch_tokens=32)
    patient = fake_context.task(_prompt(1, 200), 1, priority="batch")
    scheduler.submit(patient)
    gate.arrive()
    quick = fake_context.task(_prompt(2, 100), 1)
    scheduler.submit(quick)
    gate.step()
    gate.step()
    assert sorted(count for _, count in context.batches[1]) == [4, 28]
    gate.open()
    for each in (quick, patient):
        _answer(each)


def test_a_long_prompt_takes_no_longer_steps_than_others_can_wait(make: Make) -> None:
    context = FakeContext(2)
    context.before_decode = lambda: time.sleep(0.02)
    scheduler = make(context, batch_tokens=512, context_length=4096)
    scheduler._reading.add(1000, 10.0)
    task = fake_context.task(_prompt(1, 1000), 1)
    scheduler.submit(task)
    _answer(task)
    # 100 tokens per second and a second per step, but never fewer than reading is efficient with.
    assert context.batches[0] == [(0, 128)]


def test_a_shared_beginning_is_copied_and_its_conversation_kept(make: Make) -> None:
    context = FakeContext(3)
    scheduler = make(context)
    head = _prompt(1, 100)
    long = head + _prompt(2, 200)
    for prompt, cached in ((long, 0), (head + _prompt(3, 20), 100), ([*long, 1, 2], 300)):
        task = fake_context.task(prompt, 5)
        scheduler.submit(task)
        answer, last = _answer(task)
        assert answer == text(following(prompt, 5))
        assert last.usage.cached_tokens == cached
    assert context.copies == 1
    stats = scheduler.stats()
    assert (stats.prefix_hits, stats.prefix_tokens) == (2, 400)


def test_what_is_being_read_is_not_read_again(make: Make) -> None:
    context = FakeContext(4)
    gate = _Gate(context)
    scheduler = make(context)
    head = _prompt(1, 300)
    prompts = [[*head, number] for number in range(4)]
    tasks = [fake_context.task(each, 6) for each in prompts]
    scheduler.submit(tasks[0])
    gate.arrive()
    for each in tasks[1:]:
        scheduler.submit(each)
    gate.open()
    answers = [_answer(each) for each in tasks]
    assert [answer for answer, _ in answers] == [text(following(each, 6)) for each in prompts]
    assert [last.usage.cached_tokens for _, last in answers] == [0, 300, 300, 300]
    assert context.copies == 3
    assert context.read <= 301 + 3 + 4 * 6


def test_when_the_reader_goes_the_next_one_reads(make: Make) -> None:
    context = FakeContext(4)
    gate = _Gate(context)
    scheduler = make(context)
    head = _prompt(1, 300)
    prompts = [[*head, number] for number in range(4)]
    tasks = [fake_context.task(each, 6) for each in prompts]
    for each in tasks:
        scheduler.submit(each)
    gate.arrive()
    gate.step()
    tasks[0].cancelled = True
    gate.step()
    gate.open()
    with pytest.raises(Cancelled):
        _answer(tasks[0])
    for task, prompt in zip(tasks[1:], prompts[1:], strict=True):
        assert _answer(task)[0] == text(following(prompt, 6))
    # What it had read is not read again.
    assert context.read <= 301 + 3 * (1 + 6) + 64


def test_cancelling_takes_effect_before_the_next_step(make: Make) -> None:
    context = FakeContext(1)
    gate = _Gate(context)
    scheduler = make(context)
    running, waiting = fake_context.task(_prompt(1, 500), 5), fake_context.task(_prompt(2, 5), 5)
    scheduler.submit(running)
    scheduler.submit(waiting)
    gate.arrive()
    running.cancelled = True
    gate.step()
    # The next batch is made, and it is the other's.
    with pytest.raises(Cancelled):
        _answer(running)
    gate.open()
    assert _answer(waiting)[0] == text(following(_prompt(2, 5), 5))
    assert context.batches[1] == [(0, 5)]


def test_interactive_before_batch(make: Make) -> None:
    context = FakeContext(1)
    gate = _Gate(context)
    scheduler = make(context)
    first = fake_context.task(_prompt(0, 5), 2)
    scheduler.submit(first)
    gate.arrive()
    tasks = [fake_context.task(_prompt(number, 5), 2, priority=kind)
             for number, kind in enumerate(("batch", "interactive", "batch", "interactive"), 1)]  # fmt: skip
    for each in tasks:
        scheduler.submit(each)
    gate.open()
    for each in (first, *tasks):
        _answer(each)
    order = sorted(tasks, key=lambda each: each.order)
    assert order == [tasks[1], tasks[3], tasks[0], tasks[2]]


def test_those_who_wait_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_assistant.engines.scheduler._TELL_S", 0.0)
    context = FakeContext(1)
    gate = _Gate(context)
    scheduler = make(context)
    tasks = [fake_context.task(_prompt(number, 20), 4) for number in range(3)]
    for each in tasks[:1]:
        scheduler.submit(each)
    gate.arrive()
    for each in tasks[1:]:
        scheduler.submit(each)
    gate.open()
    events = [_events(each) for each in tasks]
    told = [[each for each in row if isinstance(each, Queued)] for row in events]
    assert told[0] == []
    assert [each.position for each in told[1]] == [0]
    assert [each.position for each in told[2]] == [1, 0]
    # Nothing had been measured at first; then somebody ended.
    assert told[2][1].eta_s is not None
    assert told[2][1].eta_s >= 0
    assert all(isinstance(each, Queued) for each in events[2][:2])


def test_nobody_is_told_more_than_once_a_second(make: Make) -> None:
    context = FakeContext(1)
    scheduler = make(context)
    tasks = [fake_context.task(_prompt(number, 20), 4) for number in range(20)]
    for each in tasks:
        scheduler.submit(each)
    start = time.monotonic()
    for each in tasks:
        told = [event for event in _events(each) if isinstance(event, Queued)]
        assert len(told) <= 1 + (time.monotonic() - start)


def test_an_idle_conversation_comes_back(make: Make) -> None:
    context = FakeContext(1)
    scheduler = make(context, spill=SpillStore(1 << 20))
    prompts = [_prompt(number, 120) for number in range(3)]
    for prompt in prompts:
        task = fake_context.task(prompt, 5)
        scheduler.submit(task)
        _answer(task)
    for prompt in prompts:
        longer = prompt + following(prompt, 5) + [3, 4]
        task = fake_context.task(longer, 5)
        scheduler.submit(task)
        answer, last = _answer(task)
        assert answer == text(following(longer, 5))
        # The last token of the answer was never decoded.
        assert last.usage.cached_tokens == 124
    stats = scheduler.stats()
    assert stats.restored == 3
    assert stats.spilled_bytes > 0


@pytest.mark.parametrize("failure", ["fail_save", "fail_restore"])
def test_a_state_that_fails_is_read_again(make: Make, failure: str) -> None:
    context = FakeContext(1)
    scheduler = make(context, spill=SpillStore(1 << 20))
    setattr(context, failure, True)
    for number in (1, 2, 1, 2):
        task = fake_context.task(_prompt(number, 120), 5)
        scheduler.submit(task)
        assert _answer(task)[0] == text(following(_prompt(number, 120), 5))
    assert scheduler.stats().restored == 0


def test_trimming_an_idle_engine_frees_its_context_and_the_next_request_makes_it_again(make: Make) -> None:
    context = FakeContext(2)
    scheduler = make(context)
    prompt = _prompt(1, 100)
    for _ in range(2):
        task = fake_context.task(prompt, 5)
        scheduler.submit(task)
        answer, last = _answer(task)
        assert answer == text(following(prompt, 5))
        assert last.usage.cached_tokens == 0
        assert scheduler.trim() >= 0
        assert not context.is_open
        assert scheduler.stats().kv_used == 0
    context.fail_open = True
    task = fake_context.task(prompt, 5)
    scheduler.submit(task)
    with pytest.raises(OutOfMemory):
        _answer(task)
    context.fail_open = False
    task = fake_context.task(prompt, 5)
    scheduler.submit(task)
    assert _answer(task)[0] == text(following(prompt, 5))


def test_trimming_leaves_what_runs_alone(make: Make) -> None:
    context = FakeContext(1)
    gate = _Gate(context)
    scheduler = make(context, spill=SpillStore(1 << 20))
    task = fake_context.task(_prompt(1, 100), 5)
    scheduler.submit(task)
    gate.arrive()
    trimmed = threading.Thread(target=scheduler.trim)
    trimmed.start()
    gate.open()
    trimmed.join(30)
    assert _answer(task)[0] == text(following(_prompt(1, 100), 5))


def test_states_survive_trimming_in_the_file(make: Make, tmp_path: Any) -> None:
    with (tmp_path / "spill").open("w+b") as file:
        context = FakeContext(2)
        scheduler = make(context, spill=SpillStore(0, 1 << 20, file.fileno()))
        prompt = _prompt(1, 200)
        task = fake_context.task(prompt, 5)
        scheduler.submit(task)
        _answer(task)
        scheduler.trim()
        task = fake_context.task([*prompt, 9], 5)
        scheduler.submit(task)
        answer, last = _answer(task)
        assert answer == text(following([*prompt, 9], 5))
        assert last.usage.cached_tokens == 200
        assert scheduler.stats().restored == 1


def test_a_recurrent_state_is_only_continued(make: Make) -> None:
    context = FakeContext(2, whole=True)
    scheduler = make(context, spill=SpillStore(1 << 20))
    prompt = _prompt(1, 100)
    whole = prompt + following(prompt, 5)
    for each, cached in ((prompt, 0), ([*prompt[:60], 1, 2], 0), ([*whole, 1], 104)):
        task = fake_context.task(each, 5)
        scheduler.submit(task)
        answer, last = _answer(task)
        assert answer == text(following(each, 5))
        assert last.usage.cached_tokens == cached


def _periodic(tokens: Sequence[int]) -> int:
    """Repeats itself, with a slip now and then."""
    return (tokens[-7] + (len(tokens) % 23 == 0)) % fake_context.VOCABULARY


@pytest.mark.parametrize("count", [1, 3])
def test_guessed_tokens_change_nothing(make: Make, count: int) -> None:
    context = FakeContext(count, model=_periodic)
    speculation = Speculation(Lookup(), measured=False, most=32)
    scheduler = make(context, speculation=speculation)
    prompts = [[*_prompt(number, 20 + number)] for number in range(count)]
    tasks = [fake_context.task(each, 150 + number) for number, each in enumerate(prompts)]
    for each in tasks:
        scheduler.submit(each)
    for number, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        answer, last = _answer(task)
        assert answer == text(following(prompt, 150 + number, _periodic))
        assert last.usage.completion_tokens == 150 + number
    stats = scheduler.stats()
    assert stats.draft_tokens > stats.draft_accepted > 0
    if count == 1:
        assert len(context.batches) < 100
    # And what is in the caches is what they are said to hold.
    for slot in scheduler._slots:
        assert slot.cells[: slot.length].tolist() == context.rows[slot.id]


class _Dice(fake_context.Greedy):
    """Draws its choices: as one more draw, or one fewer, changes all that follow, so does one guess too many."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, logits: np.ndarray[Any, np.dtype[np.float32]], scratch: object) -> int:
        likeliest = super().choose(logits, scratch)
        return likeliest if self._rng.random() < 0.8 else self._rng.randrange(fake_context.VOCABULARY)


def test_guesses_do_not_touch_the_dice(make: Make) -> None:
    for seed in range(5):
        answers: list[str] = []
        for guessing in (False, True):
            context = FakeContext(1, model=_periodic)
            speculation = Speculation(Lookup(), measured=False, most=8) if guessing else None
            scheduler = make(context, speculation=speculation)
            task = fake_context.task(_prompt(3, 30), 200)
            task.sampler = _Dice(seed)  # type: ignore[assignment]
            scheduler.submit(task)
            answers.append(_answer(task)[0])
            assert (scheduler.stats().draft_accepted > 0) is guessing
        assert answers[0] == answers[1]


def test_guesses_end_where_the_answer_ends(make: Make) -> None:
    prompt = [5, 6, 7, 8, 9, 10, 11]
    row = following(prompt, 60, _periodic)
    for stops in ((text(row[30:32]),), ()):
        context = FakeContext(1, model=_periodic)
        scheduler = make(context, speculation=Speculation(Lookup(), measured=False, most=8), context_length=64)
        task = fake_context.task(prompt, 57, stops)
        scheduler.submit(task)
        answer, last = _answer(task)
        expected = text(row[:57])
        assert answer == (expected[: expected.index(stops[0])] if stops else expected)
        assert last.usage.completion_tokens <= 57
        slot = scheduler._slots[0]
        assert slot.cells[: slot.length].tolist() == context.rows[0]


def test_a_failed_decode_costs_the_batch_only(make: Make) -> None:
    context = FakeContext(2)
    scheduler = make(context)
    context.fail_decode = 1
    task = fake_context.task(_prompt(1, 30), 5)
    scheduler.submit(task)
    with pytest.raises(InvalidModel):
        _answer(task)
    task = fake_context.task(_prompt(1, 30), 5)
    scheduler.submit(task)
    assert _answer(task)[0] == text(following(_prompt(1, 30), 5))


def test_what_breaks_the_thread_reaches_everybody(make: Make) -> None:
    context = FakeContext(1)
    scheduler = make(context)

    def fail() -> None:
        raise RuntimeError("nonsense")

    context.before_decode = fail
    tasks = [fake_context.task(_prompt(number, 30), 5) for number in range(3)]
    accepted = 0
    for each in tasks:
        try:
            scheduler.submit(each)
            accepted += 1
        except InternalError:
            pass
    for each in tasks[:accepted]:
        with pytest.raises(InternalError, match="nonsense"):
            _answer(each)
    assert scheduler.broken
    assert scheduler.trim() == 0


@pytest.mark.parametrize("seed", range(6))
def test_anything_at_once(make: Make, seed: int, tmp_path: Any) -> None:
    """Shared beginnings, priorities, cancellations, trims, spilling and guessing, all together."""
    rng = random.Random(seed)
    model = _periodic if seed % 2 else fake_context.next_token
    with (tmp_path / "spill").open("w+b") as file:
        context = FakeContext(4, model=model)
        scheduler = make(
            context, batch_tokens=48, context_length=300,
            spill=SpillStore(rng.choice((0, 3000)), rng.choice((0, 20_000)), file.fileno()),
            speculation=Speculation(Lookup(), measured=bool(seed % 3), most=16),
        )  # fmt: skip
        heads = [_prompt(1000 + number, rng.randrange(8, 150)) for number in range(4)]
        done: list[tuple[Task, list[int], bool]] = []
        for number in range(64):
            prompt = [*rng.choice(heads), *_prompt(number, rng.randrange(1, 80))]
            if done and rng.random() < 0.3:
                former = rng.choice(done)[1]
                prompt = (former + following(former, 5, model))[:240]
            limit = rng.randrange(1, 300 - len(prompt) + 1) if rng.random() < 0.3 else rng.randrange(1, 20)
            task = fake_context.task(prompt, limit, priority=rng.choice(("interactive", "batch")))
            scheduler.submit(task)
            done.append((task, prompt, rng.random() < 0.3))
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
            if done[-1][2]:
                rng.choice(done)[0].cancelled = True
                scheduler.wake()
            if rng.random() < 0.05:
                scheduler.trim()
        for task, prompt, _ in done:
            try:
                answer, last = _answer(task)
            except Cancelled:
                assert task.cancelled
            else:
                assert answer == text(following(prompt, task.limit, model))
                assert last.usage.completion_tokens == task.limit
            assert task.sampler.closed  # type: ignore[attr-defined]
        assert scheduler.running == 0
        assert np.all([each.task is None for each in scheduler._slots])
        scheduler.trim()
        assert not context.is_open
