"""Times: what is estimated, measured, kept, and what a damaged file does to it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed, DeviceLost
from ai_assistant.hal.graph import NO_VALUE, Attribute, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.hetero import measure
from ai_assistant.hal.hetero.contract import Source
from ai_assistant.hal.hetero.cost import ASSUMED_FLOPS_S, ASSUMED_LAUNCH_S, CostModel, between, signature
from ai_assistant.hal.hetero.intent import parse
from ai_assistant.hal.hetero.measure import SIZES, sample, undisturbed
from ai_assistant.hal.hetero.planner import plan
from ai_assistant.hal.hetero.store import Store, key
from ai_assistant.hal.hetero.work import Work, work
from tests.hal.hetero.fakes import Builder, FakeDevice, SimulatedCosts, branches, chain


def one(op: str, inputs: list[TensorSpec | None], output: TensorSpec | None, **attributes: Attribute) -> Graph:
    values = [Value(f"x{place}", spec) for place, spec in enumerate(inputs)]
    places = tuple(range(len(inputs)))
    node = Node(op, 13, places, (len(inputs),), attributes)
    return Graph((*values, Value("y", output)), (node,), places, (len(inputs),))


def f32(*sizes: int | None) -> TensorSpec:
    return TensorSpec(DType.F32, sizes)


@pytest.mark.parametrize(
    ("graph", "flops"),
    [
        (one("MatMul", [f32(8, 16), f32(16, 32)], f32(8, 32)), 2 * 8 * 16 * 32),
        (one("MatMul", [f32(2, 8, 16), f32(2, 16, 4)], f32(2, 8, 4)), 2 * 2 * 8 * 16 * 4),
        (one("Gemm", [f32(16, 8), f32(16, 32)], f32(8, 32), transA=1), 2 * 8 * 16 * 32),
        (one("Conv", [f32(1, 3, 10, 10), f32(8, 3, 3, 3)], f32(1, 8, 8, 8)), 2 * 8 * 64 * 27),
        (one("MaxPool", [f32(1, 8, 8, 8)], f32(1, 8, 4, 4), kernel_shape=(2, 2)), 2 * 8 * 16 * 4),
        (one("Add", [f32(5, 5), f32(5, 5)], f32(5, 5)), 25),
        (one("Reshape", [f32(5, 5)], f32(25)), 0),
        (one("MatMul", [f32(None, 16), f32(16, 32)], f32(None, 32)), 2 * 16 * 32),
        (one("Strange", [None], None), 1),
    ],
    ids=lambda each: str(each.nodes[0]) if isinstance(each, Graph) else "",
)
def test_work_is_counted(graph: Graph, flops: float) -> None:
    assert work(graph.nodes[0], graph).flops == flops


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv", "MaxPool", "Gather", "QLinearConv", "Softmax"])
def test_counting_never_fails(op: str) -> None:
    """Whatever a file says an operator's inputs are."""
    strange: list[list[TensorSpec | None]] = [
        [], [None], [f32()], [f32(), f32()], [f32(0), f32(0)], [f32(1 << 39), f32(2)], [None, None, None, f32(1, 2, 3)],
    ]  # fmt: skip
    for inputs in strange:
        for output in (None, f32(), f32(3), f32(None)):
            found = work((graph := one(op, inputs, output, kernel_shape=())).nodes[0], graph)
            assert math.isfinite(found.flops)
            assert found.moved_bytes >= 0
    left_out = Node(op, 13, (NO_VALUE,), (0, NO_VALUE))
    assert work(left_out, Graph((Value("y", f32(2)),), (left_out,), (), (0,))).moved_bytes > 0


def test_the_longer_of_arithmetic_and_memory_counts() -> None:
    assert Work(100, 10).seconds(10, 10) == 10
    assert Work(10, 100).seconds(10, 10) == 10


def test_classes_of_shapes() -> None:
    def text(*sizes: int) -> str:
        graph = one("Tanh", [f32(*sizes)], f32(*sizes))
        return signature(graph.nodes[0], graph)

    assert text(100, 60) == text(128, 64) != text(129, 64)
    assert text(0) != text(1)
    left, right = (one("Conv", [f32(1, 3)], f32(1), group=group) for group in (1, 3))
    assert signature(left.nodes[0], left) != signature(right.nodes[0], right)
    wild = one("X" * 5000, [f32(*[1] * 200)], None, a=np.ones(3), b=(1.0, 2.0), c=b"\xff", d="\ud800")
    assert len(signature(wild.nodes[0], wild)) < 300


