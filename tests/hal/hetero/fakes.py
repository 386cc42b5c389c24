"""Devices that compute with NumPy and do what a test tells them, and a table of simulated costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ai_assistant.errors import AIAssistantError, NotSupported
from ai_assistant.hal.contract import BackendDevice, Capabilities, Context, Queue, Tensor
from ai_assistant.hal.graph import Array, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.hetero.contract import Estimate, Source
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support

KERNELS: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Mul": np.multiply, "Sub": np.subtract, "MatMul": np.matmul, "Neg": np.negative, "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, np.float32(0)), "Identity": lambda x: x,
    "NonZero": lambda x: np.array(np.nonzero(x)),
}  # fmt: skip


class Distant(HostAllocator):
    """Memory that the host cannot look into."""

    def view(self, tensor: Tensor) -> Array:
        raise NotSupported("out of the host's reach")

    def adopt(self, array: Any) -> Tensor:
        raise NotSupported("the host's memory cannot be used")

    def inside(self, tensor: Tensor) -> Array:
        return super().view(tensor)


@dataclass
class FakeDevice(Context):
    """A device.

    Args:
        without: operators that it does not run.
        before_run: called on the queue's thread before each program; what it raises the program fails of.
        distant: its memory is out of the host's reach.
        log: (device, graph) of every program that has run, shared by a test's devices.
    """

    name: str
    without: frozenset[str] = frozenset()
    before_run: Callable[[Graph], None] | None = None
    distant: bool = False
    queues: int = 0
    memory_bytes: int = 0
    compile_error: AIAssistantError | None = None
    log: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = BackendDevice(self.name, f"fake {self.name}", "npu")
        self.capabilities = Capabilities(
            frozenset({DType.F32}),
            memory_bytes=self.memory_bytes,
            host_memory=not self.distant,
            max_queues=self.queues,
        )
        kind = Distant if self.distant else HostAllocator
        self._allocator = kind(limit_bytes=self.memory_bytes)
        self.opened = 0

    @property
    def allocator(self) -> HostAllocator:
        return self._allocator

    def supports(self, node: Node, graph: Graph) -> Support:
        if node.op in self.without or node.op not in KERNELS:
            return Support(False, f"{node} is not implemented")
        return YES

    def compile(self, graph: Graph) -> FakeProgram:
        if self.compile_error is not None:
            raise self.compile_error
        for node in graph.nodes:
            if not (answer := self.supports(node, graph)):
                raise NotSupported(answer.reason)
        return FakeProgram(self, graph)

    def queue(self) -> Queue:
        if self.queues and self.opened >= self.queues:
            raise NotSupported("no further queue")
        self.opened += 1
        return HostQueue(self.name)

    def array(self, tensor: Tensor) -> Array:
        return self._allocator.inside(tensor) if isinstance(self._allocator, Distant) else tensor.numpy()

    def close(self) -> None:
        pass


class FakeProgram(HostProgram):
    def __init__(self, device: FakeDevice, graph: Graph) -> None:
        self._device = device
        self._graph = graph
        self.inputs = graph.input_specs
        self.outputs = tuple(graph.values[index].spec or TensorSpec(DType.I64, (None, None)) for index in graph.outputs)

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        if all(each.static for each in self.outputs):
            return self.outputs
        made = self._compute([np.zeros(each.sizes, each.dtype.numpy) for each in inputs])
        return tuple(TensorSpec(DType.of(each.dtype), each.shape) for each in made)

    def _compute(self, inputs: Sequence[Array]) -> list[Array]:
        values = {index: value.data for index, value in enumerate(self._graph.values) if value.data is not None}
        values.update(zip(self._graph.inputs, inputs, strict=True))
        for node in self._graph.nodes:
            values[node.outputs[0]] = KERNELS[node.op](*(values[index] for index in node.inputs))
        return [values[index] for index in self._graph.outputs]

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if self._device.before_run is not None:
            self._device.before_run(self._graph)
        for tensor, made in zip(outputs, self._compute([self._device.array(each) for each in inputs]), strict=True):
            np.copyto(self._device.array(tensor), made)
        self._device.log.append((self._device.name, self._graph.name))


@dataclass
class SimulatedCosts:
    """Times that a test makes up.

    Args:
        seconds: by device, or by device and operator; 1 ms for others.
    """

    seconds: Mapping[Any, float] = field(default_factory=dict)
    launch: float = 1e-5
    hop: float = 1e-5
    bytes_s: float = 1e10
    power: Mapping[str, float] = field(default_factory=dict)

    def node_s(self, device: str, node: Node, graph: Graph) -> Estimate:
        found = self.seconds.get((device, node.op), self.seconds.get(device, 1e-3))
        return Estimate(found, Source.ESTIMATED)

    def launch_s(self, device: str) -> float:
        return self.launch

    def transfer_s(self, source: str, target: str, nbytes: int) -> float:
        return self.hop + nbytes / self.bytes_s

    def watts(self, device: str) -> float | None:
        return self.power.get(device)


SPEC = TensorSpec(DType.F32, (4, 4))


class Builder:
    """A graph, one operator at a time; values are 4 × 4 floats."""

    def __init__(self, inputs: int = 1) -> None:
        self.values = [Value(f"in{number}", SPEC) for number in range(inputs)]
        self.nodes: list[Node] = []
        self.inputs = tuple(range(inputs))

    def constant(self, seed: int = 0, side: int = 4) -> int:
        data = np.random.default_rng(seed).random((side, side), np.float32)
        self.values.append(Value(f"c{len(self.values)}", TensorSpec(DType.F32, data.shape), data))
        return len(self.values) - 1

    def add(self, op: str, *inputs: int, spec: TensorSpec | None = SPEC) -> int:
        self.values.append(Value(f"v{len(self.values)}", spec))
        output = len(self.values) - 1
        self.nodes.append(Node(op, 13, inputs, (output,)))
        return output

    def graph(self, *outputs: int) -> Graph:
        return Graph(tuple(self.values), tuple(self.nodes), self.inputs, outputs, name="built")


def chain(*ops: str) -> Graph:
    """One operator after the other."""
    made = Builder()
    value = 0
    for op in ops:
        value = made.add(op, value)
    return made.graph(value)


def branches(length: int, width: int = 2) -> Graph:
    """A trunk, equal branches, and their sum."""
    made = Builder()
    trunk = made.add("Tanh", 0)
    ends = []
    for number in range(width):
        value = trunk
        for _ in range(length):
            value = made.add("MatMul", value, made.constant(number))
        ends.append(value)
    total = ends[0]
    for value in ends[1:]:
        total = made.add("Add", total, value)
    return made.graph(total)


def expected(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    return FakeProgram(FakeDevice("oracle"), graph)._compute(inputs)


class Gate:
    """Lets a device's programs through when the test says so, and tells how many wait."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting = threading.Semaphore(0)

    def __call__(self, graph: Graph) -> None:
        self.waiting.release()
        assert self.open.wait(20)
