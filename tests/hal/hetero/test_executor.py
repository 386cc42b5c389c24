"""Running plans: results, overlap, several requests, cancelling, devices that go away."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import (
    BackendFailed,
    Cancelled,
    DeviceLost,
    InvalidArgument,
    NotSupported,
    OutOfMemory,
    Timeout,
)
from ai_assistant.hal.graph import Array, DType, Graph, TensorSpec
from ai_assistant.hal.hetero import planner
from ai_assistant.hal.hetero.executor import Executor
from ai_assistant.hal.hetero.intent import parse
from ai_assistant.hal.hetero.plans import Plan
from tests.hal.hetero.fakes import Builder, FakeDevice, Gate, SimulatedCosts, branches, chain, expected

ON = parse("ON")
X = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)


def two(**options: Any) -> dict[str, FakeDevice]:
    log: list[tuple[str, str]] = []
    return {name: FakeDevice(name, log=log, **options) for name in ("a", "b")}


def divided(graph: Graph, contexts: dict[str, FakeDevice], intent: str = "ON") -> Plan:
    found = planner.plan(graph, contexts, parse(intent), costs=SimulatedCosts())
    assert len(found.devices) > 1
    return found


def same(found: list[Array], graph: Graph, *inputs: Array) -> None:
    for mine, theirs in zip(found, expected(graph, inputs), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize("distant", [(), ("a",), ("b",), ("a", "b")])
def test_results_are_those_of_one_device(distant: tuple[str, ...]) -> None:
    graph = branches(4)
    contexts = {name: FakeDevice(name, distant=name in distant) for name in ("a", "b")}
    with Executor(divided(graph, contexts)) as executor:
        for number in range(5):
            x = X * np.float32(number + 1)
            same(executor.run([x], 20), graph, x)
            same(executor.run({"in0": x}, 20), graph, x)


def test_what_is_not_divided_runs_too() -> None:
    graph = branches(2)
    with Executor(planner.plan(graph, two(), costs=SimulatedCosts())) as executor:
        assert len(executor.plan.parts) == 1
        same(executor.run([X], 20), graph, X)


def test_results_are_the_callers_own() -> None:
    graph = branches(2)
    with Executor(divided(branches(8), two()), depth=1) as executor:
        first = executor.run([X], 20)
        kept = first[0].copy()
        executor.run([X * np.float32(3)], 20)
        assert np.array_equal(first[0], kept)
        first[0][:] = 0
    del graph


def test_inputs_and_constants_may_be_outputs() -> None:
    made = Builder(2)
    constant = made.constant()
    graph = made.graph(0, made.add("Tanh", 1), constant, 0)
    with Executor(planner.plan(graph, two(), costs=SimulatedCosts())) as executor:
        x, y, c, again = executor.run([X, X + 1], 20)
    assert np.array_equal(x, X)
    assert np.array_equal(again, X)
    assert np.array_equal(c, graph.values[constant].data)  # type: ignore[arg-type]
    assert np.allclose(y, np.tanh(X + 1))


def test_open_sizes_are_found_out_at_run_time() -> None:
    made = Builder()
    found = made.add("NonZero", made.add("Relu", 0), spec=TensorSpec(DType.I64, (2, None)))
    graph = made.graph(found)
    with Executor(planner.plan(graph, two(), ON, costs=SimulatedCosts())) as executor:
        # NonZero's size depends on the values, which this device answers with those of zeros.
        (places,) = executor.run([np.zeros((4, 4), np.float32)], 20)
        assert places.shape == (2, 0)


@pytest.mark.parametrize(
    "inputs",
    [
        [], [X, X], [X.astype(np.float64)], [X[:2]], [X[0]], [None], ["x"], [X.tolist()],
        {"in0": X, "no": X}, {}, {"no": X},
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_and_the_next_request_works(inputs: Any) -> None:
    graph = branches(2)
    with Executor(planner.plan(graph, two(), costs=SimulatedCosts())) as executor:
        with pytest.raises(InvalidArgument):
            executor.run(inputs)
        same(executor.run([np.asfortranarray(X)], 20), graph, X)
        assert np.isnan(executor.run([X * np.float32("nan")], 20)[0]).all()


def test_two_devices_work_at_the_same_time() -> None:
    """Each branch waits until the other has begun: without an overlap nobody would go on."""
    contexts = two()
    graph = branches(8)
    found = divided(graph, contexts)
    meeting = threading.Barrier(2)

    def meet(part: Graph) -> None:
        if sum(node.op == "MatMul" for node in part.nodes) == 8:
            meeting.wait(20)

    for each in contexts.values():
        each.before_run = meet
    with Executor(found) as executor:
        same(executor.run([X], 30), graph, X)


def test_requests_follow_each_other_through_a_pipeline() -> None:
    """The second request's first stage runs while the first one's second stage does."""
    contexts = two()
    graph = chain(*["Tanh"] * 20)
    found = divided(graph, contexts, "performance")
    first, second = found.parts[0].device, found.parts[1].device
    gate, begun = Gate(), threading.Semaphore(0)
    contexts[second].before_run = gate
    contexts[first].before_run = lambda graph: begun.release()
    with Executor(found, depth=2) as executor:
        runs = [executor.submit([X]), executor.submit([X + 1])]
        assert gate.waiting.acquire(timeout=20)
        assert begun.acquire(timeout=20)
        assert begun.acquire(timeout=20)
        with pytest.raises(Timeout):
            executor.submit([X], timeout_s=0.01)
        with pytest.raises(Timeout):
            runs[0].result(0.01)
        assert not runs[0].done
        gate.open.set()
        same(runs[1].result(20), graph, X + 1)
        same(runs[0].result(20), graph, X)
        same(runs[0].result(20), graph, X)  # again is no error


def test_a_stage_has_its_device_for_itself() -> None:
    """Shared, all requests in flight would end it at the same moment, and then all wait for the next device."""
    contexts = two()
    graph = chain(*["Tanh"] * 20)
    found = divided(graph, contexts, "performance")
    gate = Gate()
    contexts[found.parts[0].device].before_run = gate
    with Executor(found, depth=3) as executor:
        runs = [executor.submit([X + number]) for number in range(3)]
        assert gate.waiting.acquire(timeout=20)
        assert not gate.waiting.acquire(timeout=0.2)
        gate.open.set()
        for number, run in enumerate(runs):
            same(run.result(20), graph, X + number)


def test_requests_in_turn_do_not_fail_of_each_other() -> None:
    contexts = two()
    graph = chain(*["Tanh"] * 20)
    found = divided(graph, contexts, "performance")
    gate, calls = Gate(), iter(range(9))

    def fail_first(part: Graph) -> None:
        number = next(calls)
        gate(part)
        if not number:
            raise ZeroDivisionError("by design")

    contexts[found.parts[0].device].before_run = fail_first
    with Executor(found, depth=3) as executor:
        runs = [executor.submit([X + number]) for number in range(3)]
        gate.open.set()
        with pytest.raises(BackendFailed, match="by design"):
            runs[0].result(20)
        for number in (2, 1):
            same(runs[number].result(20), graph, X + number)


def test_many_threads() -> None:
    graph = branches(4)
    wrong: list[int] = []
    with Executor(divided(graph, two()), depth=3) as executor:

        def ask(seed: int) -> None:
            for number in range(20):
                x = np.full((4, 4), seed + number / 100, np.float32)
                if not np.allclose(executor.run([x], 60)[0], expected(graph, [x])[0]):
                    wrong.append(seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong


def test_what_was_cancelled_does_not_begin() -> None:
    contexts = two()
    found = divided(chain(*["Tanh"] * 20), contexts, "performance")
    gate = Gate()
    contexts[found.parts[0].device].before_run = gate
    with Executor(found, depth=2) as executor:
        run, other = executor.submit([X]), executor.submit([X])
        assert gate.waiting.acquire(timeout=20)
        run.cancel()
        run.cancel()
        gate.open.set()
        with pytest.raises(Cancelled):
            run.result(20)
        other.result(20)
        assert [device for device, _ in contexts["a"].log].count(found.parts[1].device) == 1
        executor.run([X], 20)
        executor.run([X], 20)


def test_a_request_that_nobody_waits_for_gives_its_place_back() -> None:
    graph = branches(4)
    with Executor(divided(graph, two()), depth=1) as executor:
        for _ in range(3):
            executor.submit([X], 20)
            gc.collect()
        same(executor.run([X], 20), graph, X)


def test_a_failure_is_that_of_one_request_only() -> None:
    contexts = two()
    graph = branches(8)
    found = divided(graph, contexts)
    broken = [True]

    def fail(part: Graph) -> None:
        if broken[0]:
            raise ZeroDivisionError("by design")

    contexts["b"].before_run = fail
    with Executor(found, depth=1) as executor:
        with pytest.raises(BackendFailed, match="by design"):
            executor.run([X], 20)
        broken[0] = False
        same(executor.run([X], 20), graph, X)
        assert executor.plan is found


@pytest.mark.parametrize("lost", ["a", "b"])
@pytest.mark.parametrize("distant", [False, True])
def test_a_lost_device_is_replaced_and_the_request_repeated(
    lost: str, distant: bool, caplog: pytest.LogCaptureFixture
) -> None:
    contexts = two(distant=distant)
    graph = branches(8)
    found = divided(graph, contexts)
    gone = threading.Event()

    def lose(part: Graph) -> None:
        if gone.is_set():
            raise DeviceLost("unplugged")

    contexts[lost].before_run = lose
    with Executor(found, depth=2) as executor, caplog.at_level(logging.WARNING):
        same(executor.run([X], 20), graph, X)
        gone.set()
        runs = [executor.submit([X]), executor.submit([X + 1])]
        same(runs[0].result(20), graph, X)
        same(runs[1].result(20), graph, X + 1)
        assert executor.plan.devices == ("b" if lost == "a" else "a",)
        same(executor.run([X], 20), graph, X)
    assert f"{lost} was lost (unplugged)" in caplog.text
    assert caplog.text.count("was lost") == 1


def test_the_last_device_is_lost() -> None:
    contexts = two()
    found = divided(branches(8), contexts)

    def lose(part: Graph) -> None:
        raise DeviceLost("unplugged", hint="plug it in")

    for each in contexts.values():
        each.before_run = lose
    with Executor(found) as executor:
        for _ in range(2):
            with pytest.raises(DeviceLost, match="unplugged"):
                executor.run([X], 20)


def test_nobody_can_take_over() -> None:
    contexts = {"a": FakeDevice("a"), "b": FakeDevice("b", without=frozenset({"Neg"}))}

    def lose(part: Graph) -> None:
        raise DeviceLost("unplugged")

    contexts["a"].before_run = lose
    found = planner.plan(chain("Neg"), contexts, ON, costs=SimulatedCosts())
    with Executor(found) as executor, pytest.raises(DeviceLost, match=r"a was lost.*Neg-13 is not implemented"):
        executor.run([X], 20)


def test_devices_that_were_not_asked_for_take_over_in_the_end() -> None:
    contexts = two()

    def lose(part: Graph) -> None:
        raise DeviceLost("unplugged")

    contexts["a"].before_run = lose
    graph = chain("Tanh")
    with Executor(planner.plan(graph, contexts, parse("a"), costs=SimulatedCosts())) as executor:
        same(executor.run([X], 20), graph, X)
        assert executor.plan.devices == ("b",)


def test_a_device_that_is_lost_before_anything_runs() -> None:
    contexts = two()
    graph = branches(8)
    found = divided(graph, contexts)
    contexts["b"].compile_error = DeviceLost("unplugged")
    with Executor(found) as executor:
        assert executor.plan.devices == ("a",)
        same(executor.run([X], 20), graph, X)
    contexts["a"].compile_error = BackendFailed("by design")
    with pytest.raises(BackendFailed):
        Executor(planner.plan(graph, {"a": contexts["a"]}, costs=SimulatedCosts()))


def test_as_many_at_a_time_as_devices_allow() -> None:
    graph = branches(8)
    with Executor(divided(graph, two(queues=2)), depth=8) as executor:
        assert executor.depth == 2
    contexts = two(memory_bytes=10_000)
    with Executor(divided(graph, contexts), depth=16) as executor:
        assert 1 < executor.depth <= 16
        assert all(each.allocator.statistics().in_use_bytes <= 10_000 for each in contexts.values())
        same(executor.run([X], 20), graph, X)
    gc.collect()
    assert all(each.allocator.statistics().in_use_bytes == 0 for each in contexts.values())
    exhausted = two(queues=1)
    found = divided(graph, exhausted)
    exhausted["a"].queue()
    with pytest.raises(NotSupported, match="no further queue"):
        Executor(found)
    for depth in (-1, 17):
        with pytest.raises(InvalidArgument):
            Executor(divided(graph, two()), depth=depth)


def test_memory_that_is_not_there_is_said_at_once() -> None:
    graph = branches(8)
    found = divided(graph, two())
    small = {name: FakeDevice(name, memory_bytes=100) for name in ("a", "b")}
    with pytest.raises(OutOfMemory):
        planner.plan(graph, small, ON, costs=SimulatedCosts())
    object.__setattr__(found, "contexts", small)
    with pytest.raises(OutOfMemory, match="bytes were asked for"):
        Executor(found)


def test_a_closed_executor_says_so() -> None:
    executor = Executor(divided(branches(8), two()))
    run = executor.submit([X], 20)
    executor.close()
    executor.close()
    same(run.result(20), branches(8), X)
    with pytest.raises(InvalidArgument, match="closed"):
        executor.run([X])


def test_buffers_are_used_again() -> None:
    contexts = two()
    with Executor(divided(branches(8), contexts), depth=1) as executor:
        executor.run([X], 20)
        before = [each.allocator.statistics().allocations for each in contexts.values()]
        for _ in range(10):
            executor.run([X], 20)
        assert [each.allocator.statistics().allocations for each in contexts.values()] == before
