"""The adapter around the C example: memory, views, queues, callbacks, events, closing, leaks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed, InvalidArgument, NotSupported, OutOfMemory, Timeout
from ai_assistant.hal.contract import Context, Event, Program, Tensor
from ai_assistant.hal.graph import Array, Attribute, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.host import HostQueue
from ai_assistant.hal.native import NativeBackend, abi
from ai_assistant.hal.native.graphs import NativeGraph

pytestmark = pytest.mark.engine
SPEC = TensorSpec(DType.F32, (4,))
X = np.array([-1, 2, -3, 4], np.float32)


def add_one(spec: TensorSpec = SPEC) -> Graph:
    one = np.ones((), np.float32)
    values = (Value("x", spec), Value("one", TensorSpec(DType.F32, ()), one), Value("y", spec))
    return Graph(values, (Node("Add", 14, (0, 1), (2,)),), (0,), (2,))


def tensors(device: Context, count: int) -> list[Tensor]:
    return [device.allocator.upload(X), *(device.allocator.tensor(SPEC) for _ in range(count - 1))]


def result(device: Context, program: Program, inputs: Sequence[Tensor], output: Tensor) -> list[float]:
    device.queue().submit(program, inputs, [output]).wait(30)
    made: list[float] = device.allocator.download(output).tolist()
    return made


def test_devices_and_capabilities(example: NativeBackend) -> None:
    assert (example.name, example.version) == ("example-c", "1.0")
    assert [each.id for each in example.probe().devices] == ["0"]
    with example.open() as device:
        assert device.capabilities.dtypes == {DType.F32, DType.I32, DType.I64}
        assert (device.capabilities.memory_bytes, device.capabilities.alignment) == (1 << 30, 64)
    for name in ("7", "\0", "x" * 9000, "\ud800"):
        with pytest.raises(NotSupported, match="no device"):
            example.open(name)


def test_a_graph_of_several_nodes_and_odd_outputs(example: NativeBackend) -> None:
    """An output that is an input, one that is a constant, and one value twice."""
    two = np.full(4, 2, np.float32)
    values = (Value("x", SPEC), Value("c", SPEC, two), Value("m", SPEC), Value("y", SPEC))
    nodes = (Node("Mul", 14, (0, 1), (2,)), Node("Add", 14, (2, 0), (3,)))
    graph = Graph(values, nodes, (0,), (3, 0, 1, 3, 2))
    with example.open() as device:
        x, *made = tensors(device, 6)
        device.queue().submit(device.compile(graph), [x], made).wait(30)
        found = [device.allocator.download(each) for each in made]
    for got, wanted in zip(found, (3 * X, X, two, 3 * X, 2 * X), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_memory_is_checked_counted_and_given_back(example: NativeBackend) -> None:
    with example.open() as device, example.open() as other:
        memory = device.allocator
        for nbytes, alignment in ((-1, 0), (4, 3), (4, -8), (4, 1 << 70)):
            with pytest.raises(InvalidArgument):
                memory.allocate(nbytes, alignment)
        for nbytes in ((1 << 30) + 1, 1 << 63, 1 << 80):
            with pytest.raises(OutOfMemory):
                memory.allocate(nbytes)
        buffer = memory.allocate(100, 4096)
        assert memory.statistics().in_use_bytes == 100
        for data, offset in ((bytes(101), 0), (b"x", 100), (b"x", -1), (b"x", 1 << 70)):
            with pytest.raises(InvalidArgument):
                memory.copy_in(buffer, data, offset)
            with pytest.raises(InvalidArgument):
                memory.copy_out(buffer, bytearray(data), offset)
        with pytest.raises(InvalidArgument):
            memory.copy_out(buffer, memoryview(bytes(4)))
        with pytest.raises(InvalidArgument):
            other.allocator.copy_in(buffer, b"x")
        buffer.free()
        buffer.free()
        with pytest.raises(InvalidArgument, match="freed"):
            memory.copy_in(buffer, b"x")
        memory.allocate(1 << 20)
        found = memory.statistics()
        assert (found.in_use_bytes, found.allocations, found.frees) == (0, 2, 2)
        assert found.peak_bytes == 1 << 20


def test_views_keep_memory_after_free_and_close(example: NativeBackend) -> None:
    device = example.open()
    tensor = device.allocator.upload(X)
    view = tensor.numpy()
    assert view.ctypes.data % 64 == 0
    tensor.buffer.free()
    assert device.allocator.statistics().in_use_bytes == 16
    shared = np.from_dlpack(view)
    device.close()
    device.close()
    del view
    gc.collect()
    assert shared.tolist() == X.tolist()
    with pytest.raises(InvalidArgument, match="closed"):
        device.allocator.allocate(4)
    for call in (device.queue, lambda: device.compile(add_one()), lambda: device.load(b"")):
        with pytest.raises(InvalidArgument, match="closed"):
            call()


def test_memory_of_the_host_is_used_where_it_is(example: NativeBackend) -> None:
    with example.open() as device:
        array, output = X.copy(), np.zeros(4, np.float32)
        given, made = device.allocator.adopt(array), device.allocator.adopt(output)
        result(device, device.compile(add_one()), [given], made)
        assert output.tolist() == (X + 1).tolist()
        assert device.allocator.statistics().in_use_bytes == 0
        with pytest.raises(NotSupported, match="gaps"):
            device.allocator.adopt(np.zeros((4, 4), np.float32)[:, ::2])
        with pytest.raises(NotSupported):
            device.allocator.adopt(object())


def test_tensors_that_do_not_fit_are_refused(example: NativeBackend) -> None:
    with example.open() as device, example.open() as other:
        program, queue = device.compile(add_one()), device.queue()
        x, y = tensors(device, 2)
        freed = device.allocator.upload(X)
        freed.buffer.free()
        wrong: list[tuple[list[Tensor], list[Tensor]]] = [
            ([], [y]), ([x, x], [y]), ([x], []), ([x], [y, y]), ([freed], [y]), ([other.allocator.upload(X)], [y]),
            ([Tensor(x.buffer, SPEC, 4)], [y]), ([Tensor(x.buffer, SPEC, -4)], [y]),
            ([Tensor(x.buffer, SPEC, 1 << 80)], [y]),
            ([Tensor(x.buffer, TensorSpec(DType.I32, (4,)))], [y]),
            ([Tensor(x.buffer, TensorSpec(DType.F32, (2, 2)))], [y]),
        ]  # fmt: skip
        for inputs, outputs in wrong:
            with pytest.raises(InvalidArgument):
                queue.submit(program, inputs, outputs)
        with pytest.raises(InvalidArgument):
            queue.submit(other.compile(add_one()), [x], [y])
        queue.submit(program, [x], [y]).wait(30)
        program.close()
        program.close()
        with pytest.raises(InvalidArgument, match="closed"):
            queue.submit(program, [x], [y])
        queue.close()
        for call in (queue.record, queue.synchronize, lambda: queue.callback(Gate())):
            with pytest.raises(InvalidArgument, match="closed"):
                call()


class Gate:
    """A callback that holds its queue until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.opened.wait(60)


