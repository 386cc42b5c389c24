"""Memory and queues of the host: order, failures, and what does not fit."""

from __future__ import annotations

import gc
import os
import select
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed, Busy, InvalidArgument, InvalidModel, NotSupported, OutOfMemory, Timeout
from ai_assistant.hal.contract import Tensor
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue

_PAIR = TensorSpec(DType.F32, (2,))


class _Double(HostProgram):
    inputs = outputs = (_PAIR,)

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return self.outputs

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        np.multiply(inputs[0].numpy(), np.float32(2), out=outputs[0].numpy())


class _Fail(_Double):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        raise ZeroDivisionError("by design")


@pytest.fixture
def memory() -> HostAllocator:
    return HostAllocator(limit_bytes=1000)


@pytest.fixture
def queue() -> Iterator[HostQueue]:
    queue = HostQueue()
    yield queue
    queue.close()


def test_memory_is_aligned_limited_and_counted(memory: HostAllocator) -> None:
    first = memory.allocate(600, 256)
    assert first.memory is not None
    assert first.memory.ctypes.data % 256 == 0
    with pytest.raises(OutOfMemory, match="600 bytes were asked for, 400 are left"):
        memory.allocate(600)
    memory.free(first)
    memory.free(first)
    with pytest.raises(InvalidArgument, match="was freed"):
        memory.copy_in(first, b"x")
    memory.allocate(0)
    gc.collect()
    assert memory.statistics().in_use_bytes == 0
    assert memory.statistics().peak_bytes == 600
    assert memory.statistics().allocations == memory.statistics().frees == 2


@pytest.mark.parametrize(("nbytes", "alignment"), [(-1, 0), (1, 3), (1, -8), (1, 1 << 40)])
def test_impossible_memory_is_refused(memory: HostAllocator, nbytes: int, alignment: int) -> None:
    with pytest.raises(InvalidArgument):
        memory.allocate(nbytes, alignment)


def test_copies_stay_inside(memory: HostAllocator) -> None:
    buffer = memory.allocate(8)
    memory.copy_in(buffer, b"abcd", 4)
    into = bytearray(4)
    memory.copy_out(buffer, into, 4)
    assert into == b"abcd"
    for offset in (-1, 5, 1 << 62):
        with pytest.raises(InvalidArgument):
            memory.copy_in(buffer, b"abcd", offset)
        with pytest.raises(InvalidArgument):
            memory.copy_out(buffer, into, offset)
    with pytest.raises(InvalidArgument):
        memory.view(Tensor(buffer, TensorSpec(DType.F32, (3,))))
    with pytest.raises(InvalidArgument):
        HostAllocator().copy_in(buffer, b"x")


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_an_array_goes_up_and_comes_down_with_its_shape(memory: HostAllocator, shape: tuple[int, ...]) -> None:
    array = np.arange(max(1, int(np.prod(shape))), dtype=np.float32).reshape(shape)
    tensor = memory.upload(array)
    assert tensor.spec == TensorSpec(DType.F32, shape)
    assert np.array_equal(memory.download(tensor), array)


def test_memory_of_others_is_used_in_place(memory: HostAllocator) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = memory.adopt(array)
    tensor.numpy()[1, 2] = 42
    assert array[1, 2] == 42
    assert np.shares_memory(np.from_dlpack(tensor), array)
    with pytest.raises(NotSupported):
        memory.adopt(array.T)
    with pytest.raises(NotSupported):
        memory.adopt("no tensor")
    assert memory.statistics().in_use_bytes == 0


def test_a_number_stays_a_number(memory: HostAllocator) -> None:
    tensor = memory.upload(np.array(3.0, np.float32))
    assert tensor.spec.shape == ()
    assert memory.download(tensor).shape == ()


def test_a_queue_runs_in_order_and_waits_for_another(memory: HostAllocator, queue: HostQueue) -> None:
    a, b, c = memory.upload(np.array([1, 2], np.float32)), memory.tensor(_PAIR), memory.tensor(_PAIR)
    gate = threading.Event()
    other = HostQueue()

    def wait() -> None:
        gate.wait(10)

    other.callback(wait)
    queue.wait(other.record())
    queue.submit(_Double(), [a], [b])
    last = queue.submit(_Double(), [b], [c])
    assert not last.done
    with pytest.raises(Timeout):
        last.wait(0.01)
    gate.set()
    last.wait(10)
    assert memory.download(c).tolist() == [4, 8]
    other.close()


