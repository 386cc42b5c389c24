"""Language models on other devices than the processor: what an option says, what fails, and lavapipe as a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.engines import gguf_rules, llama, memory, native, placing
from ai_assistant.engines.contract import Chunk, GenerateRequest, LoadOptions, Placement
from ai_assistant.engines.gguf import Array, Gguf, opened, read_gguf
from ai_assistant.engines.gguf_layers import sizes_of
from ai_assistant.engines.load_checks import checked_options
from ai_assistant.engines.split_cost import Costs, SplitDevice
from ai_assistant.errors import InvalidArgument, InvalidModel, OutOfMemory
from ai_assistant.hal.hetero.intent import OFF, Objective, parse
from tests.support import gguf_writer

_LAVAPIPE = {
    "GGML_VK_VISIBLE_DEVICES": "0",
    "VK_LOADER_DRIVERS_SELECT": "*lvp*",  # also on a machine with a GPU
    "GALLIVM_PERF": "nopt",  # optimised, one shader takes up to a minute to compile
    "MESA_SHADER_CACHE_DISABLE": "1",
}
_OPTIONS = LoadOptions(sequences=2, threads=1, speculative="off")


def header(path: Path) -> Gguf:
    with opened(path) as fd:
        return read_gguf(fd)


# ---- without the library


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F32"])
def test_the_layers_are_the_whole_model(tmp_path: Path, kind: str) -> None:
    model = header(gguf_writer.write_llama(tmp_path / "m.gguf", kind=kind, layers=5, context=2048))
    shape = gguf_rules.memory_shape(model)
    options = memory.settled(shape, LoadOptions(sequences=3, spill_memory_bytes=1000))
    sizes = sizes_of(model, shape, options)
    assert len(sizes.layers) == 5
    assert len({each.weights_bytes for each in sizes.layers}) == 1
    costs = Costs(sizes, SplitDevice(name="cpu"), [], Objective.LATENCY)
    # All on the host is what the estimate has always been.
    whole = memory.estimate(shape, options)
    assert abs(costs.bytes_of(costs.host, 0, 6) - whole.total_bytes) < 64
    assert sum(each.cache_bytes for each in sizes.layers) == memory.kv_bytes(shape, options)
    assert sum(each.repacked_bytes for each in (*sizes.layers, sizes.output)) == whole.repacked_bytes
    # With nothing there, the process and the embedding are left.
    nothing = costs.bytes_of(costs.host, 0, 0)
    embedding = model.tensors["token_embd.weight"].size_bytes
    assert shape.runtime_bytes + embedding < nothing < shape.runtime_bytes + embedding + (8 << 20)
    assert all(
        costs.bytes_of(costs.host, 0, place) < costs.bytes_of(costs.host, 0, place + 1) for place in range(5)
    )  # fmt: skip


def test_without_repacking_and_with_a_tied_output(tmp_path: Path) -> None:
    model = header(gguf_writer.write_llama(tmp_path / "m.gguf", kind="Q4_0"))
    tied = replace(model, tensors={name: each for name, each in model.tensors.items() if name != "output.weight"})
    shape = gguf_rules.memory_shape(tied)
    options = memory.settled(shape, LoadOptions(repack=False))
    sizes = sizes_of(tied, shape, options)
    embedding = tied.tensors["token_embd.weight"].size_bytes
    # Another device has a copy; the host has it already.
    assert sizes.output.host_has_bytes == embedding <= sizes.output.weights_bytes
    assert not any(each.repacked_bytes for each in (*sizes.layers, sizes.output))
    costs = Costs(sizes, SplitDevice(name="cpu"), [], Objective.LATENCY)
    assert abs(costs.bytes_of(costs.host, 0, costs.places) - memory.estimate(shape, options).total_bytes) < 64


def test_experts_and_layers_that_differ(tmp_path: Path) -> None:
    model = header(gguf_writer.write_llama(tmp_path / "m.gguf", layers=3))
    up = replace(model.tensors["blk.1.ffn_up.weight"], name="blk.1.ffn_up_exps.weight")
    tensors = {name: each for name, each in model.tensors.items() if name != "blk.1.ffn_up.weight"}
    dense = gguf_rules.memory_shape(model)
    options = memory.settled(dense, LoadOptions(sequences=2))
    sparse = replace(
        model,
        tensors={**tensors, up.name: up},
        metadata={**model.metadata, "llama.expert_count": 8, "llama.expert_used_count": 2},
    )
    before, after = sizes_of(model, dense, options), sizes_of(sparse, dense, options)
    assert (after.expert_share, before.expert_share) == (0.25, 1.0)
    assert [each.expert_bytes for each in after.layers] == [0, up.size_bytes, 0]
    assert before.layers[1].flops - after.layers[1].flops == 2 * up.elements * 0.75
    assert after.layers[0] == before.layers[0]
    # A layer without attention has a state instead of a cache; both are a sequence's own.
    mixed = replace(
        model, metadata={**model.metadata, "llama.attention.head_count_kv": Array(4, 3, values=(2, 0, 1))}
    )  # fmt: skip
    shape = replace(gguf_rules.memory_shape(mixed), state_bytes=4096)
    caches = [each.cache_bytes for each in sizes_of(mixed, shape, options).layers]
    assert caches[1] == 2 * 4096
    assert caches[0] == 2 * caches[2] > 0
    assert sum(caches) == memory.kv_bytes(shape, options)


def test_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETERO_COMPUTE", raising=False)
    assert placing.intent_of(LoadOptions()) == OFF
    assert placing.intent_of(LoadOptions(hetero_compute="ON")) == parse("ON")
    monkeypatch.setenv("HETERO_COMPUTE", "efficiency")
    assert placing.intent_of(LoadOptions()) == parse("efficiency")
    assert placing.intent_of(LoadOptions(hetero_compute="off")) == OFF


@pytest.mark.parametrize("text", ["maybe?", "on,off", "cpu,cpu", "x" * 2000, " "])
def test_wishes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        checked_options(LoadOptions(hetero_compute=text))
    assert error.value.param == "hetero_compute"


@pytest.mark.parametrize("names", [5, "ggml:Vulkan0", [5], ["x" * 201], ["a"] * 17, {"a": 1}])
def test_lists_of_devices_that_are_none(names: Any) -> None:
    with pytest.raises(InvalidArgument) as error:
        checked_options(LoadOptions(extra={"avoid_devices": names}))
    assert error.value.param == "avoid_devices"


def test_what_goes_wrong_with_devices_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = header(gguf_writer.write_llama(tmp_path / "m.gguf"))
    options = memory.settled(gguf_rules.memory_shape(model), LoadOptions(hetero_compute="ON"))
    host = SplitDevice(name="cpu", free_bytes=1 << 33, flops_s=1e10, bytes_s=1e9, shares_host=True)
    fast = SplitDevice(name="ggml:A", free_bytes=1 << 33, flops_s=1e12, bytes_s=1e12)
    asked: list[Any] = []

    def look(intent: Any, threads: int = 0, *, without: Any = ()) -> Any:
        asked.append((intent, tuple(without)))
        known = [each for each in (fast, SplitDevice(name="ggml:B", free_bytes=1 << 33)) if each.name not in without]
        return host, known, {"ggml:C": "it does not open"}

    monkeypatch.setattr(native, "devices", lambda: dict.fromkeys("ABC"))
    monkeypatch.setattr(placing, "look", look)
    found = placing.decide(model, options)
    assert (found.parts, found.devices) == ((("ggml:A", 3),), ("ggml:A",))
    assert found.warning == "ggml:C not used: it does not open; ggml:B not used: its speed is not known"
    assert found.host_bytes == found.memory_bytes["cpu"] < memory.estimate(
        gguf_rules.memory_shape(model), options
    ).total_bytes  # fmt: skip
    avoiding = replace(options, extra={"avoid_devices": ["ggml:A", "ggml:elsewhere"]})
    avoided = placing.decide(model, avoiding)
    assert avoided.parts == ()
    assert avoided.warning.startswith("ggml:A not used: its driver ended a process with this model before; ")
    assert [without for _, without in asked] == [(), ("ggml:A",)]
    # Who asked for nothing else gets the processor.
    assert placing.decide(model, replace(avoiding, hetero_compute="ggml:A")).parts == ()


# ---- with it


def text(engine: llama.LlamaEngine) -> str:
    request = GenerateRequest(prompt="hello", max_tokens=8, temperature=0.0, ignore_eos=True)
    return "".join(each.text for each in engine.generate(request) if isinstance(each, Chunk))


@pytest.mark.engine
def test_a_device_that_fails_leaves_the_model_on_the_processor(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with llama.LlamaEngine.open(tiny, _OPTIONS) as engine:
        expected, usual = text(engine), engine.placement
    assert usual == Placement()
    told: list[Placement] = []
    gone = Placement((("cpu", 2), ("ggml:Gone7", 1)), {}, 1 << 20)
    monkeypatch.setattr(llama, "decide", lambda *_: gone)
    with llama.LlamaEngine.open(tiny, replace(_OPTIONS, extra={"placing": told.append})) as engine:
        assert engine.placement.devices == ()
        assert "ggml:Gone7 not used" in engine.placement.warning
        assert "is not there" in engine.placement.warning
        assert text(engine) == expected
    # Said before anything was loaded there, and taken back before it was loaded here.
    assert told == [gone, Placement(warning=told[1].warning)]


@pytest.mark.engine
def test_out_of_memory_there_is_tried_again_here_and_a_bad_model_fails_once_more(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, seen = native.load_model, []

    def full(fd: int, progress: Any, *, repack: bool = True, parts: Any = ()) -> Any:
        seen.append(tuple(parts))
        if parts:
            raise OutOfMemory("the device has no memory for this")
        return load(fd, progress, repack=repack)

    monkeypatch.setattr(native, "load_model", full)
    monkeypatch.setattr(llama, "decide", lambda *_: Placement((("ggml:A", 2), ("ggml:B", 1)), {}, 1 << 20))
    with llama.LlamaEngine.open(tiny, _OPTIONS) as engine:
        assert engine.placement.warning.startswith("ggml:A, ggml:B not used: loading failed there: the device has no")
        assert len(text(engine)) > 0
    assert seen == [(("A", 2), ("B", 1)), ()]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:-4096])
    with pytest.raises(InvalidModel):
        llama.LlamaEngine.open(broken, _OPTIONS)


@pytest.mark.engine
@pytest.mark.parametrize("wish", ["", "OFF", "ON", "cpu", "ggml:CPU", "ggml", "performance"])
def test_without_another_device_nothing_changes(tiny: Path, wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "devices", dict)
    with llama.LlamaEngine.open(tiny, _OPTIONS) as engine:
        expected = text(engine)
    with llama.LlamaEngine.open(tiny, replace(_OPTIONS, hetero_compute=wish)) as engine:
        assert engine.placement == Placement()
        assert text(engine) == expected


@pytest.mark.engine
def test_a_device_that_is_not_here(tiny: Path) -> None:
    with pytest.raises(InvalidArgument, match="Nowhere9") as error:
        llama.LlamaEngine.open(tiny, replace(_OPTIONS, hetero_compute="ggml:Nowhere9"))
    assert error.value.param == "hetero_compute"
    assert "cpu" in error.value.hint


@pytest.fixture(scope="module")
def lavapipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process that does everything: compiling shaders for the processor takes half a minute."""
    folder = tmp_path_factory.mktemp("lavapipe")
    paths = [
        str(gguf_writer.write_llama(folder / f"{kind}.gguf", layers=6, hidden=1024, context=1024, kind=kind))
        for kind in ("F32", "Q4_0")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.device_program", *paths],
        env={**os.environ, **_LAVAPIPE, "XDG_CACHE_HOME": str(folder),
             "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "exact" not in found:
        pytest.skip("lavapipe or the engine's Vulkan plug-in is not in this tools tree")
    return found


@pytest.mark.engine
@pytest.mark.parametrize("run", ["half", "device"])
def test_the_same_answer_wherever_the_layers_are(lavapipe: dict[str, Any], run: str) -> None:
    expected, found = (lavapipe["exact"][name]["answers"] for name in ("processor", run))
    for ours, theirs in zip(expected, found, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        assert len({bytes(token) for token, _ in ours}) > 3
        # The first token's: later ones have read what was rounded on the way.
        assert ours[0][1] == pytest.approx(theirs[0][1], abs=1e-2)


@pytest.mark.engine
@pytest.mark.parametrize("model", ["exact", "quantised"])
@pytest.mark.parametrize("run", ["half", "device"])
def test_the_device_holds_what_was_estimated(lavapipe: dict[str, Any], model: str, run: str) -> None:
    values = lavapipe[model][run]
    used = sum(size for name, size in values["buffers"].items() if name.startswith("Vulkan0 ")) * (1 << 20)
    assert values["device_bytes"] == pytest.approx(used, rel=0.05)
    # Of the host, buffers only: what the process itself takes is measured in test_memory.py.
    ours = sum(size for name, size in values["buffers"].items() if not name.startswith("Vulkan0 ")) * (1 << 20)
    assert values["host_bytes"] - values["runtime_bytes"] == pytest.approx(ours, rel=0.05, abs=2 << 20)


@pytest.mark.engine
def test_the_processors_part_is_mapped_and_repacked_as_ever(lavapipe: dict[str, Any]) -> None:
    runs = lavapipe["quantised"]
    # The device is there, and nothing of it is used.
    assert not [name for name in runs["processor"]["buffers"] if "Vulkan" in name]
    assert runs["processor"]["warning"] == runs["half"]["warning"] == ""
    half = runs["half"]["buffers"]
    assert 0 < half["CPU_Mapped model"] < runs["processor"]["buffers"]["CPU_Mapped model"]
    assert "Vulkan_Host model" not in half
    assert ("CPU_REPACK model" in half) == ("CPU_REPACK model" in runs["processor"]["buffers"])
    # Caches are where their layers are.
    assert half["CPU KV"] + half["Vulkan0 KV"] == pytest.approx(runs["processor"]["buffers"]["CPU KV"])


@pytest.mark.engine
def test_a_program_that_plays_a_gpu_is_used_by_its_name_alone(lavapipe: dict[str, Any]) -> None:
    assert lavapipe["ON"] == lavapipe["OFF"] == lavapipe["performance"] == []
    assert lavapipe["named"] == ["ggml:Vulkan0"]
    devices, warning = lavapipe["avoided"]
    assert devices == []
    assert "ggml:Vulkan0 not used: its driver ended a process" in warning
    (_, *processor), (name, software, known, free) = lavapipe["look"]
    assert processor[:2] == [False, True]
    assert (name, software, known) == ("ggml:Vulkan0", True, False)
    assert free > 0