def test_events_hold_across_queues_and_time_out(example: NativeBackend) -> None:
    with example.open() as device:
        program, gate = device.compile(add_one()), Gate()
        first, second, host = device.queue(), device.queue(), HostQueue("host")
        x, y, z = tensors(device, 3)
        first.callback(gate)
        middle = first.submit(program, [x], [y])
        second.wait(middle)
        last = second.submit(program, [y], [z])
        host.wait(last)
        end = host.record()
        assert [middle.done, last.done] == [False, False]
        for wait in (last.wait, second.synchronize, first.synchronize):
            with pytest.raises(Timeout):
                wait(0.01)
        gate.opened.set()
        end.wait(30)
        assert last.done
        assert device.allocator.download(z).tolist() == (X + 2).tolist()
        # The event of another backend is waited for too.
        late = HostQueue("late")
        gate = Gate()
        second.wait(late.callback(gate))
        held = second.record()
        assert not held.done
        gate.opened.set()
        held.wait(30)
        host.close()
        late.close()


def _readable(*events: Event) -> list[bool]:
    ready = select.select(events, [], [], 0)[0]
    return [each in ready for each in events]


def test_a_descriptor_is_readable_once_the_event_has_ended(example: NativeBackend) -> None:
    def broken() -> None:
        raise OutOfMemory("made to fail")

    with example.open() as device:
        queue, gate = device.queue(), Gate()
        queue.callback(gate)
        held, last = queue.record(), queue.callback(broken)
        assert held.fileno() == held.fileno() != last.fileno()
        assert _readable(held, last) == [False, False]
        gate.opened.set()
        assert select.select([held], [], [], 30)[0] == [held]
        assert select.select([last], [], [], 30)[0] == [last]
        over = queue.record()
        with pytest.raises(OutOfMemory):
            over.wait(30)
        queue.close()
        assert _readable(held, last, over) == [True, True, True]
        number = held.fileno()
        os.fstat(number)
        del held
        gc.collect()
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(number)


