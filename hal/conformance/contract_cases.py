"""L1 of every backend: that it keeps to the contract where it is asked something wrong, odd or impossible."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from ai_assistant.errors import AIAssistantError, InvalidArgument, InvalidModel, NotSupported
from ai_assistant.hal.conformance.case import CaseFailed, Cases, Unsupported, expect
from ai_assistant.hal.conformance.subject import WAIT_S, Subject, refused, single
from ai_assistant.hal.contract import Capabilities, Probe, Tensor
from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.operators import Support

CASES = Cases()
_F32 = TensorSpec(DType.F32, (4,))


@CASES.case("L1.identity")
def identity(subject: Subject) -> None:
    """The backend has a name and a version."""
    name, version = subject.backend.name, subject.backend.version
    expect(isinstance(name, str) and name.isprintable() and 0 < len(name) <= 64, "the name is no short printable text")
    expect(
        isinstance(version, str) and version.isprintable() and 0 < len(version) <= 64, "the version is no short text"
    )


@CASES.case("L1.probe")
def probe(subject: Subject) -> None:
    """Probing finds the same devices twice, each with its own id, name and kind."""
    first, second = subject.backend.probe(), subject.backend.probe()
    expect(isinstance(first, Probe), "probe gives no Probe")
    expect(bool(first), f"there is no device: {first.unavailable}")
    expect(first.devices == second.devices, "probing twice finds different devices")
    ids = [device.id for device in first.devices]
    expect(len(set(ids)) == len(ids), "two devices have the same id")
    expect(
        all(device.id and device.name and device.kind for device in first.devices), "a device has no id, name or kind"
    )


@CASES.case("L1.open.unknown")
def open_unknown(subject: Subject) -> None:
    """A device that does not exist is refused."""
    for name in ("no such device", "\x00", "../../etc", "9" * 5000):
        refused(NotSupported, f"opening the device {name[:16]!r}", subject.backend.open, name)


@CASES.case("L1.open.again")
def open_again(subject: Subject) -> None:
    """A device is opened and closed over and over, and closing twice does no harm."""
    for _ in range(5):
        context = subject.backend.open(subject.device)
        context.allocator.allocate(64).free()
        context.queue().synchronize(10)
        context.close()
        context.close()


@CASES.case("L1.capabilities")
def capabilities(subject: Subject) -> None:
    """The capabilities make sense."""
    with subject.context() as context:
        found = context.capabilities
        expect(isinstance(found, Capabilities), "capabilities are no Capabilities")
        expect(bool(found.dtypes) and all(isinstance(each, DType) for each in found.dtypes), "there are no data types")
        power = found.alignment > 0 and found.alignment & (found.alignment - 1) == 0
        expect(power, f"an alignment of {found.alignment} is no power of two")
        expect(found.memory_bytes >= 0 and found.max_queues >= 0, "a limit is negative")
        watts = context.power_w()
        if found.reads_power:
            expect(
                watts is not None and math.isfinite(watts) and watts >= 0, f"power is said to be read, and is {watts}"
            )


@CASES.case("L1.allocate.arguments")
def allocate_arguments(subject: Subject) -> None:
    """Impossible sizes and alignments are refused."""
    with subject.context() as context:
        for size in (-1, -(1 << 62)):
            refused(InvalidArgument, f"{size} bytes", context.allocator.allocate, size)
        for alignment in (3, 12, -8, 100):
            refused(
                InvalidArgument,
                f"an alignment of {alignment}",
                context.allocator.allocate,
                64,
                alignment,
            )
        expect(context.allocator.allocate(0).nbytes == 0, "0 bytes are allowed, and were not given")


@CASES.case("L1.submit.arguments")
def submit_arguments(subject: Subject) -> None:
    """Tensors that do not fit a program are refused, and nothing runs."""
    with subject.context() as context:
        work = subject.work(context, (16,))
        queue = context.queue()
        arrays = work.arrays(subject.random())
        inputs = [context.allocator.upload(array) for array in arrays]
        output = context.allocator.tensor(work.output)
        context.allocator.copy_in(output.buffer, np.full(work.made, 7, np.float32))
        first, rest = inputs[0], inputs[1:]
        longer = (*work.shapes[0][:-1], work.shapes[0][-1] + 1)
        wrong = {
            "no input": [],
            "an input too many": [*inputs, first],
            "another type": [Tensor(first.buffer, TensorSpec(DType.I32, work.shapes[0])), *rest],
            "another rank": [Tensor(first.buffer, TensorSpec(DType.F32, (1, 1, *work.shapes[0]))), *rest],
            "another shape": [context.allocator.tensor(TensorSpec(DType.F32, longer)), *rest],
            "a tensor past the end of its buffer": [Tensor(first.buffer, first.spec, 4), *rest],
            "a tensor before its buffer": [Tensor(first.buffer, first.spec, -4), *rest],
        }
        for what, tensors in wrong.items():
            refused(InvalidArgument, what, queue.submit, work.program, tensors, [output])
        for what, tensors in {"no output": [], "an output too many": [output, output]}.items():
            refused(InvalidArgument, what, queue.submit, work.program, inputs, tensors)
        small = Tensor(context.allocator.allocate(4), work.output)
        refused(InvalidArgument, "an output that is too small", queue.submit, work.program, inputs, [small])
        queue.synchronize(30)
        expect(np.all(context.allocator.download(output) == 7), "work that was refused ran nevertheless")
        queue.submit(work.program, inputs, [output]).wait(30)
        work.check(context.allocator.download(output), arrays, "after work that was refused")


@CASES.case("L1.foreign")
def foreign(subject: Subject) -> None:
    """Memory of another context is refused."""
    with subject.context() as context, subject.context() as other:
        theirs = other.allocator.allocate(64)
        data = bytearray(64)
        refused(InvalidArgument, "writing to another context's buffer", context.allocator.copy_in, theirs, data)
        refused(InvalidArgument, "reading another context's buffer", context.allocator.copy_out, theirs, data)


def _alone(op: str, version: int, domain: str = "") -> Graph:
    return single(op, version, [_F32], [_F32], domain=domain)


@CASES.case("L1.supports.unknown")
def supports_unknown(subject: Subject) -> None:
    """Operators that nobody knows are declared unsupported, with a reason, and not compiled."""
    with subject.context() as context:
        for graph in (
            _alone("NoSuchOperator", 1),
            _alone("Relu", 14, "com.example.unknown"),
            _alone("Relu", 99),
            _alone("Relu\x00", 14),
            _alone("", 1),
            _alone("x" * 10000, 1),
        ):
            node = graph.nodes[0]
            support = context.supports(node, graph)
            expect(isinstance(support, Support), "supports gives no Support")
            expect(not support, f"{str(node)[:40]!r} is declared supported")
            expect(support.reason, f"no reason is given why {str(node)[:40]!r} is not supported")
            refused(NotSupported, f"compiling {str(node)[:40]!r}", context.compile, graph)


@CASES.case("L1.supports.odd")
def supports_odd(subject: Subject) -> None:
    """Nodes with the wrong number or type of inputs or attributes are refused, not crashed upon."""
    values = (Value("x", _F32), Value("y", _F32), Value("n", None))
    odd = (
        Node("MatMul", 13, (0,), (1,)),
        Node("Add", 14, (), (1,)),
        Node("Softmax", 13, (0,), (1,), {"axis": 99}),
        Node("Transpose", 13, (0,), (1,), {"perm": (5, 5, -1)}),
        Node("Reshape", 14, (0, -1), (1,)),
        Node("Conv", 11, (0, 0), (1,), {"strides": (0,), "group": -1}),
        Node("Gather", 13, (0, 0), (1,), {"axis": "0"}),
        Node("Concat", 13, (0,), (1,), {}),
    )
    with subject.context() as context:
        for node in odd:
            graph = Graph(values, (node,), (0,), (1,))
            try:
                support = context.supports(node, graph)
                expect(isinstance(support, Support), "supports gives no Support")
                if support:
                    context.compile(graph).close()
            except AIAssistantError:
                pass
            except CaseFailed:
                raise
            except Exception as error:
                message = (
                    f"an odd {node.op} ended in {type(error).__name__}: {str(error)[:120]}, which is no named error"
                )
                raise CaseFailed(message) from error


_CONTRADICTIONS = (
    ("an output that is longer", Node("Relu", 14, (0,), (1,)), ((2,), (3,))),
    ("an output that is shorter", Node("Relu", 14, (0,), (1,)), ((3,), (2,))),
    ("an output of more dimensions", Node("Add", 14, (0, 1), (2,)), ((2,), (2,), (4, 2))),
    ("inputs that cannot be broadcast", Node("Mul", 14, (0, 1), (2,)), ((2,), (3,), (3,))),
    ("an output before it is broadcast", Node("Add", 14, (0, 1), (2,)), ((2, 1), (3,), (2, 1))),
    ("matrices that do not fit", Node("MatMul", 13, (0, 1), (2,)), ((2, 3), (2, 3), (2, 3))),
    ("an input that is missing", Node("Add", 14, (0, NO_VALUE), (1,)), ((2,), (2,))),
    ("a type of its own", Node("Add", 14, (0, 1), (2,)), ((2,), (2,), (2,))),
)
"""Nodes that say what cannot be; the shapes of their values, all of which are f32 but the second of the last."""


@CASES.case("L1.supports.shapes")
def supports_shapes(subject: Subject) -> None:
    """Nodes whose inputs and outputs contradict the operator are refused, at the latest when they run."""
    kinds = (NotSupported, InvalidArgument, InvalidModel)
    with subject.context() as context:
        queue = context.queue()
        for what, node, shapes in _CONTRADICTIONS:
            mixed = what == "a type of its own"
            types = [DType.I32 if mixed and number == 1 else DType.F32 for number in range(len(shapes))]
            specs = [TensorSpec(dtype, shape) for dtype, shape in zip(types, shapes, strict=True)]
            values = tuple(Value(f"v{number}", spec) for number, spec in enumerate(specs))
            last = len(specs) - 1
            graph = Graph(values, (node,), tuple(range(last)), (last,))
            if not context.supports(node, graph):
                continue

            def work(graph: Graph = graph, specs: Sequence[TensorSpec] = specs) -> None:
                program = context.compile(graph)
                inputs = [context.allocator.upload(np.ones(spec.sizes, spec.dtype.numpy)) for spec in specs[:-1]]
                queue.submit(program, inputs, [context.allocator.tensor(specs[-1])]).wait(WAIT_S)

            try:
                refused(kinds, f"{node.op} with {what}", work)
            finally:
                with contextlib.suppress(AIAssistantError):
                    queue.synchronize(WAIT_S)


@CASES.case("L1.load")
def load(subject: Subject) -> None:
    """Kept programs that are damaged, cut off or of nobody are refused."""
    with subject.context() as context:
        kinds = (NotSupported, InvalidModel)
        for what, blob in (("nothing", b""), ("zeros", bytes(4096)), ("noise", subject.random().bytes(4096))):
            refused(kinds, f"loading {what}", context.load, blob)
        work = subject.work(context)
        try:
            blob = work.program.blob()
        except NotSupported as error:
            if context.capabilities.caches_programs:
                raise CaseFailed(f"programs are said to be kept, but: {error.message}") from error
            raise Unsupported(error.message) from error
        for cut in (1, len(blob) // 2, len(blob) - 1):
            refused(kinds, f"loading {cut} of {len(blob)} bytes", context.load, blob[:cut])
        arrays = work.arrays(subject.random())
        program = context.load(blob)
        from ai_assistant.hal.conformance.subject import run

        work.check(run(context, context.queue(), program, arrays)[0], arrays, "from a program that was kept")
