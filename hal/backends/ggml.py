"""ggml: the processor by the language model engine's kernels, and GPUs by Vulkan, or whatever plug-in lies beside them.

A program's constants are on the device from `compile` on; inputs and outputs are copied to it and back at each run, as
ggml plans the memory in between by itself. Fixed sizes only. What it runs is declared in `hal/ggml/build.py`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ai_assistant.errors import BackendFailed, InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Tensor
from ai_assistant.hal.device import DeviceKind, object_name
from ai_assistant.hal.ggml import library, vulkan
from ai_assistant.hal.ggml.build import FLOATS, OPERATORS, Build, T, build_node
from ai_assistant.hal.graph import Array, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support

_TENSORS_OF_A_NODE = 16
_KINDS = {library.CPU: "cpu", library.GPU: "gpu", library.IGPU: "gpu"}
"""Accelerators that only help the processor (BLAS, AMX) are no devices of their own."""


class GgmlProgram(HostProgram):
    """A graph of ggml's with its memory. One run at a time, also when it is submitted to several queues."""

    def __init__(self, context: GgmlContext, graph: Graph) -> None:
        self.inputs, self.outputs = graph.input_specs, graph.output_specs
        self._lib: Any = context.lib
        self._context = context
        self._closed = False
        self._pools: list[int] = []
        self._buffer = self._plan = 0
        try:
            self._make(graph)
        except BaseException:
            self._release()
            raise

    def _make(self, graph: Graph) -> None:
        lib, backend = self._lib, self._context.backend
        count = _TENSORS_OF_A_NODE * len(graph.nodes) + len(graph.values) + 2 * len(graph.outputs) + 16
        overhead = lib.tensor_overhead()
        self._pools.append(lib.context(count * overhead + lib.graph_overhead_custom(count, False)))
        self._pools.append(lib.context(count * overhead))
        if not all(self._pools):
            raise OutOfMemory("ggml has no memory for the graph's description")
        pool, weights = self._pools
        build = Build(lib, pool, weights, graph)
        self._in = [build.input(spec.sizes) for spec in graph.input_specs]
        build.made |= dict(zip(graph.inputs, self._in, strict=True))
        for node in graph.nodes:
            build.made[node.outputs[0]] = build_node(build, node)
        lent = {each.at for each in self._in}
        self._out: list[T] = []
        for index in graph.outputs:
            made = build.get(index)
            if made.view or made.at in lent or made.at in {at for at, _ in build.constants}:
                made = build.call("cont", made.shape, made)  # memory of its own, which outlives the run
            lent.add(made.at)
            lib.set_output(made.at)
            self._out.append(made)
        if build.constants:
            self._buffer = lib.backend_alloc_ctx_tensors(weights, backend) or 0
            if not self._buffer:
                raise OutOfMemory(f"{self._context.device.name} has no memory for the graph's constants")
            for at, data in build.constants:
                lib.backend_tensor_set(at, data.ctypes.data, 0, data.nbytes)
        self._graph = lib.new_graph_custom(pool, count, False)
        # An input that nothing depends on must have a place too.
        for each in (*self._in, *self._out):
            lib.build_forward_expand(self._graph, each.at)
        self._plan = lib.gallocr_new(lib.backend_get_default_buffer_type(backend)) or 0
        if not self._plan or not lib.gallocr_alloc_graph(self._plan, self._graph):
            raise OutOfMemory(f"{self._context.device.name} has no memory for what the graph computes")

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        if tuple(inputs) != self.inputs:
            raise InvalidArgument("the program was compiled for other sizes")
        return self.outputs

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        lib = self._lib
        with self._context.lock:
            if self._closed:
                raise InvalidArgument("the program or its device was closed")
            for made, tensor in zip(self._in, inputs, strict=True):
                data: Array = np.asarray(tensor.numpy(), np.float32, order="C")
                lib.backend_tensor_set(made.at, data.ctypes.data, 0, data.nbytes)
            status = lib.backend_graph_compute(self._context.backend, self._graph)
            if status == -2:
                raise OutOfMemory(f"{self._context.device.name} has no memory to compute with")
            if status != 0:
                raise BackendFailed(f"ggml failed with status {status}")
            for made, tensor in zip(self._out, outputs, strict=True):
                view = tensor.numpy()
                whole = view if view.dtype == np.float32 else np.empty(view.shape, np.float32)
                lib.backend_tensor_get(made.at, whole.ctypes.data, 0, whole.nbytes)
                if whole is not view:
                    with np.errstate(over="ignore"):
                        view[...] = whole

    def close(self) -> None:
        with self._context.lock:
            self._release()

    def _release(self) -> None:
        self._closed = True
        if self._plan:
            self._lib.gallocr_free(self._plan)
        if self._buffer:
            self._lib.backend_buffer_free(self._buffer)
        for pool in self._pools:
            self._lib.free(pool)
        self._plan = self._buffer = 0
        self._pools = []

    def __del__(self) -> None:
        if self._pools:
            self.close()