def test_a_callback_that_raises_fails_the_queue_until_that_was_told(example: NativeBackend) -> None:
    def broken() -> None:
        raise OutOfMemory("made to fail")

    def odd() -> None:
        raise ZeroDivisionError("odd")

    with example.open() as device:
        program, queue = device.compile(add_one()), device.queue()
        x, y = tensors(device, 2)
        device.allocator.copy_in(y.buffer, bytes(16))
        event = queue.callback(broken)
        after = queue.submit(program, [x], [y])
        for wait in (event.wait, after.wait, queue.synchronize):
            with pytest.raises(OutOfMemory, match="made to fail"):
                wait(30)
        assert device.allocator.download(y).tolist() == [0] * 4
        queue.synchronize(30)
        assert result(device, program, [x], y) == (X + 1).tolist()
        queue.callback(odd)
        with pytest.raises(BackendFailed, match="ZeroDivisionError: odd"):
            queue.synchronize(30)


def test_a_queue_does_not_take_the_processor_from_whoever_submits(example: NativeBackend) -> None:
    found: list[int] = []
    with example.open() as device:
        device.queue().callback(lambda: found.append(os.sched_getscheduler(0))).wait(30)
    assert (found, os.sched_getscheduler(0)) == ([os.SCHED_BATCH], os.SCHED_OTHER)


def test_a_queue_may_be_closed_and_dropped_by_its_own_callback(example: NativeBackend) -> None:
    ended = threading.Event()
    with example.open() as device:
        queues = [device.queue()]

        def end() -> None:
            queues.pop().close()
            ended.set()

        queue = queues[0]
        queue.callback(end)
        with contextlib.suppress(InvalidArgument):  # it may be closed already
            queue.synchronize(30)
        assert ended.wait(30)


def test_memory_stays_while_work_uses_it(example: NativeBackend) -> None:
    with example.open() as device:
        program, queue, gate = device.compile(add_one()), device.queue(), Gate()
        x, y = tensors(device, 2)
        queue.callback(gate)
        event = queue.submit(program, [x], [y])
        program.close()
        x.buffer.free()
        del program, x
        gc.collect()
        assert device.allocator.statistics().in_use_bytes == 32
        gate.opened.set()
        event.wait(30)
        assert device.allocator.statistics().in_use_bytes == 16
        assert device.allocator.download(y).tolist() == (X + 1).tolist()


