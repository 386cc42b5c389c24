"""Real backends together: the same numbers as one device alone, on random graphs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ai_assistant.errors import Cancelled
from ai_assistant.hal.graph import Array, DType, Graph
from ai_assistant.hal.hetero.cost import CostModel
from ai_assistant.hal.hetero.devices import OpenDevices, open_devices
from ai_assistant.hal.hetero.executor import Executor
from ai_assistant.hal.hetero.intent import OFF, parse
from ai_assistant.hal.hetero.measure import sample
from ai_assistant.hal.hetero.planner import plan
from ai_assistant.hal.remote import RemoteBackend
from ai_assistant.hal.remote.backend import RemoteContext
from bench._hal_graphs import Net, branches, inception, resnet, transformer
from tests.hal.hetero.fakes import SimulatedCosts

pytest.importorskip("hypothesis", reason="it is in the tools tree, with the engines")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.engine
CORES = ("onnxruntime:CPUExecutionProvider@0", "onnxruntime:CPUExecutionProvider@1")
RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""What docs/hetero.md states."""


@pytest.fixture(scope="module")
def opened() -> Iterator[OpenDevices]:
    with open_devices(("cpu", "onnxruntime", *CORES)) as found:
        assert set(found) == {"cpu", "onnxruntime", *CORES}
        yield found


def close(mine: list[Array], theirs: list[Array]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = float(np.max(np.abs(other), initial=0.0)) if other.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(one, other, rtol=RELATIVE, atol=max(ABSOLUTE, RELATIVE * scale))


def alone(graph: Graph, opened: OpenDevices, inputs: list[Array]) -> list[Array]:
    with Executor(plan(graph, {"onnxruntime": opened["onnxruntime"]}, OFF)) as executor:
        return executor.run(inputs, 60)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    net = Net("drawn", draw(st.integers(0, 1000)))
    sizes = (draw(st.integers(1, 5)), draw(st.integers(1, 8)))
    values = [net.input(*sizes) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 25))):
        op = draw(st.sampled_from(["Add", "Mul", "Sub", "Relu", "Tanh", "Sigmoid", "MatMul", "Softmax", "Erf"]))
        value = draw(st.sampled_from(values[-6:]))
        if op in ("Add", "Mul", "Sub"):
            # Through Tanh: products of products would leave the numbers that floats have.
            values.append(net.op("Tanh", net.op(op, value, draw(st.sampled_from(values)))))
        elif op == "MatMul":
            values.append(net.op("Tanh", net.matmul(value, net.weight(sizes[1], sizes[1]))))
        else:
            values.append(net.op(op, value, axis=-1) if op == "Softmax" else net.op(op, value))
    outputs = draw(st.lists(st.sampled_from(values[len(net.inputs) :]), min_size=1, max_size=3, unique=True))
    return net.graph(*outputs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graphs(), seed=st.integers(0, 1 << 30), names=st.permutations(["cpu", "onnxruntime", *CORES]))
def test_random_graphs_give_the_same_on_several_devices(
    opened: OpenDevices, graph: Graph, seed: int, names: list[str]
) -> None:
    """Each operator is made cheap on one device and dear on the others, so that graphs are really divided."""
    ops = sorted({node.op for node in graph.nodes})
    cheap = {(names[(seed + place) % 3], op): 1e-6 for place, op in enumerate(ops)}
    costs = SimulatedCosts({**cheap, **dict.fromkeys(names, 0.01)}, launch=0, hop=0, bytes_s=1e15)
    found = plan(graph, {name: opened[name] for name in names[:3]}, parse("ON"), costs=costs)
    inputs = [sample(spec, seed + place) for place, spec in enumerate(graph.input_specs)]
    with Executor(found) as executor:
        close(executor.run(inputs, 60), alone(graph, opened, inputs))


