"""Guessing: what is guessed, and whether it is still worth it. Times are given, not measured."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.draft import DraftModel
from ai_assistant.engines.memory import MOST_AHEAD, outputs_ahead
from ai_assistant.engines.speculation import (
    Gain,
    Lookup,
    Speculation,
    first_reach,
    lookup,
    next_reach,
)
from tests.support.fake_context import FakeContext, following


def _row(*tokens: int) -> Tokens:
    return np.array(tokens, dtype=np.int32)


@pytest.mark.parametrize(
    ("history", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([1, 2, 5, 7, 1, 2, 6, 7, 1, 2], 1, [6]),  # the latest
        ([8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2], 2, [5, 9]),  # but rather the longer match
        ([1, 2, 3, 1, 2], 4, [3, 1, 2, 3]),  # and so on
        ([7, 7, 7, 7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 3, 4], 4, []),
        ([5, 1, 6, 1], 4, []),  # one token alone says nothing
        ([1], 4, []),
        ([], 4, []),
    ],
)
def test_lookup(history: list[int], count: int, expected: list[int]) -> None:
    assert lookup(_row(*history), count).tolist() == expected


def test_lookup_finds_what_is_there() -> None:
    rng = random.Random(5)
    for _ in range(300):
        history = [rng.randrange(3) for _ in range(rng.randrange(40))]
        found = lookup(_row(*history), 3).tolist()
        if found:
            joined = [*history[-2:], found[0]]
            assert any(history[at : at + 3] == joined for at in range(len(history)))
        else:
            assert all(history[at : at + 2] != history[-2:] for at in range(len(history) - 2))


def test_lookup_guesses_for_all_or_none() -> None:
    speculation = Speculation(Lookup(), measured=False, most=8)
    good, bad = _row(1, 2, 3, 4, 1, 2), _row(1, 2, 3)
    assert speculation.propose([(0, good), (1, bad)], 4) is None
    rows = speculation.propose([(0, good), (1, _row(5, 6, 7, 5, 6))], 4)
    assert rows is not None
    assert [each.tolist() for each in rows] == [[3, 4, 1, 2], [7, 5, 6, 7]]
    # There are rows of logits for so many.
    rows = Speculation(Lookup(), measured=False, most=3).propose([(0, good), (1, good)], 4)
    assert rows is not None
    assert [len(each) for each in rows] == [1, 1]
    assert Speculation(Lookup(), measured=False, most=1).propose([(0, good), (1, good)], 4) is None


def test_how_far_ahead() -> None:
    assert next_reach(0, 4, 4) == MOST_AHEAD
    assert next_reach(8, 8, 0) == 4
    assert next_reach(2, 2, 0) == 2
    assert next_reach(8, 8, 3) == 5
    assert first_reach(0) == 4
    assert first_reach(2) == 2


def test_memory_for_guesses_is_bounded() -> None:
    for vocabulary in (100, 32_000, 152_000, 1 << 21):
        for sequences in (1, 4, 64):
            assert outputs_ahead(vocabulary, sequences) * vocabulary * 8 <= 32 << 20
    assert outputs_ahead(32_000, 1) == MOST_AHEAD
    assert outputs_ahead(1 << 23, 1) == 0


def _drive(gain: Gain, steps: int, tokens: float, cost: float) -> int:
    """Run steps whose guesses bring so many tokens and take so many times a plain step. Returns guessing steps."""
    guessing = 0
    for _ in range(steps):
        if gain.wanted:
            guessing += 1
            gain.guessed(tokens, cost)
        else:
            gain.plain(1.0)
    return guessing


def test_guessing_goes_on_while_it_pays() -> None:
    gain = Gain()
    assert not gain.wanted  # nothing to compare with yet
    assert _drive(gain, 1000, 2.5, 1.4) > 950
    assert gain.on


def test_guessing_that_costs_more_than_it_brings_is_tried_ever_more_rarely() -> None:
    gain = Gain()
    first = _drive(gain, 1000, 1.2, 1.6)
    assert not gain.on
    assert 8 <= first <= 40
    assert _drive(gain, 5000, 1.2, 1.6) < 2 * first


def test_guessing_stops_when_it_no_longer_pays_and_comes_back_when_it_does() -> None:
    gain = Gain()
    states: list[bool] = []
    for steps, tokens in ((200, 3.0), (40, 1.0), (300, 3.0)):
        _drive(gain, steps, tokens, 1.5)
        states.append(gain.on)
    assert states == [True, False, True]


def test_a_hair_of_gain_does_not_make_it_flap() -> None:
    gain = Gain()
    _drive(gain, 300, 1.0, 1.01)
    assert not gain.on  # 0.99: not begun for that
    gain = Gain()
    _drive(gain, 100, 2.0, 1.0)
    _drive(gain, 300, 1.0, 1.01)
    assert gain.on  # and not ended for that


def test_each_number_of_sequences_is_judged_by_itself() -> None:
    speculation = Speculation(Lookup(), measured=True, most=32)
    history = _row(*([1, 2, 3] * 5))
    for _ in range(20):
        speculation.plain(1, 1.0)
    assert speculation.propose([(0, history)], 4) is not None
    assert speculation.propose([(0, history), (1, history)], 4) is None
    speculation.guessed(1, 4, 2, 0.5)
    assert (speculation.drafted, speculation.accepted) == (4, 2)


def _next(tokens: Sequence[int]) -> int:
    return (tokens[-1] * 3 + len(tokens)) % 97


def test_a_draft_model_follows_conversations_that_change() -> None:
    context = FakeContext(2, model=_next)
    draft = DraftModel(context, context_length=200, batch_tokens=64)
    rng = random.Random(1)
    histories = [[rng.randrange(97) for _ in range(20)] for _ in range(2)]
    for _ in range(60):
        rows = draft.propose([(number, _row(*each)) for number, each in enumerate(histories)], 4)
        assert [row.tolist() for row in rows] == [following(each, 4, _next) for each in histories]
        for each, row in zip(histories, rows, strict=True):
            # Some of it is taken, and then comes something else.
            each.extend(row.tolist()[: rng.randrange(5)])
            if rng.random() < 0.3:
                del each[rng.randrange(1, len(each)) :]
            each.append(rng.randrange(97))
            del each[150:]


def test_a_draft_model_reads_a_long_history_in_pieces() -> None:
    context = FakeContext(1, model=_next)
    draft = DraftModel(context, context_length=600, batch_tokens=64)
    history = _row(*(number % 97 for number in range(300)))
    silent = 0
    while not (rows := draft.propose([(0, history)], 3)):
        silent += 1
        assert silent < 10
    assert silent == 4
    assert rows[0].tolist() == following(history.tolist(), 3, _next)
    assert max(count for batch in context.batches for _, count in batch) <= 64
    assert draft.propose([(0, _row(*range(598)))], 3) == []
    draft.trim()
    assert not context.is_open


def test_a_draft_model_that_fails_is_silent() -> None:
    context = FakeContext(1)
    freed: list[bool] = []
    draft = DraftModel(context, context_length=200, batch_tokens=64, free=lambda: freed.append(True))
    context.fail_decode = 1
    assert draft.propose([(0, _row(1, 2, 3))], 3) == []
    assert draft.propose([(0, _row(1, 2, 3))], 3) == []
    draft.close()
    draft.close()
    assert freed == [True]
    context = FakeContext(1)
    context.fail_open = True
    assert DraftModel(context, context_length=200, batch_tokens=64).propose([(0, _row(1, 2))], 3) == []
