"""Prefixes: the radix tree against a plain search, and which sequence a prompt gets."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.placement import best_source, leader_of, pick, usable
from ai_assistant.engines.prefix import PrefixIndex
from ai_assistant.engines.task import Slot, common
from tests.support import fake_context


def _row(*tokens: int) -> Tokens:
    return np.array(tokens, dtype=np.int32)


@pytest.mark.parametrize("seed", range(6))
def test_the_tree_finds_what_a_plain_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    index, rows = PrefixIndex(), dict[int, Tokens]()
    for key in range(300):
        if rows and rng.random() < 0.4:
            gone = rng.choice(list(rows))
            index.remove(gone)
            del rows[gone]
        former = rng.choice([*rows.values(), _row(1)])
        row = _row(*former[: rng.randrange(len(former) + 1)], *(rng.randrange(2) for _ in range(rng.randrange(1, 9))))
        same = index.insert(key, row)
        assert same == next((each for each, other in rows.items() if np.array_equal(other, row)), None)
        rows.pop(-1 if same is None else same, None)
        rows[key] = row
        assert len(index) == len(rows)
        prompt = _row(*(rng.randrange(2) for _ in range(rng.randrange(12))))
        found, length = index.longest(prompt)
        assert length == max(common(each, prompt) for each in rows.values())
        assert (found is None) == (length == 0)
        if found is not None:
            assert common(rows[found], prompt) == length
        found, length = index.whole(prompt)
        fitting = [len(each) for each in rows.values() if common(each, prompt) == len(each)]
        assert length == max(fitting, default=0)
        if found is not None:
            assert len(rows[found]) == length
    for key in list(rows):
        index.remove(key)
    index.remove(12345)
    assert index.longest(_row(0, 1)) == (None, 0)
    assert not index._root.children


def test_a_common_prefix() -> None:
    long = np.arange(1000, dtype=np.int32)
    other = long.copy()
    other[777] = -1
    assert common(long, other) == 777
    assert common(long, long[:400]) == 400
    assert common(long, long[1:]) == 0
    assert common(long[:0], long) == 0
    other[3] = -1
    assert common(long, other) == 3


def _slot(number: int, *tokens: int, used: float = 0.0) -> Slot:
    slot = Slot(number, 512)
    slot.cells[: len(tokens)] = tokens
    slot.length = len(tokens)
    slot.used = used
    return slot


def test_one_token_is_left_to_be_read() -> None:
    assert usable(_slot(0, 1, 2, 3), _row(1, 2, 3), whole=False) == 2
    assert usable(_slot(0, 1, 2, 3), _row(1, 2, 9, 9), whole=False) == 2
    assert usable(_slot(0, 1, 2, 3), _row(1, 2, 3, 9), whole=True) == 3
    assert usable(_slot(0, 1, 2, 3), _row(1, 2, 9, 9), whole=True) == 0
    assert usable(_slot(0, 1, 2, 3), _row(1, 2, 3), whole=True) == 0


def test_a_conversation_goes_on_where_it_was() -> None:
    slots = [_slot(0), _slot(1, *range(40)), _slot(2, *range(100, 140))]
    assert pick(slots, _row(*range(100, 150)), whole=False).id == 2


def test_a_short_shared_beginning_costs_nobody_a_conversation() -> None:
    slots = [_slot(0, *range(200), used=9), _slot(1, 7, used=1)]
    prompt = _row(*range(50), 300, 301)
    target = pick(slots, prompt, whole=False)
    assert target.id == 1
    source = best_source(slots, target, prompt, whole=False)
    assert (source.slot, source.tokens) == (slots[0], 50)
    assert best_source(slots, target, prompt, whole=True).slot is None


def test_a_turn_taken_again_stays_where_it_was_once_all_slots_are_used() -> None:
    slots = [_slot(0, *range(200), used=9), _slot(1, 7, used=1)]
    prompt = _row(*range(130), 300, 301)
    assert pick(slots, prompt, whole=False).id == 0
    assert pick([*slots, _slot(2)], prompt, whole=False).id == 2
    assert pick([*slots, _slot(2)], _row(*range(190), 300), whole=False).id == 0


def test_an_empty_slot_goes_before_the_one_idle_longest() -> None:
    slots = [_slot(0, 1, 2, used=5), _slot(1, 3, 4, used=1), _slot(2, used=9)]
    assert pick(slots, _row(8, 8), whole=False).id == 2
    assert pick(slots[:2], _row(8, 8), whole=False).id == 1
    slots[1].task = fake_context.task([1])
    assert pick(slots, _row(8, 8), whole=False).id == 2


def test_only_who_came_first_and_still_reads_leads() -> None:
    prompt = list(range(100))
    first, second = fake_context.task(prompt), fake_context.task([*prompt[:80], 999])
    first.order, second.order = 1, 2
    slots = [_slot(0), _slot(1)]
    slots[0].task, slots[1].task = first, second
    leader = leader_of(slots, second)
    assert leader is not None
    assert (leader.task, leader.tokens) == (first, 80)
    assert leader_of(slots, first) is None
    first.priority = "batch"
    assert leader_of(slots, second) is None
    first.priority, first.last_token = "interactive", 5
    assert leader_of(slots, second) is None