def test_transfers_between_the_measured_sizes() -> None:
    times = [1e-5, 1e-4, 1e-3]
    for size, seconds in zip(SIZES, times, strict=True):
        assert between(times, size) == pytest.approx(seconds)
    assert between(times, 1) == 1e-5
    assert 1e-5 < between(times, 100_000) < 1e-4
    assert between(times, 2 * SIZES[2]) == pytest.approx(1e-3 + 9e-4 * SIZES[2] / (SIZES[2] - SIZES[1]))
    assert between([1e-3, 1e-4, 1e-5], 2 * SIZES[2]) == 1e-4  # noise never makes more bytes cheaper
    assert between([1e-5], 10 * SIZES[0]) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("times", "counts"),
    [([5.0], 5.0), ([6.0, 5.0, 7.0], 5.0), ([9.0, 4.0, 90.0, 5.0, 70.0], 5.0), ([5.0, 80.0] * 10, 5.0)],
)
def test_what_else_the_machine_does_is_no_property_of_a_device(times: list[float], counts: float) -> None:
    assert undisturbed(times) == counts


def test_measured_times_replace_estimates_and_are_kept(tmp_path: Path) -> None:
    contexts = {"a": FakeDevice("a"), "b": FakeDevice("b", distant=True)}
    graph = branches(3)
    model = CostModel(contexts, versions={"a": "1", "b": "1"}, folder=tmp_path)
    before = model.node_s("a", graph.nodes[1], graph)
    assert before.source is Source.ASSUMED
    assert before.seconds == max(2 * 4 * 4 * 4 / ASSUMED_FLOPS_S, 3 * 64 / 8e9)
    assert model.launch_s("a") == ASSUMED_LAUNCH_S
    assert model.measure(graph, contexts) == 2 * 3  # Tanh, MatMul and Add on each
    assert all(model.node_s(name, node, graph).source is Source.MEASURED for name in contexts for node in graph.nodes)
    assert model.measure(graph, contexts) == 0
    assert model.transfer_s("a", "b", 1 << 20) > 0
    assert model.transfer_s("a", "a", 1 << 20) == 0
    assert model.watts("a") is None
    again = CostModel(contexts, versions={"a": "1", "b": "1"}, folder=tmp_path)
    assert again.node_s("a", graph.nodes[1], graph) == model.node_s("a", graph.nodes[1], graph)
    assert again.transfer_s("b", "a", 5000) == model.transfer_s("b", "a", 5000)
    other = CostModel(contexts, versions={"a": "2", "b": "1"}, folder=tmp_path)
    assert other.node_s("a", graph.nodes[1], graph).source is Source.ASSUMED
    unknown = chain("Neg")
    assert again.node_s("a", unknown.nodes[0], unknown).source is Source.ESTIMATED


def test_measured_times_follow_the_work_within_a_class(tmp_path: Path) -> None:
    device = FakeDevice("a")
    store = Store(key(device, "1"), tmp_path)
    large = one("Tanh", [f32(128)], f32(128))
    effort = work(large.nodes[0], large)
    store.put(signature(large.nodes[0], large), 1e-3, effort.flops, effort.moved_bytes)
    store.save()
    model = CostModel({"a": device}, versions={"a": "1"}, folder=tmp_path)
    small = one("Tanh", [f32(96)], f32(96))
    assert model.node_s("a", small.nodes[0], small).seconds == pytest.approx(0.75e-3)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}',
        b'{"format": 1, "identity": "id", "table": []}',
        b'{"format": 1, "identity": "other", "table": {"x": [1]}}',
        b'{"format": 1, "identity": "id", "table": {"x": ["1"], "y": [NaN], "z": [-1], "u": 5, "v": [true]}}',
        b'{"format": 1, "identity": "id", "table": {"w": [1e999]}}',
    ],
)  # fmt: skip
def test_a_damaged_store_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    Store("id", tmp_path).save()
    first = Store("id", tmp_path)
    first.put("x", 1.0)
    first.save()
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    damaged = Store("id", tmp_path)
    assert len(damaged) == 0
    damaged.put("x", 2.0)
    damaged.save()
    assert Store("id", tmp_path).get("x") == (2.0,)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_store_takes_sound_numbers_only_and_no_disk_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    store = Store("id", blocked / "below")
    for wrong in (math.nan, math.inf, -1.0):
        store.put("x", wrong)
    assert store.get("x") is None
    store.put("x", 1, 2)
    store.save()
    assert store.get("x") == (1, 2)
    huge = tmp_path / "huge"
    Store("id", huge).save()
    kept = Store("id", huge)
    kept.put("x", 1.0)
    kept.save()
    (path,) = huge.iterdir()
    table = {"format": 1, "identity": "id", "table": {"x": [1.0]}, "more": "x" * (17 << 20)}
    path.write_text(json.dumps(table))
    assert len(Store("id", huge)) == 0


