"""Power cuts out of a recording: only legal states, the dangerous ones among them, the same for the same seed."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from image.vm.crash import SECTOR, History, Medium, State, crash_states
from image.vm.gpt import read_tables
from image.vm.writelog import BadLog, Entry, Flag, WriteLog, write_log
from tests.image.gpt_writer import DISK_BLOCKS, gpt_blocks

FLUSH, FUA, DISCARD, NONE = Flag.FLUSH, Flag.FUA, Flag.DISCARD, Flag(0)
Request = tuple[int, bytes | int, Flag]


def some_requests(seed: int, blocks: int = 64) -> list[Request]:
    choose = random.Random(seed)
    requests: list[Request] = []
    for _ in range(60):
        start, size = choose.randrange(blocks - 8), choose.randint(1, 8)
        match choose.randrange(8):
            case 0 | 1:
                requests.append((0, b"", FLUSH))
            case 2:
                requests.append((start * SECTOR, size * SECTOR, DISCARD))
            case 3:
                requests.append((start * SECTOR, choose.randbytes(size * SECTOR), FUA))
            case _:
                requests.append((start * SECTOR, choose.randbytes(size * SECTOR), NONE))
    return requests


@pytest.fixture
def log(tmp_path: Path, request: pytest.FixtureRequest) -> WriteLog:
    write_log(tmp_path / "log", some_requests(getattr(request, "param", 1)))
    return WriteLog(tmp_path / "log")


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    requests: list[Request] = [
        (512, b"a" * 1024, NONE),
        (0, b"", FLUSH),
        (4096, 8192, DISCARD),
        (0, b"b" * 512, FUA),
    ]
    write_log(tmp_path / "log", requests)
    with WriteLog(tmp_path / "log") as log:
        assert [(each.start, each.size, each.flags) for each in log.entries] == [
            (512, 1024, NONE),
            (0, 0, FLUSH),
            (4096, 8192, DISCARD),
            (0, 512, FUA),
        ]
        assert log.data(log.entries[0], 512, 514) == b"aa"
        assert log.data(log.entries[3]) == b"b" * 512


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:100], "too short"),
        (lambda data: b"\0" * 8 + data[8:], "no log of writes"),
        (lambda data: data[:8] + struct.pack("<Q", 7) + data[16:], "no log of writes"),
        (lambda data: data[:24] + struct.pack("<I", 513) + data[28:], "blocks of 513 bytes"),
        (lambda data: data[:-1], "ends"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "ends"),
        (lambda data: data[:528] + struct.pack("<Q", 1 << 40) + data[536:], "unknown flags"),
    ],
)
def test_a_damaged_log_is_named_as_such(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "log"
    write_log(path, [(0, b"x" * 512, NONE)])
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadLog, match=message):
        WriteLog(path)


@pytest.mark.parametrize("log", range(5), indirect=True)
def test_every_state_is_one_that_the_disk_may_be_in(log: WriteLog) -> None:
    states = crash_states(History(log.entries), 300, seed=7, important=lambda each: each.start < 4096)
    assert len(states) == len({each.key for each in states}) == 300
    for state in states:
        flushed = [each.number + 1 for each in log.entries[: state.cut] if each.flushes]
        assert state.durable == max(flushed, default=0)
        pending = {each.number: each for each in log.entries[state.durable : state.cut]}
        for piece in state.kept:
            assert piece.entry is pending[piece.entry.number]
            assert 0 <= piece.first < piece.last <= piece.entry.size // SECTOR
        whole = {piece.entry.number for piece in state.kept if piece.whole}
        assert {each.number for each in pending.values() if each.forced} <= whole


def test_the_dangerous_states_are_among_them(log: WriteLog) -> None:
    """Of a write that matters: without it, with nothing but it, and a part of it."""
    target = next(each for each in log.entries if each.flags == NONE and each.size > SECTOR)
    history = History(log.entries)
    states = crash_states(history, 200, 3, lambda each: each is target)
    keys = {each.key for each in states}
    assert history.state(target.number + 1, "", True, {target.number: ()}).key in keys
    assert history.state(target.number + 1, "", False, {target.number: ((0, target.size // SECTOR),)}).key in keys
    assert any(piece.entry is target and not piece.whole for state in states for piece in state.kept)


def test_a_seed_gives_the_same_states_again_and_another_seed_others(log: WriteLog) -> None:
    first, again, other = (crash_states(History(log.entries), 100, seed) for seed in (1, 1, 2))
    assert [each.key for each in first] == [each.key for each in again]
    assert {each.key for each in first} != {each.key for each in other}


def test_there_are_only_as_many_states_as_there_are() -> None:
    entries = [Entry(0, 0, SECTOR, NONE, 0), Entry(1, 0, 0, FLUSH)]
    keys = {each.key for each in crash_states(History(entries), 50, 1)}
    assert keys == {(0, ()), (0, ((0, 0, 1),))}
    assert crash_states(History([]), 50, 1) == []


def model(log: WriteLog, base: bytes, state: State) -> bytes:
    """The medium block by block, the slow and obvious way."""
    disk = bytearray(base)
    pieces = [(each, range(each.size // SECTOR)) for each in log.entries[: state.durable]]
    pieces += [(each.entry, range(each.first, each.last)) for each in state.kept]
    for entry, blocks in pieces:
        data = bytes(entry.size) if entry.discards else log.data(entry)
        for block in blocks:
            at = entry.start + block * SECTOR
            disk[at : at + SECTOR] = data[block * SECTOR : (block + 1) * SECTOR]
    return bytes(disk)


def test_the_medium_reads_as_the_state_says(log: WriteLog, tmp_path: Path) -> None:
    base = random.Random(5).randbytes(64 * SECTOR)
    (tmp_path / "base").write_bytes(base)
    medium = Medium(log, tmp_path / "base")
    states = crash_states(History(log.entries), 60, 9)
    for state in states:
        medium.become(state)
        expected = model(log, base, state)
        assert medium.read(0, len(base)) == expected
        assert medium.read(1000, 3000) == expected[1000:4000]
        medium.save(tmp_path / "part", 8 * SECTOR, 20 * SECTOR)
        assert (tmp_path / "part").read_bytes() == expected[8 * SECTOR : 28 * SECTOR]
    with pytest.raises(ValueError, match="order"):
        medium.become(states[0])


def requests_for_tables(*, flush_between: bool) -> list[Request]:
    """The backup at the disk's end first, as UEFI wants; whether it is on the medium before the primary follows."""
    primary, backup = gpt_blocks(["esp", "root", "var"])
    flush: list[Request] = [(0, b"", FLUSH)] if flush_between else []
    return [(backup[0], backup[1], NONE), *flush, (primary[0], primary[1], NONE), (0, b"", FLUSH)]


@pytest.mark.parametrize("flush_between", [True, False])
def test_two_tables_without_a_flush_between_them_leave_none(tmp_path: Path, flush_between: bool) -> None:
    write_log(tmp_path / "log", requests_for_tables(flush_between=flush_between))
    before, _ = gpt_blocks(["esp", "root"])
    with (tmp_path / "base").open("wb") as file:
        file.truncate(DISK_BLOCKS * SECTOR)
        file.seek(before[0])
        file.write(before[1])
    with WriteLog(tmp_path / "log") as log:
        medium = Medium(log, tmp_path / "base")
        used = []
        for state in crash_states(History(log.entries), 400, 11, lambda _: True):
            medium.become(state)
            used.append(read_tables(medium.read, medium.size).used)
    assert any(each is None for each in used) is not flush_between
    assert {len(each.partitions) for each in used if each} == {2, 3}
