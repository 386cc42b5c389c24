"""No hardware at all: checks every call as a real device would, and answers with zeros.

For tests of what stands above a backend, and to see what an application would do without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ai_assistant.errors import NotSupported
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Tensor
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support


class NullProgram(HostProgram):
    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs = graph.input_specs, graph.output_specs

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return self.outputs

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for tensor in outputs:
            tensor.numpy()[...] = 0


class NullContext(Context):
    capabilities = Capabilities(dtypes=frozenset(DType) - {DType.BF16})

    def __init__(self, device: BackendDevice) -> None:
        self.device = device
        self._memory = HostAllocator()
        self._queues: list[HostQueue] = []

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        for index in (*node.inputs, *node.outputs):
            spec = graph.values[index].spec if index >= 0 else None
            if index >= 0 and (spec is None or not spec.static):
                return Support(False, f"the size of {graph.values[index].name[:60]!r} is not fixed")
            if spec is not None and spec.dtype not in self.capabilities.dtypes:
                return Support(False, f"{spec.dtype} is not supported")
        return YES

    def compile(self, graph: Graph) -> NullProgram:
        for node in graph.nodes:
            if not (support := self.supports(node, graph)):
                raise NotSupported(f"{node} {node.name[:60]!r}: {support.reason}")
        return NullProgram(graph)

    def queue(self) -> HostQueue:
        self._queues.append(HostQueue("null"))
        return self._queues[-1]

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


class NullBackend(Backend):
    name = "null"
    version = "1.0"

    def probe(self) -> Probe:
        return Probe((BackendDevice("0", "no hardware: answers are zeros", "null"),))

    def open(self, device: str = "") -> NullContext:
        for each in self.probe().devices:
            if device in ("", each.id):
                return NullContext(each)
        raise NotSupported(f"the backend null has no device {device[:40]!r}", hint="its only device is 0")


BACKEND = NullBackend