@pytest.mark.parametrize("dtype", [each for each in DType if each is not DType.BF16])
def test_made_up_inputs(dtype: DType) -> None:
    made = sample(TensorSpec(dtype, (3, 5)))
    assert made.dtype == dtype.numpy
    values: Any = made.astype(np.float64)
    assert values.shape == (3, 5)
    assert ((values >= 0) & (values <= 1)).all()
    assert (values > 0).all() or dtype.value[0] in "iu"


def test_watts_are_read_while_the_device_works(tmp_path: Path) -> None:
    class Metered(FakeDevice):
        def power_w(self) -> float | None:
            return 7.5

    device = Metered("a")
    device.capabilities = type(device.capabilities)(frozenset({DType.F32}), reads_power=True)
    model = CostModel({"a": device}, folder=tmp_path)
    model.measure(chain("Tanh"), ["a"])
    assert model.watts("a") == 7.5


def test_a_device_that_fails_at_everything_keeps_its_estimates(tmp_path: Path) -> None:
    def fail(graph: Graph) -> None:
        raise ZeroDivisionError("by design")

    device = FakeDevice("a", before_run=fail)
    graph = branches(2)
    model = CostModel({"a": device}, folder=tmp_path)
    assert model.measure(graph, ["a"]) == 0
    assert model.node_s("a", graph.nodes[0], graph).source is Source.ASSUMED

    def lose(graph: Graph) -> None:
        raise DeviceLost("unplugged")

    device.before_run = lose
    with pytest.raises(DeviceLost):
        model.measure(graph, ["a"])


def test_rates_with_constants_are_measured_once(tmp_path: Path) -> None:
    inputs: list[int] = []
    device = FakeDevice("a", before_run=lambda graph: inputs.append(len(graph.inputs)) if graph.nodes else None)
    model = CostModel({"a": device}, versions={"a": "1"}, folder=tmp_path)
    assert model.resident("a") == (0.0, 0.0)
    assert model.moved_s("a") == 0.0
    model.measure_resident(["a"])
    operations, moved = model.resident("a")
    assert min(operations, moved, model.moved_s("a")) > 0
    # Two matrices come, or one is there.
    assert set(inputs) == {1, 2}
    runs = len(device.log)
    again = CostModel({"a": device}, versions={"a": "1"}, folder=tmp_path)
    again.measure_resident(["a"])
    assert again.resident("a") == (operations, moved)
    assert len(device.log) == runs
    assert CostModel({"a": device}, versions={"a": "2"}, folder=tmp_path).resident("a") == (0.0, 0.0)


def test_rates_with_constants_of_devices_that_cannot(tmp_path: Path) -> None:
    without = FakeDevice("a", without=frozenset({"MatMul"}))
    model = CostModel({"a": without}, folder=tmp_path)
    model.measure_resident(["a"])
    assert model.resident("a") == (0.0, 0.0)
    failing = CostModel({"b": FakeDevice("b", compile_error=BackendFailed("no"))}, folder=tmp_path)
    failing.measure_resident(["b"])
    assert failing.resident("b") == (0.0, 0.0)
    lost = CostModel({"c": FakeDevice("c", compile_error=DeviceLost("unplugged"))}, folder=tmp_path)
    with pytest.raises(DeviceLost):
        lost.measure_resident(["c"])


def test_compiling_on_the_first_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    runs: list[str] = []

    def run(graph: Graph) -> None:
        now[0] += 0.25 if runs else 30.0
        runs.append(graph.name)

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    device = FakeDevice("a", before_run=run)
    queue = device.queue()
    program = device.compile(one("Relu", [f32(4)], f32(4)))
    assert measure.program_s(device, queue, program) == 0.25
    assert len(runs) == 2
    queue.close()


def test_candidates_are_tried_for_real(tmp_path: Path) -> None:
    """The costs say that dividing is better; the clock says that the second device is far slower."""
    contexts = {"a": FakeDevice("a"), "b": FakeDevice("b")}
    contexts["b"].before_run = lambda graph: time.sleep(0.02)
    graph = branches(8)
    believed = plan(graph, contexts, parse("ON"), costs=SimulatedCosts())
    assert len(believed.devices) == 2
    tried = plan(graph, contexts, parse("ON"), costs=SimulatedCosts(), measure=True)
    assert tried.devices == ("a",)
    assert {each.name for each in tried.alternatives if each.measured_s} >= {"a alone", believed.name}
    for intent in ("performance", "efficiency"):
        assert plan(graph, contexts, parse(intent), costs=SimulatedCosts(), measure=True).parts
    broken = Builder()
    contexts["a"].before_run = lambda part: 1 / 0  # type: ignore[assignment]
    alone = plan(broken.graph(broken.add("Tanh", 0)), contexts, parse("ON"), costs=SimulatedCosts(), measure=True)
    assert alone.devices == ("b",)