def test_threads_submit_one_program_to_many_queues(example: NativeBackend) -> None:
    with example.open() as device:
        program = device.compile(add_one())
        wrong: list[str] = []

        def work(number: int) -> None:
            queue = device.queue()
            x = device.allocator.upload(X * number)
            chain = [x, *(device.allocator.tensor(SPEC) for _ in range(200))]
            for before, after in pairwise(chain):
                queue.submit(program, [before], [after])
            queue.synchronize(60)
            if device.allocator.download(chain[-1]).tolist() != (X * number + 200).tolist():
                wrong.append(f"thread {number}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_nothing_leaks(example: NativeBackend) -> None:
    with example.open() as device:
        program = device.compile(add_one())
        start = device.allocator.statistics()
        for _ in range(50):
            queue = device.queue()
            x, y = tensors(device, 2)
            for _ in range(20):
                queue.submit(program, [x], [y])
            queue.close()
        del x, y, queue
        gc.collect()
        end = device.allocator.statistics()
        assert end.in_use_bytes == start.in_use_bytes
        assert end.allocations - start.allocations == end.frees - start.frees == 100


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("zero\0", {}),
        ("x" * 5000, {}),
        ("Relu", {"big": 1 << 63}),
        ("Relu", {"mixed": (1, "a")}),
        ("Relu", {"na\0me": 1}),
    ],
)
def test_what_does_not_fit_c_is_refused(example: NativeBackend, name: str, attributes: dict[str, Attribute]) -> None:
    graph = Graph((Value("x", SPEC), Value("y", SPEC)), (Node(name, 14, (0,), (1,), attributes),), (0,), (1,))
    with example.open() as device:
        support = device.supports(graph.nodes[0], graph)
        assert not support
        assert support.reason
        with pytest.raises(NotSupported):
            device.compile(graph)


def test_a_graph_is_what_c_sees() -> None:
    """Every kind of attribute, an input left out, a size that is not known, a constant of zero bytes."""
    tensor: Array = np.arange(6, dtype=np.int64).reshape(2, 3)
    attributes: dict[str, Attribute] = {
        "i": 7, "f": 0.1, "s": "text", "b": b"a\0b", "is": (1, -2), "fs": (0.5, 2.0), "ss": ("p", "q"),
        "none": (), "t": tensor,
    }  # fmt: skip
    values = (
        Value("x", TensorSpec(DType.F16, (2, None))),
        Value("c", None, np.zeros((0, 2), np.float32)),
        Value("y", None),
    )
    graph = Graph(
        values, (Node("Op", 3, (0, -1, 1), (2,), attributes, "com.example", "n"),), (0,), (2,), {"": 21, "d": 2}
    )
    native = NativeGraph(graph)
    struct = native.struct
    assert (struct.value_count, struct.node_count, struct.opset_count) == (3, 1, 2)

    def at(address: int, kind: Any, count: int) -> list[int]:
        return list((kind * count).from_address(address))

    found = [abi.Value.from_address(each) for each in at(struct.values, ctypes.c_void_p, 3)]
    assert (found[0].spec.dtype, at(found[0].spec.dims, ctypes.c_int64, 2)) == (10, [2, -1])
    assert found[1].data
    assert found[1].nbytes == 0
    assert found[2].spec.dtype == 0
    node = abi.Node.from_address(at(struct.nodes, ctypes.c_void_p, 1)[0])
    assert (node.domain, node.op, node.version) == (b"com.example", b"Op", 3)
    assert at(node.inputs, ctypes.c_int32, 3) == [0, -1, 1]
    pointers = at(node.attributes, ctypes.c_void_p, node.attribute_count)
    named = {each.name.decode(): each for each in map(abi.Attribute.from_address, pointers)}
    assert {name: (each.type, each.count) for name, each in named.items()} == {
        "i": (1, 1), "f": (2, 1), "s": (3, 1), "b": (3, 1), "is": (4, 2), "fs": (5, 2), "ss": (6, 2),
        "none": (4, 0), "t": (7, 1),
    }  # fmt: skip
    assert at(named["is"].ints, ctypes.c_int64, 2) == [1, -2]
    assert at(named["f"].floats, ctypes.c_double, 1) == [0.1]
    raw = abi.Bytes.from_address(named["b"].strings)
    assert ctypes.string_at(raw.data, raw.length) == b"a\0b"
    constant = abi.Value.from_address(named["t"].tensor)
    assert ctypes.string_at(constant.data, constant.nbytes) == tensor.tobytes()