@pytest.mark.parametrize(
    "graph",
    [branches(2, 3, 64, 8), inception(2, 14, 32), resnet(64, (1, 1, 1, 1), 16),
     transformer(layers=2, vocabulary=500, length=16)],
    ids=lambda graph: str(graph.name),
)  # fmt: skip
@pytest.mark.parametrize("devices", [("cpu", "onnxruntime"), CORES])
def test_networks_give_the_same_on_two_devices(opened: OpenDevices, graph: Graph, devices: tuple[str, ...]) -> None:
    contexts = {name: opened[name] for name in devices}
    rng = np.random.default_rng(5)
    costs = SimulatedCosts(
        {(name, op): rng.uniform(1e-6, 1e-3) for name in devices for op in {node.op for node in graph.nodes}},
        launch=0, hop=0, bytes_s=1e15,
    )  # fmt: skip
    inputs = [
        rng.integers(0, 500, spec.sizes) if spec.dtype is DType.I64 else rng.standard_normal(spec.sizes, np.float32)
        for spec in graph.input_specs
    ]
    for intent in ("latency", "performance"):
        found = plan(graph, contexts, parse(intent), costs=costs)
        with Executor(found) as executor:
            runs = [executor.submit(inputs) for _ in range(min(2, executor.depth))]
            for run in runs:
                close(run.result(60), alone(graph, opened, inputs))


def test_the_pick_is_measured_on_real_devices(opened: OpenDevices, tmp_path: Path) -> None:
    graph = branches(2, 4, 128, 16)
    model = CostModel(opened, versions=opened.versions, folder=tmp_path)
    found = plan(graph, opened, parse("ON"), costs=model, measure=True)
    times = {each.name: each.measured_s for each in found.alternatives if each.measured_s is not None}
    assert found.name in times
    singles = [seconds for each in found.alternatives if each.single and (seconds := each.measured_s) is not None]
    assert times[found.name] <= min(singles)
    assert any(source == "measured" for row in found.explain() for source in row["sources"])
    assert list(tmp_path.iterdir())


def test_a_process_that_dies_is_a_lost_device(opened: OpenDevices) -> None:
    """A backend in a process of its own, killed between requests and while they run."""
    graph = branches(2, 3, 64, 8)
    inputs = [sample(spec) for spec in graph.input_specs]
    wanted = alone(graph, opened, inputs)
    for during in (False, True):
        with RemoteBackend("cpu", loss=True).open() as remote:
            assert isinstance(remote, RemoteContext)
            contexts = {"onnxruntime": opened["onnxruntime"], "remote": remote}
            costs = SimulatedCosts({("remote", "MatMul"): 1e-6, "remote": 1e-2, "onnxruntime": 1e-3})
            found = plan(graph, contexts, parse("ON"), costs=costs)
            assert set(found.devices) == {"onnxruntime", "remote"}
            with Executor(found, depth=2) as executor:
                close(executor.run(inputs, 60), wanted)
                runs = [executor.submit(inputs), executor.submit(inputs)] if during else []
                os.kill(remote.child.pid, signal.SIGKILL)
                for run in runs or [executor.submit(inputs)]:
                    close(run.result(60), wanted)
                close(executor.run(inputs, 60), wanted)
                if not during:
                    assert executor.plan.devices == ("onnxruntime",)


@pytest.mark.parametrize(
    "graph", [branches(2, 3, 64, 8), resnet(64, (1, 1, 1, 1), 16)], ids=lambda each: str(each.name)
)
def test_a_shared_library_works_beside_python_and_onnxruntime(
    opened: OpenDevices, graph: Graph, tmp_path: Path
) -> None:
    """Events of a library's own queues, and what it does not implement."""
    from ai_assistant.hal.native import NativeBackend
    from tests.hal.native.build import example

    inputs = [sample(spec, 7) for spec in graph.input_specs]
    wanted = alone(graph, opened, inputs)
    rng = np.random.default_rng(1)
    with NativeBackend(example(tmp_path)).open() as native:
        contexts = {"native": native, "onnxruntime": opened["onnxruntime"], "cpu": opened["cpu"]}
        ops = {node.op for node in graph.nodes}
        times = {(name, op): rng.uniform(1e-6, 1e-3) for name in contexts for op in ops}
        costs = SimulatedCosts({**times, **{("native", op): 1e-7 for op in ops}}, launch=0, hop=0, bytes_s=1e15)
        found = plan(graph, contexts, parse("ON"), costs=costs)
        assert "native" in found.devices
        assert len(found.devices) > 1
        assert any("not implemented" in reason for part in found.parts for reason in part.unsupported.values())
        with Executor(found, depth=2) as executor:
            runs = [executor.submit(inputs) for _ in range(2)]
            for run in runs:
                close(run.result(60), wanted)
            cancelled = executor.submit(inputs)
            cancelled.cancel()
            with pytest.raises(Cancelled):
                cancelled.result(60)
            close(executor.run(inputs, 60), wanted)
