"""Loading into little memory: less of it for a model, others going first, and nobody asked twice."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
from pathlib import Path

import pytest

from ai_assistant.daemon import room as room_module
from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelState, caller
from ai_assistant.daemon.fitting import fitting, least_bytes
from ai_assistant.daemon.pins import Pins
from ai_assistant.daemon.pressure import Gauge, Relief, some_avg10
from ai_assistant.daemon.registry import Entry
from ai_assistant.daemon.residency import Meters, Residency, memory_limit
from ai_assistant.daemon.slot import Slot, worst
from ai_assistant.daemon.spill import open_spill
from ai_assistant.engines import memory
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.errors import Busy, InternalError, InvalidArgument, OutOfMemory, Timeout
from tests.daemon.test_residency import MIB, REQUEST, Lab, Scripted, ask, config, entries, lab

__all__ = ["config", "entries", "lab"]

SHAPE = MemoryShape(
    weights_bytes=100 * MIB, repacked_bytes=90 * MIB, attention=((16, 512, 512),), vocabulary=1000,
    context_length=8192, runtime_bytes=40 * MIB,
)  # fmt: skip


def test_less_is_given_up_in_order() -> None:
    asked = LoadOptions(spill_memory_bytes=64 * MIB)
    whole = memory.estimate(SHAPE, asked).total_bytes
    seen: list[tuple[int, bool, str, int, int]] = []
    for room in range(whole, 0, -MIB):
        found = fitting(SHAPE, asked, room)
        if found is None:
            break
        assert memory.estimate(SHAPE, found).total_bytes <= room
        state = (found.spill_memory_bytes, found.repack, found.kv_type, found.context_length, found.sequences)
        if not seen or seen[-1] != state:
            seen.append(state)
    assert seen[:5] == [
        (64 * MIB, True, "f16", 8192, 4), (0, True, "f16", 8192, 4), (0, False, "f16", 8192, 4),
        (0, False, "q8_0", 8192, 4), (0, False, "q4_0", 8192, 4),
    ]  # fmt: skip
    assert seen[-1] == (0, False, "q4_0", 1024, 1)
    assert (
        least_bytes(SHAPE, asked)
        == memory.estimate(
            SHAPE, LoadOptions(repack=False, kv_type="q4_0", context_length=1024, sequences=1)
        ).total_bytes
    )


def test_what_was_asked_for_is_not_chosen_again() -> None:
    explicit = LoadOptions(kv_type="f16", context_length=8192, sequences=1, repack=False)
    needed = memory.estimate(SHAPE, explicit).total_bytes
    assert fitting(SHAPE, explicit, needed - 1) is None
    chosen = fitting(SHAPE, explicit, needed)
    assert chosen is not None
    assert (chosen.kv_type, chosen.context_length) == ("f16", 8192)
    # A head of 80 elements cannot have a quantised cache.
    odd = dataclasses.replace(SHAPE, kv_block=16)
    assert memory.settle(odd, LoadOptions(kv_type="q4_0")).kv_type == "f16"


@pytest.mark.parametrize("values", [None, [], {}, {"weights_bytes": 1}, "x"])
def test_strange_shapes(values: object) -> None:
    with pytest.raises(ValueError, match="shape"):
        MemoryShape.from_dict(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights_bytes", -1), ("weights_bytes", math.nan), ("weights_bytes", 1 << 60), ("weights_bytes", True),
        ("attention", [[1, 2]]), ("attention", [[1, 2, -3]]), ("attention", [[0, 0, 0]] * 2000), ("attention", 5),
        ("whole_texts", 1), ("kv_block", "32"),
    ],
)  # fmt: skip
def test_hostile_shapes(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="not"):
        MemoryShape.from_dict({**SHAPE.to_dict(), key: value})
    assert MemoryShape.from_dict(SHAPE.to_dict()) == SHAPE


async def test_the_highest_score_goes_first(entries: dict[str, Entry]) -> None:
    def slot(name: str, idle: float, load_s: float, size: int) -> Slot:
        return Slot(entries[name], last_used=1000 - idle, load_s=load_s, resident_bytes=size)

    quick, slow, large = slot("a", 100, 0.1, MIB), slot("b", 100, 10, MIB), slot("c", 100, 10, 100 * MIB)
    assert worst([large, slow, quick], 1000) is quick
    assert worst([large, slow], 1000) is slow
    assert worst([slot("a", 1, 0.1, MIB), slot("b", 1000, 1, MIB)], 1000).entry is entries["b"]


async def test_a_pinned_model_stays(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    lab.free = 700 * MIB
    pins = {"a:1"}
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters(), pinned=pins.__contains__)
    await ask(residency, entries["a"])
    await ask(residency, entries["b"])
    await ask(residency, entries["c"])
    assert residency.state("a:1")[0] is ModelState.LOADED
    assert residency.state("b:1")[0] is ModelState.UNLOADED
    pins.add("c:1")
    with pytest.raises(OutOfMemory) as caught:
        await ask(residency, entries["b"])
    assert "unpin" in caught.value.hint
    await residency.close()


async def test_caches_go_before_weights(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())
    for name in "abc":
        await ask(residency, entries[name])

    async def trim() -> int:
        lab.free += 250 * MIB
        return 250 * MIB

    lab.alive[0].trim = trim  # type: ignore[method-assign]
    await ask(residency, entries["d"])
    assert len(lab.alive) == 4
    await residency.close()


async def test_a_trim_that_never_answers(
    lab: Lab, config: Config, entries: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_TRIM_S", 0.05)
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())

    async def never() -> int:
        await asyncio.Event().wait()
        return 0

    for name in "abc":
        await ask(residency, entries[name])
        lab.alive[-1].trim = never  # type: ignore[method-assign]
    await ask(residency, entries["d"])
    assert len(lab.alive) == 3
    await residency.close()


async def test_short_of_memory_it_is_loaded_with_less(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    entry = dataclasses.replace(entries["a"], memory=SHAPE)
    lab.free = memory.estimate(SHAPE, LoadOptions(repack=False)).total_bytes
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())
    await ask(residency, entry)
    assert (lab.loads[0].repack, lab.loads[0].kv_type, lab.loads[0].context_length) == (False, "f16", 8192)
    resident = residency.resident_bytes("a:1")
    assert resident == memory.estimate(SHAPE, LoadOptions(repack=False)).total_bytes
    assert lab.loads[0].memory_limit_bytes == memory_limit(resident)
    await residency.close()


@pytest.mark.parametrize("keep_s", [-1.0, math.nan, -math.inf])
async def test_times_to_stay_that_are_none(lab: Lab, config: Config, entries: dict[str, Entry], keep_s: float) -> None:
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())
    with pytest.raises(InvalidArgument, match="keep_alive"):
        async with residency.use(entries["a"], keep_s):
            pass
    assert not lab.workers


async def test_keep_alive_is_the_last_requests(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = Residency(
        dataclasses.replace(config, models_idle_unload_s=0.05), lab.connect, Meters(lambda: lab.free), Counters()
    )
    for keep_s in (0.0, 1e300, math.inf):
        async with residency.use(entries["a"], keep_s):
            pass
    await asyncio.sleep(0.2)
    assert residency.state("a:1")[0] is ModelState.LOADED
    async with residency.use(entries["a"], 0.0):
        pass
    async with asyncio.timeout(5):
        while residency.state("a:1")[0] is not ModelState.UNLOADED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await residency.close()


async def _ask_as(uid: int, residency: Residency, entry: Entry, keep_s: float | None) -> None:
    async def asking() -> None:
        caller.set(uid)
        async with residency.use(entry, keep_s):
            pass

    await asyncio.create_task(asking())


@pytest.mark.parametrize("other_s", [None, 600.0, math.inf])
async def test_nobody_unloads_what_another_user_wants_to_stay(
    lab: Lab, config: Config, entries: dict[str, Entry], other_s: float | None
) -> None:
    residency = Residency(
        dataclasses.replace(config, models_idle_unload_s=600), lab.connect, Meters(lambda: lab.free), Counters()
    )
    await _ask_as(1000, residency, entries["a"], other_s)
    await _ask_as(1001, residency, entries["a"], 0.0)
    await asyncio.sleep(0.1)
    assert residency.state("a:1")[0] is ModelState.LOADED
    # The other gives it up, and then it goes.
    await _ask_as(1000, residency, entries["a"], 0.0)
    async with asyncio.timeout(5):
        while residency.state("a:1")[0] is not ModelState.UNLOADED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await residency.close()


async def test_wishes_end_with_the_load(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = Residency(
        dataclasses.replace(config, models_idle_unload_s=600), lab.connect, Meters(lambda: lab.free), Counters()
    )
    await _ask_as(1000, residency, entries["a"], math.inf)
    await residency.unload("a:1")
    await _ask_as(1001, residency, entries["a"], 0.0)
    async with asyncio.timeout(5):
        while residency.state("a:1")[0] is not ModelState.UNLOADED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await residency.close()


async def test_from_the_network_the_longest_wish_counts(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    """All of its keys are one caller to the daemon."""
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())
    await _ask_as(-1, residency, entries["a"], 600.0)
    await _ask_as(-1, residency, entries["a"], 0.0)
    await asyncio.sleep(0.1)
    assert residency.state("a:1")[0] is ModelState.LOADED
    await residency.close()


async def test_a_pinned_model_stays_whatever_anybody_wishes(
    lab: Lab, config: Config, entries: dict[str, Entry]
) -> None:
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters(), pinned=lambda name: name == "a:1")
    await _ask_as(1000, residency, entries["a"], 0.0)
    await asyncio.sleep(0.1)
    assert residency.state("a:1")[0] is ModelState.LOADED
    await residency.close()


async def test_drain(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())
    await residency.drain("a:1", 1)
    lab.gate.clear()
    running = asyncio.create_task(ask(residency, entries["a"]))
    while not lab.workers or not lab.workers[0].taken:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    with pytest.raises(Timeout):
        await residency.drain("a:1", 0.05)
    draining = asyncio.create_task(residency.drain("a:1", 10))
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await ask(residency, entries["a"])
    lab.gate.set()
    assert len(await running) == 2
    await draining
    assert residency.state("a:1")[0] is ModelState.UNLOADED
    await ask(residency, entries["a"])
    await residency.close()


async def test_growing_pressure_trims_then_unloads(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    pressure = [20.0]
    residency = Residency(config, lab.connect, Meters(lambda: lab.free, pressure=lambda: pressure[0]), Counters())
    trimmed: list[Scripted] = []
    for name in "ab":
        await ask(residency, entries[name])
        worker = lab.alive[-1]

        async def trim(worker: Scripted = worker) -> int:
            trimmed.append(worker)
            return 1

        worker.trim = trim  # type: ignore[method-assign]
    room, slots = residency._room, list(residency._slots.values())
    await room.relieve_once(slots)
    assert len(trimmed) == 2
    assert len(lab.alive) == 2
    pressure[0] = 15.0
    await room.relieve_once(slots)
    assert len(lab.alive) == 2
    pressure[0] = 30.0
    await room.relieve_once(slots)
    assert len(lab.alive) == 1
    await residency.close()


def test_pressure_is_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "proc/pressure/memory"
    assert some_avg10(tmp_path) is None
    path.parent.mkdir(parents=True)
    for text, expected in (
        ("some avg10=12.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=1 avg60=0 avg300=0 total=0\n", 12.5),
        ("", None), ("full avg10=1\n", None), ("some avg10=nan\n", None), ("some avg10=-1\n", None),
        ("some avg10\n", None), ("some\n", None),
    ):  # fmt: skip
        path.write_text(text)
        assert some_avg10(tmp_path) == expected
    path.write_bytes(b"\xff\xfe")
    assert some_avg10(tmp_path) is None
    gauge = Gauge()
    assert gauge.wanted(None, trimmed=False) is Relief.NOTHING
    assert gauge.wanted(50.0, trimmed=True) is Relief.UNLOAD
    assert gauge.wanted(45.0, trimmed=True) is Relief.UNLOAD
    assert gauge.wanted(20.0, trimmed=True) is Relief.NOTHING


def test_pins_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state/pins.json"
    pins = Pins(path)
    assert pins.set("a:1", True)
    assert not pins.set("a:1", True)
    pins.set("b:1", True)
    assert "a:1" in Pins(path)
    later = Pins(path)
    later.keep_only(["a:1"])
    assert "b:1" not in Pins(path)
    later.discard("a:1")
    assert "a:1" not in Pins(path)
    for content in (b"{", b"{}", b"[1]", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        assert "a:1" not in Pins(path)
    assert "pinned" in caplog.text
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file")
    with pytest.raises(InternalError, match="remembered"):
        pins.set("c:1", True)
    assert "c:1" not in pins


def test_spilling_keeps_to_the_reserve(tmp_path: Path) -> None:
    fd = open_spill(tmp_path, MIB, 0)
    assert fd is not None
    with os.fdopen(fd, "r+b") as file:
        assert file.seek(0, 2) == MIB
    assert not list(tmp_path.iterdir())
    assert open_spill(tmp_path, MIB, 1 << 60) is None
    assert open_spill(tmp_path / "none", MIB, 0) is None


async def test_the_spill_file_goes_with_the_model(
    lab: Lab, config: Config, entries: dict[str, Entry], tmp_path: Path
) -> None:
    sent: list[dict[str, int]] = []
    original = Scripted.load

    class Watching(Scripted):
        async def load(self, fd, options, on_progress=None, files=None):  # type: ignore[no-untyped-def]
            sent.append(dict(files or {}))
            return await original(self, fd, options, on_progress, files)

    async def connect() -> Scripted:
        lab.workers.append(Watching(lab))
        return lab.workers[-1]

    spilling = dataclasses.replace(config, models_spill_disk_bytes=MIB)
    for directory, names in ((tmp_path, ["spill"]), (None, [])):
        residency = Residency(spilling, connect, Meters(lambda: lab.free), Counters(), spill_directory=directory)
        await ask(residency, entries["a"])
        assert list(sent[-1]) == names
        assert (lab.loads[-1].spill_disk_bytes > 0) == bool(names)
        await residency.close()


async def test_statistics_that_do_not_come(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = Residency(config, lab.connect, Meters(lambda: lab.free), Counters())
    assert await residency.stats("a:1") is None
    await ask(residency, entries["a"])
    found = await residency.stats("a:1")
    assert found is not None
    assert found.running == 1
    lab.alive[0].crash()
    await asyncio.sleep(0.01)
    assert await residency.stats("a:1") is None
    await residency.close()
    assert REQUEST.prompt