def test_a_failure_fails_what_follows_until_it_was_told(memory: HostAllocator, queue: HostQueue) -> None:
    a, b = memory.upload(np.array([1, 2], np.float32)), memory.tensor(_PAIR)
    queue.submit(_Fail(), [a], [b])
    after = queue.submit(_Double(), [a], [b])
    with pytest.raises(BackendFailed, match="by design"):
        after.wait(10)
    with pytest.raises(BackendFailed, match="by design"):
        queue.synchronize(10)
    queue.submit(_Double(), [a], [b]).wait(10)
    queue.synchronize(10)


def test_tensors_that_do_not_fit_are_refused_at_once(memory: HostAllocator, queue: HostQueue) -> None:
    good = memory.tensor(_PAIR)
    for wrong in (TensorSpec(DType.F32, (3,)), TensorSpec(DType.I32, (2,)), TensorSpec(DType.F32, (2, 1))):
        with pytest.raises(InvalidArgument):
            queue.submit(_Double(), [memory.tensor(wrong)], [good])
    with pytest.raises(InvalidArgument):
        queue.submit(_Double(), [], [good])
    with pytest.raises(InvalidArgument):
        queue.submit(_Double(), [Tensor(good.buffer, _PAIR, 4)], [good])
    queue.close()
    with pytest.raises(InvalidArgument):
        queue.submit(_Double(), [good], [good])


def test_a_graph_that_contradicts_itself_is_refused() -> None:
    values = (Value("x", _PAIR), Value("y", _PAIR))
    relu = Node("Relu", 14, (0,), (1,))
    Graph(values, (relu,), (0,), (1,))
    for nodes, inputs, outputs in [
        ((relu,), (), (1,)),  # used before it is made
        ((relu, relu), (0,), (1,)),  # made twice
        ((Node("Relu", 14, (0,), (7,)),), (0,), (1,)),
        ((Node("Relu", 14, (-5,), (1,)),), (0,), (1,)),
        ((relu,), (0, 0), (1,)),
        ((relu,), (9,), (1,)),
        ((), (0,), (1,)),
        ((relu,), (0,), ()),
    ]:
        with pytest.raises(InvalidModel):
            Graph(values, nodes, inputs, outputs)


def test_a_part_of_a_graph_knows_its_edges() -> None:
    weight = np.ones(2, np.float32)
    values = (Value("x", _PAIR), Value("w", _PAIR, weight), *(Value(name, _PAIR) for name in "abcd"))
    graph = Graph(
        values,
        (
            Node("Mul", 14, (0, 1), (2,)),
            Node("Relu", 14, (2,), (3,)),
            Node("Add", 14, (3, 1), (4,)),
            Node("Sub", 14, (2, 4), (5,)),
        ),
        (0,),
        (5,),
    )
    part, inputs, outputs = graph.part((1, 2))
    assert ([str(node) for node in part.nodes], inputs, outputs) == (["Relu-14", "Add-14"], (2,), (4,))
    assert [value.name for value in part.values if value.data is not None] == ["w"]
    whole, inputs, outputs = graph.part((0, 1, 2, 3))
    assert (len(whole.nodes), inputs, outputs) == (4, (0,), (5,))


def test_a_queue_does_not_take_the_processor_from_whoever_submits(queue: HostQueue) -> None:
    found: list[int] = []
    queue.callback(lambda: found.append(os.sched_getscheduler(0))).wait(30)
    assert (found, os.sched_getscheduler(0)) == ([os.SCHED_BATCH], os.SCHED_OTHER)


def test_a_thread_that_must_stay_on_a_processor_is_left_as_it_is(
    queue: HostQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 1} if thread else {1})
    found: list[int] = []
    queue.callback(lambda: found.append(os.sched_getscheduler(0))).wait(30)
    assert found == [os.SCHED_OTHER]


def test_a_thread_that_may_not_change_how_it_is_scheduled_works(
    queue: HostQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    queue.callback(lambda: None).wait(30)
    queue.synchronize(30)


def test_a_descriptor_is_readable_once_the_event_has_ended(queue: HostQueue) -> None:
    gate = threading.Event()

    def hold() -> None:
        gate.wait(30)

    queue.callback(hold)
    held = queue.record()
    assert held.fileno() == held.fileno()
    assert select.select([held], [], [], 0)[0] == []
    gate.set()
    assert select.select([held], [], [], 30)[0] == [held]
    queue.synchronize(30)
    over = queue.record()
    over.wait(30)
    assert select.select([held, over], [], [], 0)[0] == [held, over]
    number = held.fileno()
    del held
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(number)


def test_where_there_are_no_descriptors_the_event_works(queue: HostQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(24, "Too many open files")

    event = queue.record()
    monkeypatch.setattr(os, "eventfd", refused)
    with pytest.raises(Busy, match="Too many"):
        event.fileno()
    event.wait(30)
