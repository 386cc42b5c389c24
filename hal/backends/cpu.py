"""The processor by NumPy: every shape, every machine, and the fallback of every other backend."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence

import numpy as np

from ai_assistant.errors import AIAssistantError, InvalidArgument, InvalidModel, NotSupported, OutOfMemory
from ai_assistant.hal.backends.cpu_kernels import OPERATORS
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Tensor
from ai_assistant.hal.graph import NO_VALUE, Array, DType, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import Support

_MAGIC = b"ai-assistant cpu 1\n"


class CpuProgram(HostProgram):
    """The nodes one after the other. What nobody needs any more is let go at once."""

    def __init__(self, graph: Graph) -> None:
        self.inputs, self.outputs = graph.input_specs, graph.output_specs
        self._graph = graph
        self._constants = {index: value.data for index, value in enumerate(graph.values) if value.data is not None}
        last: dict[int, int] = {}
        for number, node in enumerate(graph.nodes):
            last |= dict.fromkeys((*node.inputs, *node.outputs), number)
        keep = {NO_VALUE, *graph.outputs, *self._constants}
        self._steps = [
            (
                node,
                OPERATORS.kernel(node),
                tuple(index for index, use in last.items() if use == number and index not in keep),
            )
            for number, node in enumerate(graph.nodes)
        ]

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        if all(spec.static for spec in self.outputs):
            return self.outputs
        from ai_assistant.hal.onnx_graph import output_specs

        return output_specs(self._graph, inputs)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        values: dict[int, Array | None] = {**self._constants, NO_VALUE: None}
        values |= {index: tensor.numpy() for index, tensor in zip(self._graph.inputs, inputs, strict=True)}
        with np.errstate(all="ignore"):
            for node, kernel, done in self._steps:
                try:
                    made = kernel(node, [values[index] for index in node.inputs])
                except AIAssistantError:
                    raise
                except MemoryError as error:
                    raise OutOfMemory(f"{node} needs more memory than there is") from error
                except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
                    # Shapes and places that only the values tell.
                    raise InvalidArgument(f"{node} {node.name[:60]!r}: {str(error)[:200]}") from error
                values |= dict(zip(node.outputs, made, strict=False))
                values[NO_VALUE] = None
                for index in done:
                    values.pop(index, None)
        for number, (index, tensor) in enumerate(zip(self._graph.outputs, outputs, strict=True)):
            found, place = values[index], tensor.numpy()
            assert found is not None
            if found.shape != place.shape or found.dtype != place.dtype:
                raise InvalidArgument(
                    f"output {number} is {TensorSpec(DType.of(found.dtype), found.shape)}, its tensor {tensor.spec}"
                )
            np.copyto(place, found)

    def blob(self) -> bytes:
        from ai_assistant.hal.onnx_graph import write

        content = write(self._graph)
        return _MAGIC + hashlib.sha256(content).digest() + content


class CpuContext(Context):
    capabilities = Capabilities(
        dtypes=frozenset(DType) - {DType.BF16}, dynamic_shapes=True, host_memory=True, caches_programs=True
    )

    def __init__(self, device: BackendDevice) -> None:
        self.device = device
        self._memory = HostAllocator(alignment=self.capabilities.alignment)
        self._queues: list[HostQueue] = []

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        return OPERATORS.supports(node, graph)

    def compile(self, graph: Graph) -> CpuProgram:
        for node in graph.nodes:
            if not (support := self.supports(node, graph)):
                raise NotSupported(f"{node} {node.name[:60]!r}: {support.reason}")
        return CpuProgram(graph)

    def load(self, blob: bytes) -> CpuProgram:
        from ai_assistant.hal.onnx_graph import read

        if not blob.startswith(_MAGIC):
            raise NotSupported("the program is of another backend or version", hint="compile the graph again")
        digest, content = blob[len(_MAGIC) : len(_MAGIC) + 32], blob[len(_MAGIC) + 32 :]
        if hashlib.sha256(content).digest() != digest:
            raise InvalidModel("the program is damaged", hint="compile the graph again")
        return self.compile(read(content))

    def queue(self) -> HostQueue:
        self._queues.append(HostQueue("cpu"))
        return self._queues[-1]

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


class CpuBackend(Backend):
    name = "cpu"
    version = f"1.0 (NumPy {np.__version__})"

    def probe(self) -> Probe:
        return Probe((BackendDevice("0", f"processor, {platform.machine()}", "cpu", "cpu_0"),))

    def open(self, device: str = "") -> CpuContext:
        for each in self.probe().devices:
            if device in ("", each.id):
                return CpuContext(each)
        raise NotSupported(f"the backend cpu has no device {device[:40]!r}", hint="its only device is 0")


BACKEND = CpuBackend