class GgmlContext(Context):
    def __init__(self, lib: Any, at: int, device: BackendDevice, threads: int) -> None:
        self.lib = lib
        self.device = device
        self.lock = threading.RLock()
        self._at = at
        with vulkan.exact():
            self.backend: int = lib.backend_dev_init(at, None) or 0
        if not self.backend:
            raise BackendFailed(f"ggml cannot open {device.name}")
        if threads:
            lib.set_threads(at, self.backend, threads)
        self.capabilities = Capabilities(dtypes=FLOATS, memory_bytes=lib.memory(at))
        # Tensors lie on the host and are copied, so they are held to what the device could take at once.
        self._memory = HostAllocator(limit_bytes=self.capabilities.memory_bytes)
        self._queues: list[HostQueue] = []
        self._programs: list[GgmlProgram] = []

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        if not (support := OPERATORS.supports(node, graph)):
            return support
        with self.lock:
            self._check_open()
            lib = self.lib
            pool = lib.context(lib.tensor_overhead() * 4 * _TENSORS_OF_A_NODE)
            try:
                build = Build(lib, pool, pool, graph)
                for index in set(node.inputs):
                    if index >= 0 and graph.values[index].data is None:
                        build.made[index] = build.input(graph.spec(index).sizes)
                build_node(build, node)
                for name, at in build.operators:
                    if not lib.backend_dev_supports_op(self._at, at):
                        return Support(False, f"{self.device.name} does not have ggml's {name} for these sizes")
            finally:
                lib.free(pool)
        return YES

    def compile(self, graph: Graph) -> GgmlProgram:
        for spec in (*graph.input_specs, *graph.output_specs):
            if spec.dtype not in FLOATS:
                raise NotSupported(f"tensors of {spec.dtype} cannot be handed over")
            if not spec.static or len(spec.shape) > 4 or 0 in spec.shape:
                raise NotSupported(f"ggml takes no {spec}: only fixed sizes, up to four, none of them 0")
        for node in graph.nodes:
            if not (support := self.supports(node, graph)):
                raise NotSupported(f"{node} {node.name[:60]!r}: {support.reason}")
        with self.lock:
            self._check_open()
            program = GgmlProgram(self, graph)
        return program

    def _check_open(self) -> None:
        if not self.backend:
            raise InvalidArgument("the device was closed")

    def queue(self) -> HostQueue:
        self._queues.append(HostQueue("ggml"))
        return self._queues[-1]

    def close(self) -> None:
        for queue in self._queues:
            queue.close()
        with self.lock:
            if self.backend:
                self.lib.backend_free(self.backend)
                self.backend = 0


class GgmlBackend(Backend):
    """
    Args:
        threads: of the processor; 0: as ggml has it.
    """

    name = "ggml"

    def __init__(self, *, threads: int = 0) -> None:
        self._threads = threads

    @property
    def version(self) -> str:  # type: ignore[override]
        try:
            return library.library().version
        except NotSupported:
            return "0"

    def probe(self) -> Probe:
        try:
            lib = library.library()
        except NotSupported as error:
            return Probe((), f"ggml cannot be used: {error.message}", error.hint)
        found = tuple(each for _, each in _devices(lib))
        if not found:
            return Probe((), "ggml has no device here", f"its plug-ins should be in {lib.folder}")
        return Probe(found)

    def open(self, device: str = "") -> GgmlContext:
        probe = self.probe()
        if not probe:
            raise NotSupported(probe.unavailable, hint=probe.hint)
        lib = library.library()
        for at, each in _devices(lib):
            if device in ("", each.id):
                return GgmlContext(lib, at, each, self._threads if each.kind == "cpu" else 0)
        raise NotSupported(
            f"ggml has no device {device[:60]!r}", hint=f"there are {', '.join(each.id for each in probe.devices)}"
        )


def _devices(lib: library.Library) -> list[tuple[int, BackendDevice]]:
    found = []
    for at in lib.devices():
        kind = _KINDS.get(lib.backend_dev_type(at))
        if kind == "cpu":
            found.append((at, BackendDevice(lib.name(at), f"ggml, {lib.description(at)}", kind)))
        elif kind:
            found.append((at, _accelerator(lib, at, kind)))
    return found


def _accelerator(lib: library.Library, at: int, kind: str, root: Path = Path("/")) -> BackendDevice:
    name, address = f"ggml with {lib.runtime(at)}, {lib.description(at)}", lib.address(at)
    if not re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]", address):
        return BackendDevice(lib.name(at), name, kind)
    driver = root / "sys/bus/pci/devices" / address / "driver"
    if driver.exists():
        name += f", driver {driver.resolve().name}"
    return BackendDevice(lib.name(at), name, kind, object_name(DeviceKind.GPU, "pci", address))


BACKEND = GgmlBackend
