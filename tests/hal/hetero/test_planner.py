"""What is divided how: simulated costs, so that the best answer is known."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.hetero.intent import Intent, Objective, parse
from ai_assistant.hal.hetero.planner import FALLBACK, plan
from ai_assistant.hal.hetero.plans import Plan
from tests.hal.hetero.fakes import SPEC, Builder, FakeDevice, SimulatedCosts, branches, chain

ON = parse("ON")


def devices(*names: str, **options: Any) -> dict[str, FakeDevice]:
    return {name: FakeDevice(name, **options) for name in names}


def check(found: Plan) -> None:
    """Everything runs once, after what it needs, and nothing is worse than the best single device."""
    graph = found.graph
    seen: dict[int, int] = {}
    for part in found.parts:
        assert part.device in found.contexts
        for node in part.nodes:
            assert node not in seen
            seen[node] = part.number
        for node in part.nodes:
            for index in graph.nodes[node].inputs:
                if index != NO_VALUE and index in graph.producers:
                    source = seen[graph.producers[index]]
                    assert source == part.number or source in part.after
                    assert source <= part.number
    assert sorted([*seen, *found.dead]) == list(range(len(graph.nodes)))
    objective = found.intent.objective
    for each in found.alternatives:
        if each.single and not each.refused:
            assert found.predicted.score(objective)[0] <= each.predicted.score(objective)[0] * 1.0001


def test_two_equal_branches_go_to_two_devices() -> None:
    found = plan(branches(8), devices("a", "b"), ON, costs=SimulatedCosts())
    check(found)
    assert set(found.devices) == {"a", "b"}
    assert found.predicted.latency_s < 0.6 * 17e-3 + 2e-3
    assert any("beside" in part.why for part in found.parts)


def test_more_branches_than_devices_are_not_torn_to_pieces() -> None:
    found = plan(branches(100, 4), devices("a", "b", "c"), ON, costs=SimulatedCosts(hop=1e-6, launch=1e-6))
    check(found)
    assert len(found.devices) > 1
    assert len(found.parts) < 20
    assert found.predicted.latency_s < 0.6 * 0.4


def test_off_takes_the_fastest_device_alone() -> None:
    found = plan(branches(8), devices("a", "b"), costs=SimulatedCosts({"b": 5e-4}))
    check(found)
    assert found.devices == ("b",)
    assert len(found.parts) == 1
    assert {each.name for each in found.alternatives} == {"a alone", "b alone"}


def test_a_chain_stays_where_it_is_when_moving_costs_more() -> None:
    graph = chain(*["Tanh", "Relu"] * 10)
    times = {("a", "Tanh"): 1e-3, ("a", "Relu"): 2e-3, ("b", "Tanh"): 2e-3, ("b", "Relu"): 1e-3}
    dear = plan(graph, devices("a", "b"), ON, costs=SimulatedCosts(times, hop=1e-2))
    cheap = plan(graph, devices("a", "b"), ON, costs=SimulatedCosts(times, hop=1e-6))
    check(dear)
    check(cheap)
    assert len(dear.parts) == 1
    assert len(cheap.parts) == 20
    assert cheap.predicted.latency_s < 0.75 * dear.predicted.latency_s


def test_devices_of_one_processor_are_no_two() -> None:
    contexts = devices("a", "b")
    for each in contexts.values():
        each.device = type(each.device)(each.device.id, each.device.name, "cpu")
    found = plan(branches(8), contexts, ON, costs=SimulatedCosts())
    assert len(found.devices) == 1
    for number, each in enumerate(contexts.values()):
        each.device = type(each.device)(f"core@{number}", each.device.name, "cpu")
    assert len(plan(branches(8), contexts, ON, costs=SimulatedCosts()).devices) == 2


def test_performance_makes_a_pipeline_of_a_chain() -> None:
    graph = chain(*["Tanh"] * 20)
    found = plan(graph, devices("a", "b"), parse("performance"), costs=SimulatedCosts())
    check(found)
    assert set(found.devices) == {"a", "b"}
    assert found.predicted.period_s < 0.6 * found.predicted.latency_s
    assert len(plan(graph, devices("a", "b"), ON, costs=SimulatedCosts()).devices) == 1


def test_efficiency_prefers_the_device_that_draws_less() -> None:
    costs = SimulatedCosts({"fast": 1e-3, "frugal": 2e-3}, power={"fast": 40.0, "frugal": 5.0})
    for name, device in (("efficiency", "frugal"), ("latency", "fast")):
        found = plan(chain("Tanh", "Relu", "Neg"), devices("fast", "frugal"), parse(name), costs=costs)
        check(found)
        assert found.devices == (device,)
    unknown = SimulatedCosts({"fast": 1e-3, "frugal": 2e-3}, power={"frugal": 5.0})
    assert plan(chain("Tanh"), devices("fast", "frugal"), parse("efficiency"), costs=unknown).devices == ("fast",)


def test_what_nobody_runs_goes_to_the_cpu_with_the_reason() -> None:
    contexts = devices("npu", without=frozenset({"Neg"})) | devices(FALLBACK)
    found = plan(chain("Tanh", "Neg", "Relu"), contexts, parse("npu"), costs=SimulatedCosts({FALLBACK: 1e-6}))
    check(found)
    assert [part.device for part in found.parts] == ["npu", FALLBACK, "npu"]
    assert found.parts[1].why == "no chosen device runs this"
    assert found.parts[1].unsupported == {"npu": "Neg-13 is not implemented"}
    row = found.explain()[1]
    assert row["unsupported"] == {"npu": "Neg-13 is not implemented"}
    assert found.unsupported == {1: {"npu": "Neg-13 is not implemented"}}


def test_what_nobody_at_all_runs_is_refused_with_every_reason() -> None:
    contexts = devices("npu", "gpu", without=frozenset({"Neg"}))
    with pytest.raises(NotSupported, match=r"Neg-13.*npu: Neg-13 is not implemented; gpu: Neg-13") as caught:
        plan(chain("Tanh", "Neg"), contexts, ON, costs=SimulatedCosts())
    assert caught.value.hint
    halves = devices("npu", without=frozenset({"Neg"})) | devices("gpu", without=frozenset({"Tanh"}))
    with pytest.raises(NotSupported):
        plan(chain("Tanh", "Neg"), halves, costs=SimulatedCosts())  # off: nobody runs all of it
    assert len(plan(chain("Tanh", "Neg"), halves, ON, costs=SimulatedCosts()).parts) == 2


def test_devices_of_an_intent() -> None:
    contexts = devices("a", "ort:x@0", "ort:x@1")
    assert plan(chain("Tanh"), contexts, parse("ort:x@1"), costs=SimulatedCosts()).devices == ("ort:x@1",)
    found = plan(branches(8), contexts, parse("ort,a"), costs=SimulatedCosts({"a": 1.0}))
    assert set(found.devices) == {"ort:x@0", "ort:x@1"}
    with pytest.raises(InvalidArgument, match="'tpu'") as caught:
        plan(chain("Tanh"), contexts, parse("tpu"), costs=SimulatedCosts())
    assert "ort:x@0" in caught.value.hint
    with pytest.raises(InvalidArgument):
        plan(chain("Tanh"), {}, ON, costs=SimulatedCosts())


def _heavy() -> Graph:
    made = Builder()
    value = 0
    wide = TensorSpec(DType.F32, (64, 64))
    made.values[0] = Value("in0", wide)
    for number in range(8):
        value = made.add("MatMul", value, made.constant(number, 64), spec=wide)
    return made.graph(value)


def test_the_limit_of_memory_is_honoured() -> None:
    graph = _heavy()  # eight constants of 16 KiB
    whole = plan(graph, devices("a", "b"), ON, costs=SimulatedCosts({"b": 2e-3}))
    assert whole.devices == ("a",)
    assert whole.alternatives[0].memory_bytes["a"] >= 8 * 64 * 64 * 4
    limits = {"a": 140_000, "b": 140_000}
    found = plan(graph, devices("a", "b"), ON, costs=SimulatedCosts({"b": 2e-3}), memory_limits=limits)
    check(found)
    assert set(found.devices) == {"a", "b"}
    chosen = next(each for each in found.alternatives if each.name == found.name)
    assert all(size <= 140_000 for size in chosen.memory_bytes.values())
    assert any("are needed" in each.refused for each in found.alternatives if each.single)
    own = devices("a", memory_bytes=140_000) | devices("b")
    assert plan(graph, own, ON, costs=SimulatedCosts({"b": 1.0}), memory_limits={}).devices != ("a",)
    with pytest.raises(OutOfMemory, match=r"has 1000 bytes, \d+ are needed") as caught:
        plan(graph, devices("a", "b"), ON, costs=SimulatedCosts(), memory_limits={"a": 1000, "b": 1000})
    assert caught.value.hint


def test_values_of_unknown_size_do_not_cross() -> None:
    made = Builder()
    first = made.add("Tanh", 0)
    places = made.add("NonZero", first, spec=None)
    open_ = made.add("Neg", places, spec=TensorSpec(DType.I64, (2, None)))
    other = made.add("Relu", first)
    graph = made.graph(open_, other)
    contexts = devices("a", without=frozenset({"NonZero"})) | devices("b", without=frozenset({"Relu"}))
    found = plan(graph, contexts, ON, costs=SimulatedCosts())
    check(found)
    home = {node: part.device for part in found.parts for node in part.nodes}
    assert home[1] == home[2] == "b"
    torn = devices("a", without=frozenset({"NonZero"})) | devices("b", without=frozenset({"Neg"}))
    with pytest.raises(NotSupported):
        plan(graph, torn, ON, costs=SimulatedCosts())


def test_a_group_that_a_path_leaves_and_enters_again_has_the_path() -> None:
    made = Builder()
    a = made.add("NonZero", 0, spec=None)  # grouped with d
    b = made.add("Relu", 0)
    c = made.add("Neg", a, spec=SPEC)
    d = made.add("Add", a, c, spec=SPEC)
    graph = made.graph(d, b)
    found = plan(graph, devices("x", "y"), ON, costs=SimulatedCosts())
    check(found)


def test_nothing_to_do_and_nodes_that_nobody_needs() -> None:
    values = (Value("x", SPEC), Value("c", SPEC, np.zeros((4, 4), np.float32)))
    found = plan(Graph(values, (), (0,), (0, 1)), devices("a"), ON, costs=SimulatedCosts())
    assert found.parts == ()
    made = Builder()
    used = made.add("Tanh", 0)
    made.add("Exotic", 0)
    found = plan(made.graph(used), devices("a"), ON, costs=SimulatedCosts())
    check(found)
    assert found.dead == (1,)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_and_devices(seed: int) -> None:
    """Whatever is asked: pieces in order, each node once, never worse than a single device."""
    draw = random.Random(seed)
    made = Builder(draw.randint(1, 3))
    ops = ["Add", "Mul", "Tanh", "Relu", "Neg", "MatMul"]
    for _ in range(draw.randint(1, 60)):
        op = draw.choice(ops)
        near = len(made.values) - draw.randint(1, min(8, len(made.values)))
        inputs = [near] if op in ("Tanh", "Relu", "Neg") else [near, draw.randrange(len(made.values))]
        if op == "MatMul":
            inputs[1] = made.constant(seed)
        made.add(op, *inputs)
    outputs = {len(made.values) - 1} | {draw.randrange(len(made.inputs), len(made.values)) for _ in range(2)}
    graph = made.graph(*[each for each in outputs if made.values[each].data is None])
    names = ("a", "b", "c")[: draw.randint(1, 3)]
    contexts = {name: FakeDevice(name, frozenset(draw.sample(ops, draw.randint(0, 2)))) for name in names}
    contexts[FALLBACK] = FakeDevice(FALLBACK)
    times = {(name, op): draw.uniform(1e-6, 1e-3) for name in (*names, FALLBACK) for op in ops}
    costs = SimulatedCosts(times, launch=draw.choice([0, 1e-5, 1e-3]), hop=draw.choice([0, 1e-5, 1e-3]),
                           power={name: draw.uniform(1, 50) for name in contexts})  # fmt: skip
    for objective in Objective:
        intent = Intent(True, objective, () if seed % 2 else names)
        found = plan(graph, contexts, intent, costs=costs)
        check(found)
        json.dumps(found.to_dict())
        assert found.dot().count("fillcolor") == len(found.parts)


def test_names_of_others_do_not_break_out_of_the_drawing() -> None:
    spec = TensorSpec(DType.F32, (1,))
    evil = 'x"]; evil [label="\n\x1b[31m'
    graph = Graph((Value("x", spec), Value("y", spec)), (Node(evil, 1, (0,), (1,)),), (0,), (1,), name=evil)
    device = FakeDevice("a")
    device.supports = lambda node, graph: type(FakeDevice("b").supports(Node("Add", 1, (), ()), graph))(True)  # type: ignore[method-assign]
    drawn = plan(graph, {"a": device}, costs=SimulatedCosts()).dot()
    label = next(line for line in drawn.splitlines() if line.startswith("  p0"))
    assert '\\"]; evil' in label
    assert "\x1b" not in drawn
    assert label.endswith('fillcolor="#a6cee3"];')
