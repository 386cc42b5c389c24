"""States put aside: budgets, order, and a disk that fails."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.spill import Extents, SpillStore


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        yield opened.fileno()


@pytest.fixture
def make() -> Iterator[Callable[..., SpillStore]]:
    made: list[SpillStore] = []

    def store(*arguments: int) -> SpillStore:
        made.append(SpillStore(*arguments))
        return made[-1]

    yield store
    for each in made:
        each.close()


def _row(number: int, length: int = 50) -> Tokens:
    return np.arange(number * 1000, number * 1000 + length, dtype=np.int32)


def _state(number: int, size: int = 1000) -> bytearray:
    return bytearray(random.Random(number).randbytes(size))


def _held(store: SpillStore, number: int) -> bytearray | None:
    key, length = store.find(_row(number), whole=False)
    return None if key is None or length < 50 else store.get(key)


def test_memory_keeps_what_was_used_last(make: Callable[..., SpillStore]) -> None:
    store = make(3000)
    for number in range(3):
        store.put(_row(number), _state(number))
    assert _held(store, 0) == _state(0)
    store.put(_row(3), _state(3))
    assert [_held(store, number) is not None for number in range(4)] == [True, False, True, True]
    assert store.size_bytes == 3000
    store.put(_row(9), _state(9, 3001))
    assert _held(store, 9) is None
    assert len(store) == 3


def test_then_the_file_has_it(make: Callable[..., SpillStore], file: int) -> None:
    store = make(2000, 5000, file)
    for number in range(12):
        store.put(_row(number), _state(number))
        store.settle()
    assert [number for number in range(12) if _held(store, number) == _state(number)] == list(range(5, 12))
    assert os.fstat(file).st_size <= 5000
    assert store.size_bytes == 7000


def test_without_memory_everything_goes_to_the_file(make: Callable[..., SpillStore], file: int) -> None:
    store = make(0, 100_000, file)
    assert store.enabled
    for number in range(10):
        store.put(_row(number), _state(number, 5000 + number))
        store.settle()
    assert all(_held(store, number) == _state(number, 5000 + number) for number in range(10))
    assert store._in_memory == 0


def test_clearing_memory_keeps_what_the_file_takes(make: Callable[..., SpillStore], file: int) -> None:
    store = make(10_000, 2500, file)
    for number in range(4):
        store.put(_row(number), _state(number))
    store.clear_memory()
    assert store._in_memory == 0
    assert sum(_held(store, number) == _state(number) for number in range(4)) == 2
    plain = make(10_000)
    plain.put(_row(1), _state(1))
    plain.clear_memory()
    assert plain.size_bytes == len(plain) == 0


def test_a_longer_state_replaces_the_one_it_continues(make: Callable[..., SpillStore]) -> None:
    store = make(10_000)
    store.put(_row(1, 50), _state(1))
    store.put(_row(1, 70), _state(2))
    assert len(store) == 1
    assert store.covers(_row(1, 60))
    assert not store.covers(_row(1, 80))
    store.put(_row(1, 70), _state(3))
    assert len(store) == 1
    assert store.size_bytes == 1000
    key, length = store.find(_row(1, 100), whole=True)
    assert length == 70
    assert key is not None
    assert store.length(key) == 70
    assert store.get(key) == _state(3)
    store.drop(key)
    assert store.get(key) is None
    assert store.length(key) == 0
    assert store.find(_row(1), whole=False) == (None, 0)


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO, None])
def test_a_failing_disk_costs_only_the_states(
    make: Callable[..., SpillStore], file: int, monkeypatch: pytest.MonkeyPatch, failure: int | None
) -> None:
    def broken(_fd: int, data: memoryview, _offset: int) -> int:
        if failure is None:
            return 0  # a write that takes nothing
        raise OSError(failure, os.strerror(failure))

    store = make(1000, 50_000, file)
    monkeypatch.setattr(os, "pwrite", broken)
    for number in range(6):
        store.put(_row(number), _state(number))
        store.settle()
    assert [number for number in range(6) if _held(store, number)] == [5]
    assert not store.on_disk
    assert store._space.free == 50_000
    assert store.size_bytes == 1000


def test_short_writes_are_continued_and_a_short_read_loses_one(
    make: Callable[..., SpillStore], file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    store = make(0, 50_000, file)
    for number in range(2):
        store.put(_row(number), _state(number))
        store.settle()
    assert _held(store, 0) == _state(0)
    os.ftruncate(file, 1500)
    assert _held(store, 1) is None
    assert len(store) == 1
    assert _held(store, 0) == _state(0)


def test_a_file_that_is_no_file(make: Callable[..., SpillStore]) -> None:
    reading, writing = os.pipe()
    store = make(0, 50_000, writing)
    for number in range(5):
        store.put(_row(number), _state(number))
        store.settle()
    assert len(store) == 0
    os.close(reading)
    os.close(writing)


def test_closing_twice_and_using_it_afterwards(make: Callable[..., SpillStore], file: int) -> None:
    store = make(0, 50_000, file)
    store.put(_row(1), _state(1))
    store.close()
    store.close()
    store.put(_row(2), _state(2))
    assert len(store) == 0
    os.fstat(file)  # The descriptor is the caller's.


def test_extents_are_joined_and_never_overlap() -> None:
    rng = random.Random(3)
    space = Extents(1000)
    taken: dict[int, int] = {}
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            offset = rng.choice(list(taken))
            space.give(offset, taken.pop(offset))
        else:
            size = rng.randrange(1, 300)
            found = space.take(size)
            if found is not None:
                assert found + size <= 1000
                assert all(found >= at + each or found + size <= at for at, each in taken.items())
                taken[found] = size
        assert space.free == 1000 - sum(taken.values())
    for offset, size in taken.items():
        space.give(offset, size)
    assert space.take(1000) == 0
    assert space.take(1) is None
