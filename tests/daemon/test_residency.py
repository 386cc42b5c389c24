"""Residency with workers that do what the test says; the real ones are in tests/bus."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

import pytest

from ai_assistant.daemon import config as configuration
from ai_assistant.daemon import room as room_module
from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelState
from ai_assistant.daemon.registry import Entry
from ai_assistant.daemon.residency import Meters, Residency, Worker, memory_limit
from ai_assistant.engines.contract import (
    Chunk,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
    Placement,
    Usage,
)
from ai_assistant.engines.hetero import Wish
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    InvalidModel,
    NoSuchModel,
    OutOfMemory,
    Timeout,
    WorkerCrashed,
)

MIB = 1 << 20
INFO = ModelInfo(
    format="gguf", architecture="llama", parameters=1, size_bytes=1, quantization="Q8_0", context_length=1,
    has_chat_template=False, can_embed=True,
)  # fmt: skip
REQUEST = GenerateRequest(prompt="x")


class Lab:
    """All workers that were started, and the memory that they take."""

    def __init__(self) -> None:
        self.workers: list[Scripted] = []
        self.free = 1000 * MIB
        self.untouched = 0
        self.load_s = 0.01
        self.fail: AIAssistantError | None = None
        self.placement = Placement()
        self.gate = asyncio.Event()
        self.gate.set()
        self.loads: list[LoadOptions] = []

    async def connect(self) -> Worker:
        worker = Scripted(self)
        self.workers.append(worker)
        return worker

    @property
    def alive(self) -> list[Scripted]:
        return [each for each in self.workers if not each.died.done()]


class Scripted:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.taken = 0
        self.closed_generations = 0
        self.placement = lab.placement

    async def load(
        self,
        fd: int,
        options: LoadOptions,
        on_progress: Callable[[float], None] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> ModelInfo:
        self.lab.loads.append(options)
        if on_progress is not None:
            on_progress(0.5)
        await asyncio.sleep(self.lab.load_s)
        if self.lab.fail is not None:
            raise self.lab.fail
        self.taken = 300 * MIB
        self.lab.free -= self.taken
        return INFO

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        try:
            yield Chunk("a")
            await self.lab.gate.wait()
            if self.died.done():
                raise WorkerCrashed("died")
            yield Finished(FinishReason.STOP, Usage())
        finally:
            self.closed_generations += 1

    async def embed(self, texts: Sequence[str], wish: Wish | None = None) -> tuple[list[list[float]], int]:
        return [[1.0] for _ in texts], len(texts)

    async def tokenize(self, text: str) -> list[int]:
        return [1]

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return "a"

    async def rerank(self, query: str, documents: Sequence[str], wish: Wish | None = None) -> tuple[list[float], int]:
        return [0.5 for _ in documents], len(documents)

    async def classify(
        self, texts: Sequence[str], wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        return [[("a", 1.0)] for _ in texts], len(texts)

    async def stats(self) -> EngineStats:
        return EngineStats(running=1, kv_untouched_bytes=self.lab.untouched)

    async def trim(self) -> int:
        return 0

    def crash(self) -> None:
        self.lab.free += self.taken
        self.died.set_result("killed")

    async def close(self) -> None:
        if not self.died.done():
            self.lab.free += self.taken
            self.died.set_result("closed")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return dataclasses.replace(
        configuration.load(tmp_path),
        models_memory_reserve_bytes=0,
        models_idle_unload_s=0.0,
        worker_restart_first_s=0.1,
        worker_restart_longest_s=0.4,
    )


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Entry]:
    path = tmp_path / "model"
    path.write_bytes(b"x")
    return {name: Entry(f"{name}:1", INFO, MemoryShape(weights_bytes=300 * MIB), 0, path=path) for name in "abcd"}


def make(lab: Lab, config: Config, counters: Counters | None = None) -> Residency:
    return Residency(config, lab.connect, Meters(lambda: lab.free), counters or Counters())


async def ask(residency: Residency, entry: Entry) -> list[Event]:
    return [event async for event in residency.generate(entry, REQUEST)]


async def test_load_on_demand_and_once(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    states: list[ModelState] = []
    residency.changed = lambda name: states.append(residency.state(name)[0])
    told: list[float] = []
    loading = residency.load(entries["a"], told.append)
    results = await asyncio.gather(loading, *(ask(residency, entries["a"]) for _ in range(5)))
    assert len(lab.workers) == 1
    assert states == [ModelState.LOADING, ModelState.LOADED]
    assert told == [0.5]
    assert all(len(each or []) == 2 for each in results[1:])
    await residency.close()
    assert lab.alive == []


async def test_a_caller_that_goes_does_not_stop_the_load(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.load_s = 0.1
    first = asyncio.ensure_future(ask(residency, entries["a"]))
    second = asyncio.ensure_future(ask(residency, entries["a"]))
    await asyncio.sleep(0.02)
    first.cancel()
    assert len(await second) == 2
    assert len(lab.workers) == 1


async def test_least_recently_used_goes_first(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    for name in ("a", "b", "c"):
        await ask(residency, entries[name])
    await ask(residency, entries["a"])
    await ask(residency, entries["d"])
    loaded = {name for name in "abcd" if residency.state(f"{name}:1")[0] is ModelState.LOADED}
    assert loaded == {"a", "c", "d"}


async def test_generating_models_are_never_evicted(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.gate.clear()
    running = [asyncio.ensure_future(ask(residency, entries[name])) for name in "abc"]
    await asyncio.sleep(0.1)
    with pytest.raises(OutOfMemory) as caught:
        await ask(residency, entries["d"])
    assert str(300 * MIB) in caught.value.message
    assert str(100 * MIB) in caught.value.message
    assert residency.state("d:1")[0] is ModelState.FAILED
    with pytest.raises(Busy):
        await residency.unload("a:1")
    lab.gate.set()
    assert [len(each) for each in await asyncio.gather(*running)] == [2, 2, 2]
    await ask(residency, entries["d"])


async def test_loads_at_the_same_time_share_the_memory(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.free = 700 * MIB
    lab.load_s = 0.05
    results = await asyncio.gather(*(ask(residency, entries[name]) for name in "abc"), return_exceptions=True)
    assert sum(isinstance(each, OutOfMemory) for each in results) == 1
    assert lab.free >= 0


async def test_closing_a_generation_reaches_the_worker(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.gate.clear()
    events = residency.generate(entries["a"], REQUEST)
    assert isinstance(await anext(events), Chunk)
    assert residency.busy("a:1")
    await events.aclose()
    assert lab.workers[0].closed_generations == 1
    assert not residency.busy("a:1")


async def test_crash_back_off_and_restart(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    counters = Counters()
    residency = make(lab, config, counters)
    await ask(residency, entries["a"])
    lab.gate.clear()
    running = asyncio.ensure_future(ask(residency, entries["a"]))
    await asyncio.sleep(0.01)
    lab.workers[0].crash()
    lab.gate.set()
    with pytest.raises(WorkerCrashed):
        await running
    assert residency.state("a:1") == (ModelState.FAILED, "its worker crashed")
    await ask(residency, entries["a"])  # waits for the restart, which is near
    assert residency.state("a:1")[0] is ModelState.LOADED
    assert len(lab.workers) == 2
    assert counters.worker_restarts == 1
    # The second crash soon after waits twice as long.
    lab.workers[1].crash()
    await asyncio.sleep(0.12)
    assert len(lab.workers) == 2
    await asyncio.sleep(0.15)
    assert len(lab.workers) == 3
    await residency.close()


async def test_a_device_that_a_worker_died_with_is_avoided(
    lab: Lab, config: Config, entries: dict[str, Entry], caplog: pytest.LogCaptureFixture
) -> None:
    residency = make(lab, config)
    lab.placement = Placement((("cpu", 3), ("ggml:Vulkan0", 6)), {}, 100 * MIB)
    await ask(residency, entries["a"])
    assert "avoid_devices" not in lab.loads[0].extra
    # The rest of it is in the device's own memory.
    assert residency.resident_bytes("a:1") == 100 * MIB
    lab.workers[0].crash()
    lab.placement = Placement(warning="ggml:Vulkan0 not used: its driver ended a process")
    await asyncio.sleep(0.01)
    await ask(residency, entries["a"])
    assert lab.loads[1].extra["avoid_devices"] == ["ggml:Vulkan0"]
    assert residency.warning("a:1") == "ggml:Vulkan0 not used: its driver ended a process"
    await residency.unload("a:1")
    await ask(residency, entries["a"])
    assert lab.loads[2].extra["avoid_devices"] == ["ggml:Vulkan0"]
    told = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert sum("is loaded without ggml:Vulkan0" in each for each in told) == 1
    assert sum("its driver ended" in each for each in told) == 1
    # Another model is not suspected, and neither is a device that a worker had nothing to do with.
    await ask(residency, entries["b"])
    assert "avoid_devices" not in lab.loads[3].extra
    lab.workers[3].crash()
    await asyncio.sleep(0.01)
    await ask(residency, entries["b"])
    assert "avoid_devices" not in lab.loads[4].extra
    await residency.close()


async def test_avoided_devices_are_bounded_and_a_crash_while_loading_counts(
    lab: Lab, config: Config, entries: dict[str, Entry]
) -> None:
    residency = make(lab, dataclasses.replace(config, worker_restart_attempts=0))
    for number in range(20):
        lab.placement = Placement(((f"ggml:{number}", 1),))
        lab.fail = WorkerCrashed("it died")
        with pytest.raises(WorkerCrashed):
            await ask(residency, entries["a"])
        residency._slots["a:1"].retry_at = 0.0
    lab.fail, lab.placement = None, Placement()
    await ask(residency, entries["a"])
    assert lab.loads[-1].extra["avoid_devices"] == [f"ggml:{number}" for number in range(16)]
    await residency.close()


async def test_a_long_back_off_is_an_error(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, dataclasses.replace(config, worker_restart_first_s=10.0, worker_restart_longest_s=10.0))
    await ask(residency, entries["a"])
    lab.workers[0].crash()
    await asyncio.sleep(0.05)
    with pytest.raises(WorkerCrashed, match="being restarted"):
        await ask(residency, entries["a"])
    await residency.close()


async def test_restarts_end(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    config = dataclasses.replace(config, worker_restart_first_s=0.05, worker_restart_longest_s=0.05)
    residency = make(lab, dataclasses.replace(config, worker_restart_attempts=2))
    lab.fail = WorkerCrashed("killed by the model")
    with pytest.raises(WorkerCrashed):
        await ask(residency, entries["a"])
    await asyncio.sleep(0.5)
    assert len(lab.workers) == 3
    assert lab.alive == []
    lab.fail = None
    await ask(residency, entries["a"])


async def test_a_bad_model_is_no_crash(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.fail = InvalidModel("no tensors")
    with pytest.raises(InvalidModel):
        await ask(residency, entries["a"])
    assert residency.state("a:1") == (ModelState.FAILED, "no tensors")
    await asyncio.sleep(0.2)
    assert len(lab.workers) == 1
    assert lab.alive == []


async def test_a_load_that_hangs(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, dataclasses.replace(config, worker_load_timeout_s=0.1))
    lab.load_s = 60
    with pytest.raises(Timeout):
        await ask(residency, entries["a"])
    assert lab.alive == []


async def test_idle_models_are_unloaded(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, dataclasses.replace(config, models_idle_unload_s=0.15))
    await ask(residency, entries["a"])
    await asyncio.sleep(0.1)
    await ask(residency, entries["b"])
    await asyncio.sleep(0.1)
    assert residency.state("a:1")[0] is ModelState.UNLOADED
    assert residency.state("b:1")[0] is ModelState.LOADED
    await asyncio.sleep(0.15)
    assert residency.state("b:1")[0] is ModelState.UNLOADED
    assert lab.alive == []


async def test_forgetting_while_loading(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.load_s = 60
    waiting = asyncio.ensure_future(ask(residency, entries["a"]))
    await asyncio.sleep(0.05)
    await residency.forget("a:1")
    with pytest.raises(NoSuchModel):
        await waiting
    assert lab.alive == []


async def test_unload(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    await residency.unload("a:1")
    await ask(residency, entries["a"])
    await residency.unload("a:1")
    assert lab.alive == []
    # A worker that is closed on purpose has not crashed.
    await asyncio.sleep(0.15)
    assert len(lab.workers) == 1


async def test_nothing_is_loaded_while_stopping(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    await residency.close()
    with pytest.raises(Busy):
        await ask(residency, entries["a"])


async def test_a_model_that_nobody_waited_for_is_idle(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, dataclasses.replace(config, models_idle_unload_s=0.15))
    lab.load_s = 0.1
    asking = asyncio.ensure_future(ask(residency, entries["a"]))
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.sleep(0.1)
    assert residency.state("a:1")[0] is ModelState.LOADED
    await asyncio.sleep(0.25)
    assert residency.state("a:1")[0] is ModelState.UNLOADED
    assert lab.alive == []


async def test_a_load_that_can_never_fit_evicts_nobody(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    for name in ("a", "b"):
        await ask(residency, entries[name])
    huge = dataclasses.replace(entries["c"], memory=MemoryShape(weights_bytes=1001 * MIB))
    with pytest.raises(OutOfMemory, match=f"{400 * MIB} bytes are available"):
        await ask(residency, huge)
    assert len(lab.alive) == 2
    # With all idle ones gone this one fits.
    await ask(residency, dataclasses.replace(entries["d"], memory=MemoryShape(weights_bytes=1000 * MIB)))
    assert len(lab.alive) == 1


async def test_memory_is_promised_only_to_those_that_have_room(
    lab: Lab, config: Config, entries: dict[str, Entry]
) -> None:
    residency = make(lab, config)
    lab.free, lab.load_s = 650 * MIB, 0.05
    huge = dataclasses.replace(entries["c"], memory=MemoryShape(weights_bytes=900 * MIB))
    results = await asyncio.gather(
        ask(residency, huge), ask(residency, entries["a"]), ask(residency, entries["b"]), return_exceptions=True
    )
    # All three are loading at once; the one that is refused keeps nothing from the others.
    assert [isinstance(each, OutOfMemory) for each in results] == [True, False, False]


async def test_mapped_weights_are_not_available(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    # As with weights in the page cache: the kernel calls all of the machine available.
    residency = Residency(config, lab.connect, Meters(lambda: 1000 * MIB, lambda: 1000 * MIB), Counters())
    lab.gate.clear()
    running = [asyncio.ensure_future(ask(residency, entries[name])) for name in "abc"]
    await asyncio.sleep(0.1)
    with pytest.raises(OutOfMemory, match=f"{100 * MIB} bytes are available"):
        await ask(residency, entries["d"])
    lab.gate.set()
    await asyncio.gather(*running)
    await ask(residency, entries["d"])
    assert len(lab.alive) == 3


async def test_caches_that_may_fill_are_not_available(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.gate.clear()
    lab.untouched = 200 * MIB
    running = [asyncio.ensure_future(ask(residency, entries[name])) for name in "ab"]
    await asyncio.sleep(0.1)
    # 400 MiB are free, all of which the two may take yet.
    with pytest.raises(OutOfMemory):
        await ask(residency, entries["c"])
    lab.untouched = 0
    third = asyncio.ensure_future(ask(residency, entries["c"]))
    lab.gate.set()
    await asyncio.gather(*running, third)


async def test_workers_are_bounded(
    lab: Lab, config: Config, entries: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "MAX_WORKERS", 2)
    residency = make(lab, config)
    lab.gate.clear()
    running = [asyncio.ensure_future(ask(residency, entries[name])) for name in "ab"]
    await asyncio.sleep(0.05)
    with pytest.raises(Busy, match="2 models are in use"):
        await ask(residency, entries["c"])
    lab.gate.set()
    await asyncio.gather(*running)
    await ask(residency, entries["c"])
    assert len(lab.alive) == 2


async def test_cancelling_a_load_ends_it(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    lab.load_s = 60
    loading = asyncio.ensure_future(residency.load(entries["a"]))
    await asyncio.sleep(0.05)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert lab.alive == []
    assert residency.state("a:1")[0] is ModelState.UNLOADED
    # Somebody else waits for the same load: it goes on.
    lab.load_s = 0.1
    loading = asyncio.ensure_future(residency.load(entries["a"]))
    asking = asyncio.ensure_future(ask(residency, entries["a"]))
    await asyncio.sleep(0.05)
    loading.cancel()
    assert len(await asking) == 2
    assert len(lab.workers) == 2


async def test_each_worker_has_a_limit(lab: Lab, config: Config, entries: dict[str, Entry]) -> None:
    residency = make(lab, config)
    await ask(residency, entries["a"])
    assert lab.loads[0].memory_limit_bytes == memory_limit(300 * MIB) == 887 * MIB
