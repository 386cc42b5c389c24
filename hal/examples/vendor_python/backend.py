"""An example vendor backend in Python: a device that computes on the host with NumPy.

Replace the kernels by calls to your driver. README.md beside this file goes through it step by step.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from ai_assistant.errors import NotSupported
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Program, Tensor
from ai_assistant.hal.graph import NO_VALUE, Array, DType, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import OperatorRegistry, Support, broadcast, matmul, same

MEMORY_BYTES = 1 << 30
OPERATORS = OperatorRegistry()


# Step 1: the operators. A kernel gets the node and its inputs and gives the outputs.
def _softmax(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    powers = np.exp(inputs[0] - np.max(inputs[0], axis=-1, keepdims=True, initial=-np.inf))
    return (powers / np.sum(powers, axis=-1, keepdims=True),)


def _last_axis_only(node: Node, graph: Graph) -> str:
    """What the device cannot do is said here, with the reason: nobody then asks it to."""
    if reason := same(node, graph):
        return reason
    rank = len(graph.spec(node.inputs[0]).shape)
    return "" if rank and node.attributes.get("axis", -1) in (-1, rank - 1) else "only the last axis"


# Shapes and types that contradict the operator are the backend's to refuse: `same`, `broadcast` and `matmul` do.
OPERATORS.register("Add", {DType.F32}, since=7, check=broadcast, kernel=lambda node, x: (np.add(x[0], x[1]),))
OPERATORS.register("Mul", {DType.F32}, since=7, check=broadcast, kernel=lambda node, x: (np.multiply(x[0], x[1]),))
OPERATORS.register("Relu", {DType.F32}, since=6, check=same, kernel=lambda node, x: (np.maximum(x[0], np.float32(0)),))
OPERATORS.register("MatMul", {DType.F32}, since=9, check=matmul, kernel=lambda node, x: (np.matmul(x[0], x[1]),))
OPERATORS.register("Softmax", {DType.F32}, since=13, check=_last_axis_only, kernel=_softmax)


# Step 2: a program is a graph made ready. `run` is called on the queue's thread.
class ExampleProgram(HostProgram):
    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs = graph.input_specs, graph.output_specs
        self._graph = graph
        self._steps = [(node, OPERATORS.kernel(node)) for node in graph.nodes]

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return self.outputs

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        values = {index: value.data for index, value in enumerate(self._graph.values) if value.data is not None}
        values |= {index: tensor.numpy() for index, tensor in zip(self._graph.inputs, inputs, strict=True)}
        with np.errstate(all="ignore"):
            for node, kernel in self._steps:
                made = kernel(node, [None if index == NO_VALUE else values[index] for index in node.inputs])
                values |= dict(zip(node.outputs, made, strict=True))
        for index, tensor in zip(self._graph.outputs, outputs, strict=True):
            tensor.numpy()[...] = values[index]


# Step 3: an open device gives memory and queues, says what it supports, and compiles.
class ExampleContext(Context):
    capabilities = Capabilities(dtypes=frozenset({DType.F32}), memory_bytes=MEMORY_BYTES)

    def __init__(self, device: BackendDevice) -> None:
        self.device = device
        self._memory = HostAllocator(limit_bytes=MEMORY_BYTES)
        self._queues: list[HostQueue] = []

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        if any(
            value is not None and value.spec is not None and not value.spec.static
            for value in (*graph.input_values(node), *(graph.values[index] for index in node.outputs))
        ):
            return Support(False, "the device needs fixed shapes")
        return OPERATORS.supports(node, graph)

    def compile(self, graph: Graph) -> Program:
        for node in graph.nodes:
            if not (support := self.supports(node, graph)):
                raise NotSupported(f"{node}: {support.reason}")
        return ExampleProgram(graph)

    def queue(self) -> HostQueue:
        self._queues.append(HostQueue("example"))
        return self._queues[-1]

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


# Step 4: the backend looks for its devices, and opens one.
class ExampleBackend(Backend):
    name = "example-python"
    version = "1.0"

    def probe(self) -> Probe:
        # A real one looks for /dev/accel/accel0 here, and says in `unavailable` and `hint` what is missing.
        return Probe((BackendDevice("0", f"host processor ({platform.machine()})", "cpu"),))

    def open(self, device: str = "") -> ExampleContext:
        for each in self.probe().devices:
            if device in ("", each.id):
                return ExampleContext(each)
        raise NotSupported(f"{self.name} has no device {device[:40]!r}", hint="its only device is 0")


BACKEND = ExampleBackend
"""What discovery looks for in a Python file."""
