"""Measures on a device what the planner wants to know: one operator, its rates, a launch, a transfer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from ai_assistant.errors import AIAssistantError, NotSupported
from ai_assistant.hal.contract import Context, Program, Queue
from ai_assistant.hal.graph import Array, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.hetero.transfer import copy

SIZES = (4 << 10, 256 << 10, 4 << 20)
"""Bytes of the transfers that are measured; others lie between or beyond them."""
TIMEOUT_S = 30.0
_ROUND_S = 0.004
_ROUNDS = 5
_SIDE = 384
_ELEMENTS = 1 << 20
_WATTS_S = 0.5
_SLOW_S = 0.2
_RESIDENT_SIDE = 4096
_READ_ROWS, _READ_SIDE = 256, 2048
_SINCE = {"Relu": 14, "MatMul": 13, "Add": 14}


def sample(spec: TensorSpec, seed: int = 0) -> Array:
    """A made-up input: numbers in (0, 1], which no processor is slow with; zeros where they may be indices."""
    if spec.dtype is DType.BOOL:
        return np.ones(spec.sizes, np.bool_)
    if spec.dtype.value[0] != "f":
        return np.zeros(spec.sizes, spec.dtype.numpy)
    made = np.random.default_rng(seed).random(spec.sizes, np.float32)
    return np.ascontiguousarray((1 - made).astype(spec.dtype.numpy))


def undisturbed(times: Sequence[float]) -> float:
    """What of several measured times counts: the lower quartile.

    Whatever else the machine does at that moment only adds to them, and what was measured is remembered for long. The
    least of all is luck.
    """
    return sorted(times)[len(times) // 4]


def program_s(context: Context, queue: Queue, program: Program, *, each: bool = False) -> float:
    """Seconds of an undisturbed run of a program with made-up inputs.

    Args:
        each: wait for every run, as somebody does who needs the result; otherwise only for the last of many.

    Raises:
        AIAssistantError: it cannot be run, or not within half a minute.
    """
    inputs = [context.allocator.upload(sample(spec)) for spec in program.inputs]
    specs = program.output_specs([tensor.spec for tensor in inputs])
    outputs = [context.allocator.tensor(spec) for spec in specs]
    begin = time.perf_counter()
    queue.submit(program, inputs, outputs).wait(TIMEOUT_S)
    first = time.perf_counter() - begin
    count = 1 if each else max(1, min(1000, int(_ROUND_S / max(first, 1e-6))))
    rounds = _ROUNDS if not each else max(_ROUNDS, min(50, int(_ROUND_S * _ROUNDS / max(first, 1e-6))))
    if first > _SLOW_S:
        # Perhaps of compiling kernels, which a driver does on their first use, and not of computing.
        begin = time.perf_counter()
        queue.submit(program, inputs, outputs).wait(TIMEOUT_S)
        return time.perf_counter() - begin
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(count):
            event = queue.submit(program, inputs, outputs)
        event.wait(TIMEOUT_S)
        found.append((time.perf_counter() - begin) / count)
    return undisturbed(found)


def node_s(context: Context, queue: Queue, node: Node, graph: Graph, floor_s: float) -> float:
    """Seconds of one operator, without what every program takes (`floor_s`)."""
    alone = single_node(node, graph)
    program = context.compile(alone)
    try:
        return max(0.0, program_s(context, queue, program) - floor_s)
    finally:
        program.close()


def single_node(node: Node, graph: Graph) -> Graph:
    """A graph of one operator with the same constants.

    Raises:
        NotSupported: its types are not all known and fixed.
    """
    number = next((place for place, each in enumerate(graph.nodes) if each is node), -1)
    part, _, _ = graph.part((number,), "measured")
    if not all(spec.static for spec in (*part.input_specs, *part.output_specs)):
        raise NotSupported(f"the sizes of {node} are not fixed")
    return part


def rates(context: Context) -> tuple[float, float, float, float]:
    """Operations per second, bytes per second, seconds of a launch that is waited for, and of one among many.

    What the device does not support is 0.

    Raises:
        DeviceLost
    """
    queue = context.queue()
    try:
        tiny = TensorSpec(DType.F32, (1,))
        waited = _try(context, queue, "Relu", (tiny,), tiny, each=True)
        among = _try(context, queue, "Relu", (tiny,), tiny, each=False)
        square = TensorSpec(DType.F32, (_SIDE, _SIDE))
        product = _try(context, queue, "MatMul", (square, square), square, each=False)
        long = TensorSpec(DType.F32, (_ELEMENTS,))
        added = _try(context, queue, "Add", (long, long), long, each=False)
    finally:
        queue.close()
    flops = 2.0 * _SIDE**3 / max(product - among, 1e-9) if product else 0.0
    moved = 3.0 * long.nbytes / max(added - among, 1e-9) if added else 0.0
    return flops, moved, waited, among


def resident_rates(context: Context) -> tuple[float, float]:
    """Operations per second, and bytes per second, of products with constant matrices, which are on the device already.

    That is what a language model does: `rates` has its operands copied in each time, where that is needed. The first
    is that of many rows, as in reading a prompt, the second that of a single row, as in writing a token. What the
    device does not support is 0.

    Raises:
        DeviceLost
    """
    queue = context.queue()
    try:
        tiny = TensorSpec(DType.F32, (1,))
        among = _try(context, queue, "Relu", (tiny,), tiny, each=False)
        found = []
        for rows, side in ((_READ_ROWS, _READ_SIDE), (1, _RESIDENT_SIDE)):
            shape = TensorSpec(DType.F32, (rows, side))
            weights = np.full((side, side), 0.5, np.float32)
            seconds = _try(context, queue, "MatMul", (shape,), shape, each=False, constant=weights)
            found.append(max(seconds - among, 1e-9) if seconds else 0.0)
    finally:
        queue.close()
    many, single = found
    flops = 2.0 * _READ_ROWS * _READ_SIDE**2 / many if many else 0.0
    return flops, 4.0 * _RESIDENT_SIDE**2 / single if single else 0.0


def watts(context: Context) -> float | None:
    """What a device draws while it multiplies matrices: the median of readings; None where it tells nothing."""
    square = TensorSpec(DType.F32, (_SIDE, _SIDE))
    graph = _one("MatMul", (square, square), square)
    if not context.supports(graph.nodes[0], graph):
        return context.power_w()
    program = context.compile(graph)
    queue = context.queue()
    found = []
    try:
        inputs = [context.allocator.upload(sample(square, place)) for place in range(2)]
        output = context.allocator.tensor(square)
        end = time.perf_counter() + _WATTS_S
        while time.perf_counter() < end:
            events = [queue.submit(program, inputs, [output]) for _ in range(8)]
            events[0].wait(TIMEOUT_S)
            if (reading := context.power_w()) is not None:
                found.append(reading)
            events[-1].wait(TIMEOUT_S)
    finally:
        queue.close()
        program.close()
    return median(found) if found else None


def _one(op: str, inputs: Sequence[TensorSpec], output: TensorSpec, constant: Array | None = None) -> Graph:
    """A graph of one operator; a constant is its last operand."""
    values = [Value(f"x{place}", spec) for place, spec in enumerate(inputs)]
    places = tuple(range(len(inputs)))
    if constant is not None:
        values.append(Value("w", TensorSpec(DType.of(constant.dtype), constant.shape), constant))
    node = Node(op, _SINCE[op], tuple(range(len(values))), (len(values),))
    return Graph((*values, Value("y", output)), (node,), places, (len(values),))


def _try(
    context: Context,
    queue: Queue,
    op: str,
    inputs: Sequence[TensorSpec],
    output: TensorSpec,
    *,
    each: bool,
    constant: Array | None = None,
) -> float:
    graph = _one(op, inputs, output, constant)
    if not context.supports(graph.nodes[0], graph):
        return 0.0
    try:
        program = context.compile(graph)
        try:
            return program_s(context, queue, program, each=each)
        finally:
            program.close()
    except NotSupported:
        return 0.0


def transfer_s(source: Context, target: Context) -> tuple[float, ...]:
    """Seconds to bring `SIZES` bytes from one device to another, as the executor does."""
    found = []
    for size in SIZES:
        try:
            one = source.allocator.upload(np.zeros(size, np.uint8))
            other = target.allocator.tensor(TensorSpec(DType.U8, (size,)))
        except AIAssistantError:
            break
        times = []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            copy(source, one, target, other)
            times.append(time.perf_counter() - begin)
        found.append(undisturbed(times))
    return tuple(found)


def hop_s(source: Context, target: Context) -> float:
    """Seconds from the end of work on one device to the start of what waits for it on another."""
    first, second = source.queue(), target.queue()
    try:
        times = []
        for _ in range(20):
            stamps = [0.0, 0.0]

            def stamp(place: int, stamps: list[float] = stamps) -> None:
                stamps[place] = time.perf_counter()

            event = first.callback(lambda stamp=stamp: stamp(0))  # type: ignore[misc]
            second.wait(event)
            second.callback(lambda stamp=stamp: stamp(1)).wait(TIMEOUT_S)  # type: ignore[misc]
            times.append(max(0.0, stamps[1] - stamps[0]))
        return undisturbed(times)
    finally:
        first.close()
        second.close()
