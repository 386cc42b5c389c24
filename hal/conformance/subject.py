"""The backend under test, in the process where the cases run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ai_assistant.errors import AIAssistantError
from ai_assistant.hal.conformance.case import CaseFailed, Unsupported, expect
from ai_assistant.hal.contract import Backend, Context, Program, Queue, Tensor
from ai_assistant.hal.graph import Array, DType, Graph, Node, TensorSpec, Value

WAIT_S = 30.0
"""How long a case waits for work that takes a moment; the case's own limit ends whatever ignores it."""


def is_path(spec: str) -> bool:
    return "/" in spec or spec.endswith((".so", ".py"))


def load(spec: str) -> Backend:
    """A backend by its name, or of a shared library (*.so) or Python file. Loads it into this process.

    Raises:
        NotSupported: there is none.
        InvalidConfig, BackendFailed: the file is no backend.
    """
    from ai_assistant.hal import discovery

    # The certifier's own child is the process that may crash; guard pages would not reach through another one.
    return discovery.find(spec, trusted=True)


@dataclass
class Subject:
    """What a case is given.

    Args:
        path: of the file that the backend is in; None for one that was found by its name.
        seed: of every random number.
        examples: how many inputs an operator's sweep tries.
        soak_s: how long a model is run over and over.
        doing: told what is tried next, for the report in case that the process dies of it.
    """

    backend: Backend
    device: str = ""
    path: Path | None = None
    seed: int = 0
    examples: int = 20
    soak_s: float = 10.0
    doing: Callable[[str], None] = lambda text: None
    shared: dict[str, Any] = field(default_factory=dict)

    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    @contextmanager
    def context(self) -> Iterator[Context]:
        """A context of its own, closed at the end."""
        context = self.backend.open(self.device)
        try:
            yield context
        finally:
            context.close()

    @cached_property
    def common(self) -> Context:
        """One context for all operator cases: some devices take long to open."""
        return self.backend.open(self.device)

    def reopen(self) -> None:
        """Forget the common context, whose device is gone: the next case opens it anew."""
        self.__dict__.pop("common", None)

    def work(self, context: Context, shape: Sequence[int] = (16,)) -> Work:
        """A program that this backend can run, with what it must compute.

        Raises:
            CaseFailed: it supports none of the operators that every device has.
        """
        reasons = []
        for op, version, inputs, function in SIMPLE:
            shapes = [(shape[-1], shape[-1]) if op == "MatMul" and number else tuple(shape) for number in range(inputs)]
            if op == "MatMul" and len(shape) < 2:
                shapes[0] = (1, *shape)
            made = shapes[0]
            graph = single(op, version, [TensorSpec(DType.F32, each) for each in shapes], [TensorSpec(DType.F32, made)])
            support = context.supports(graph.nodes[0], graph)
            if support:
                return Work(graph, context.compile(graph), function, tuple(shapes), made)
            reasons.append(f"{op}: {support.reason}")
        raise CaseFailed(f"none of the simplest operators is supported for f32: {'; '.join(reasons)[:300]}")


SIMPLE: tuple[tuple[str, int, int, Callable[..., Any]], ...] = (
    ("Add", 14, 2, np.add),
    ("Mul", 14, 2, np.multiply),
    ("Relu", 14, 1, lambda x: np.maximum(x, np.float32(0))),
    ("Identity", 19, 1, np.copy),
    ("MatMul", 13, 2, np.matmul),
)


def single(
    op: str,
    version: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    domain: str = "",
    attributes: dict[str, Any] | None = None,
) -> Graph:
    """The graph of one operator."""
    values = [Value(f"x{number}", spec) for number, spec in enumerate(inputs)]
    values += [Value(f"y{number}", spec) for number, spec in enumerate(outputs)]
    ins, outs = tuple(range(len(inputs))), tuple(range(len(inputs), len(values)))
    node = Node(op, version, ins, outs, attributes or {}, domain, "node")
    return Graph(tuple(values), (node,), ins, outs)


@dataclass(frozen=True, slots=True)
class Work:
    """A small program of f32 tensors, and the same in NumPy."""

    graph: Graph
    program: Program
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    made: tuple[int, ...]

    def arrays(self, random: np.random.Generator) -> list[Array]:
        return [random.standard_normal(shape, np.float32) for shape in self.shapes]

    def right(self, arrays: Sequence[Array]) -> Array:
        made: Array = self.function(*arrays).astype(np.float32)
        return made

    def check(self, found: Array, arrays: Sequence[Array], where: str = "") -> None:
        """Raises CaseFailed: that is not what the program must have computed of these."""
        if not np.allclose(found, self.right(arrays), rtol=1e-4, atol=1e-5):
            raise CaseFailed(f"{self.graph.nodes[0]} gave a wrong result{' ' + where if where else ''}")

    @property
    def output(self) -> TensorSpec:
        return TensorSpec(DType.F32, self.made)


def run(context: Context, queue: Queue, program: Program, arrays: Sequence[Array]) -> list[Array]:
    """Upload, run, download.

    Raises:
        AIAssistantError: what the backend raised.
        CaseFailed: the program's own specs contradict themselves.
    """
    inputs = [context.allocator.upload(array) for array in arrays]
    specs = program.output_specs([tensor.spec for tensor in inputs])
    expect(len(specs) == len(program.outputs), "output_specs gives another number of outputs than the program has")
    outputs = [context.allocator.tensor(spec) for spec in specs]
    try:
        queue.submit(program, inputs, outputs).wait(WAIT_S)
        return [context.allocator.download(tensor) for tensor in outputs]
    finally:
        for tensor in (*inputs, *outputs):
            tensor.buffer.free()


def refused(
    kind: type[AIAssistantError] | tuple[type[AIAssistantError], ...],
    what: str,
    call: Callable[..., Any],
    *arguments: Any,
) -> None:
    """Raises CaseFailed: a call that must be refused was not, or not by the right name."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(each.__name__ for each in kinds)
    try:
        call(*arguments)
    except kinds:
        return
    except AIAssistantError as error:
        raise CaseFailed(f"{what} must be refused as {names}, not as {error.name}: {error.message[:120]}") from error
    except Exception as error:
        raise CaseFailed(
            f"{what} must be refused as {names}, not {type(error).__name__}: {str(error)[:120]}"
        ) from error
    raise CaseFailed(f"{what} must be refused as {names}, and was taken")


def viewable(context: Context) -> None:
    """Raises Unsupported: the host does not reach this device's memory."""
    if not context.capabilities.host_memory:
        raise Unsupported("the device's memory is out of the host's reach")


def place(
    context: Context, array: Array, before: int, after: int, fill: int = 0xA5
) -> tuple[Tensor, Callable[[], None]]:
    """A copy of an array in the midst of a larger buffer, and a check that nothing around it was written to."""
    nbytes = array.nbytes
    buffer = context.allocator.allocate(before + nbytes + after)
    context.allocator.copy_in(buffer, bytes([fill]) * (before + nbytes + after))
    context.allocator.copy_in(buffer, np.asarray(array, order="C"), before)

    def intact() -> None:
        whole = bytearray(before + nbytes + after)
        context.allocator.copy_out(buffer, whole)
        for name, part in (("before", whole[:before]), ("after", whole[before + nbytes :])):
            if part.count(fill) != len(part):
                raise CaseFailed(f"memory {name} the tensor was written to")

    return Tensor(buffer, TensorSpec(DType.of(array.dtype), array.shape), before), intact
