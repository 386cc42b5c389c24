"""ONNX Runtime: one device for each of its execution providers that is installed.

A device's id is its provider's name. `CPUExecutionProvider@2` is the processor's core 2 alone: one thread that stays
there, so that two cores can be used as two devices. `CPUExecutionProvider*2` is the processor with two threads.

What a provider can run ONNX Runtime itself is asked: a session with that node alone is made for it. Inputs and outputs
are bound where they lie, so nothing is copied on the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)
from ai_assistant.hal import onnx_graph
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Tensor
from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support
from ai_assistant.hal.quiet import silent
from ai_assistant.hal.single import alone

CPU = "CPUExecutionProvider"
_XNNPACK = "XnnpackExecutionProvider"
_ON_HOST = (CPU, "DnnlExecutionProvider", _XNNPACK, "ACLExecutionProvider", "ArmNNExecutionProvider")
_NPU = ("QNNExecutionProvider", "VitisAIExecutionProvider", "RknpuExecutionProvider", "NnapiExecutionProvider",
        "CoreMLExecutionProvider", "CANNExecutionProvider")  # fmt: skip
_ELSEWHERE = ("AzureExecutionProvider",)
"""Sends what it is given to other machines."""
_DEVICE = re.compile(r"([A-Za-z0-9]{1,60})(?:@([0-9]{1,4})|\*([0-9]{1,4}))?")
_HINT = "apt install python3-onnxruntime python3-onnx, or pip install onnxruntime onnx"
_MAGIC = b"ai-assistant onnxruntime 1\n"
_QUIET = 4
_LARGE = 4096
"""Elements of a constant that is not worth being part of a question."""
_KNOWN_SHAPES = 64

_lock = threading.Lock()
_loaded: Any = None


def _library() -> Any:
    """The module `onnxruntime`, ready for use. Raises NotSupported: it, or onnx, is not installed."""
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                with silent():  # Debian's library says of each of its 700 operators that onnx knows it already
                    import onnx  # noqa: F401 - graphs are handed over as ONNX files
                    import onnxruntime
            except ImportError as error:
                raise NotSupported(f"{error.name or error} is not installed", hint=_HINT) from error
            spec = TensorSpec(DType.F32, (1,))
            nothing = Graph((Value("x", spec),), (), (0,), (0,))
            with silent():  # or says so here, whichever came first
                onnxruntime.set_default_logger_severity(_QUIET)
                onnxruntime.InferenceSession(onnx_graph.write(nothing), providers=[CPU])
            _loaded = onnxruntime
        return _loaded


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """ONNX Runtime's errors as ours."""
    try:
        yield
    except AIAssistantError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{doing}: there is not enough memory") from error
    except Exception as error:
        kind, text = type(error).__name__, " ".join(str(error).split())
        whole = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
        # Before the reason it tells where in its source the check is.
        whole = re.sub(r"(?<=Status Message: )\S+\.(cc|h):\d+ .*? was false\. ", "", whole)
        text = whole[:300]
        if "alloc" in text.lower() and ("failed" in text.lower() or "bad" in text.lower()):
            raise OutOfMemory(f"{doing}: {text}") from error
        never = ("assigned to the default CPU EP", "is not a registered function/op")
        if kind == "NotImplemented" or any(each in whole for each in never):
            raise NotSupported(f"{doing}: {text}") from error
        if kind in ("InvalidGraph", "InvalidProtobuf") or "[ShapeInferenceError]" in whole:
            raise InvalidModel(f"{doing}: {text}") from error
        # Of a run with bound tensors it says no kind; these are about what it was given.
        given = ("invalid dimensions", "invalid rank", "shape verification failed", "out of data bounds")
        if kind == "InvalidArgument" or any(each in whole.lower() for each in given):
            raise InvalidArgument(f"{doing}: {text}") from error
        raise BackendFailed(f"{doing}: {text}") from error


class OnnxRuntimeProgram(HostProgram):
    def __init__(self, context: OnnxRuntimeContext, graph: Graph, content: bytes, session: Any) -> None:
        self.inputs, self.outputs = graph.input_specs, graph.output_specs
        self._context = context
        self._graph = graph
        self._content = content
        self._session: Any = session
        self._types = [each.dtype.numpy for each in (*self.inputs, *self.outputs)]
        self._fixed = all(each.static for each in self.outputs)
        self._bindings: list[Any] = []
        self._shapes: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        key = tuple(inputs)
        if self._fixed and key == self.inputs:
            return self.outputs
        if key not in self._shapes:
            found = onnx_graph.output_specs(self._graph, key)
            if len(self._shapes) >= _KNOWN_SHAPES:
                self._shapes.clear()
            self._shapes[key] = found
        return self._shapes[key]

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        session = self._session
        if session is None:
            raise InvalidArgument("the program was closed")
        if not self._fixed:
            self._check_sizes(inputs, outputs)
        try:
            binding = self._bindings.pop()  # several queues may run the program at once
        except IndexError:
            binding = session.io_binding()
        held = []
        for number, tensor in enumerate(inputs):
            array = tensor.numpy()
            held.append(array)
            kind, shape = self._types[number], list(array.shape)
            binding.bind_input(f"i{number}", "cpu", 0, kind, shape, array.__array_interface__["data"][0])
        for number, tensor in enumerate(outputs):
            array = tensor.numpy()
            held.append(array)
            kind, shape = self._types[len(inputs) + number], list(array.shape)
            binding.bind_output(f"o{number}", "cpu", 0, kind, shape, array.__array_interface__["data"][0])
        with _errors("ONNX Runtime failed"):
            session.run_with_iobinding(binding)
        self._bindings.append(binding)

    def _check_sizes(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        try:
            wanted = self.output_specs([each.spec for each in inputs])
        except NotSupported:
            return  # they depend on values: it finds out itself
        for number, (each, spec) in enumerate(zip(outputs, wanted, strict=True)):
            if each.spec != spec:
                raise InvalidArgument(f"output {number} is {each.spec}, with these inputs it is {spec}")

    def blob(self) -> bytes:
        """The ONNX file, with what must be the same for it to be taken back."""
        head = self._context.identity | {"sha256": hashlib.sha256(self._content).hexdigest()}
        return _MAGIC + json.dumps(head, sort_keys=True).encode() + b"\n" + self._content

    def close(self) -> None:
        self._bindings = []
        self._session = None


class _CoreQueue(HostQueue):
    """A queue whose thread stays on one core."""

    def __init__(self, core: int) -> None:
        super().__init__(f"onnxruntime@{core}")
        self._core = core

    def _serve(self) -> None:
        os.sched_setaffinity(0, {self._core})  # of this thread alone
        super()._serve()


class OnnxRuntimeContext(Context):
    def __init__(self, device: BackendDevice, provider: str, *, core: int | None, threads: int) -> None:
        self.device = device
        self.provider = provider
        self.capabilities = Capabilities(
            dtypes=frozenset(DType) - {DType.BF16}, dynamic_shapes=True, caches_programs=True
        )
        self._core = core
        self._threads = 1 if core is not None else threads
        self._memory = HostAllocator()
        self._queues: list[HostQueue] = []
        self._answers: dict[object, Support] = {}

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    @property
    def identity(self) -> dict[str, str]:
        """What a kept program must fit."""
        return {"onnxruntime": _library().__version__, "provider": self.provider, "machine": os.uname().machine}

    def supports(self, node: Node, graph: Graph) -> Support:
        places = [index for index in (*node.inputs, *node.outputs) if index != NO_VALUE]
        for index in places:
            spec = graph.values[index].spec
            if spec is None:
                return Support(False, f"the type of {graph.values[index].name[:60]!r} is not known")
            if spec.dtype not in self.capabilities.dtypes:
                return Support(False, f"{spec.dtype} cannot be handed over")
        key = _question(node, graph)
        if key not in self._answers:
            self._answers[key] = self._ask(node, graph)
        return self._answers[key]

    def _ask(self, node: Node, graph: Graph) -> Support:
        if self.provider == _XNNPACK and node.op == "Gemm" and len(node.inputs) < 3:
            return Support(False, "XNNPACK in ONNX Runtime 1.21 dies of a Gemm without its third input")
        one = alone(node, graph, most_elements=_LARGE if self.provider == CPU else None)
        try:
            self._session(onnx_graph.write(one), optimise=self.provider != CPU, threads=1)
        except AIAssistantError as error:
            if "assigned to the default CPU EP" in error.message:
                return Support(False, f"{self.provider} leaves {node} to the processor")
            return Support(False, error.message)
        return YES

    def _session(self, content: bytes, *, optimise: bool, threads: int, fixed: bool = True) -> Any:
        library = _library()
        options = library.SessionOptions()
        levels = library.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _QUIET
        # Between the nodes of a run its threads spin, which is fast. After it they would go on for a while and take the
        # core from whatever runs next: the next device, or one that is being measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_mem_pattern = fixed  # patterns are kept for each shape, and would pile up
        if self.provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        with _errors("ONNX Runtime refuses the graph"):
            return library.InferenceSession(content, options, providers=[self.provider])

    def compile(self, graph: Graph) -> OnnxRuntimeProgram:
        for spec in (*graph.input_specs, *graph.output_specs):
            if spec.dtype not in self.capabilities.dtypes:
                raise NotSupported(f"tensors of {spec.dtype} cannot be handed over")
        if self.provider != CPU:
            self._check(graph)
        return self._program(graph, onnx_graph.write(graph))

    def _program(self, graph: Graph, content: bytes) -> OnnxRuntimeProgram:
        fixed = all(spec.static for spec in graph.input_specs)
        try:
            session = self._session(content, optimise=True, threads=self._threads, fixed=fixed)
        except (NotSupported, InvalidModel):
            self._check(graph)  # names the operator that it does not run, where that is the reason
            raise
        return OnnxRuntimeProgram(self, graph, content, session)

    def _check(self, graph: Graph) -> None:
        for node in graph.nodes:
            if not (support := self.supports(node, graph)):
                raise NotSupported(f"{node} {node.name[:60]!r}: {support.reason}")

    def load(self, blob: bytes) -> OnnxRuntimeProgram:
        head, end, content = blob.removeprefix(_MAGIC).partition(b"\n")
        try:
            kept = json.loads(head[:4096])
        except (ValueError, RecursionError):
            kept = None
        if not blob.startswith(_MAGIC) or not end or not isinstance(kept, dict):
            raise InvalidModel("this is no program that ONNX Runtime's backend kept")
        if kept.pop("sha256", None) != hashlib.sha256(content).hexdigest():
            raise InvalidModel("the kept program is damaged")
        if kept != self.identity:
            raise NotSupported("the program was kept by another version, provider or machine", hint="compile it again")
        return self._program(onnx_graph.read(content), content)  # its operators were checked when it was compiled

    def queue(self) -> HostQueue:
        self._queues.append(HostQueue("onnxruntime") if self._core is None else _CoreQueue(self._core))
        return self._queues[-1]

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


def _question(node: Node, graph: Graph) -> object:
    """What the answer depends on: networks repeat the same operator many times."""

    def of(index: int) -> object:
        if index == NO_VALUE:
            return None
        value = graph.values[index]
        small = value.data is not None and value.data.size <= _LARGE
        return value.spec, value.data is None, value.data.tobytes() if small and value.data is not None else b""

    attributes = tuple(
        (name, value.tobytes(), value.shape, value.dtype.str) if isinstance(value, np.ndarray) else (name, repr(value))
        for name, value in sorted(node.attributes.items())
    )
    opsets = tuple(sorted(graph.opsets.items()))
    values = (of(index) for index in (*node.inputs, NO_VALUE, *node.outputs))
    return node.domain, node.op, node.version, opsets, attributes, *values


class OnnxRuntimeBackend(Backend):
    """
    Args:
        threads: of a program on the processor; 0: one for each core.
    """

    name = "onnxruntime"

    def __init__(self, *, threads: int = 0) -> None:
        self._threads = threads

    @property
    def version(self) -> str:  # type: ignore[override]
        try:
            return str(_library().__version__)
        except NotSupported:
            return "0"

    def probe(self) -> Probe:
        try:
            found = [each for each in _library().get_available_providers() if each not in _ELSEWHERE]
        except NotSupported as error:
            return Probe((), f"ONNX Runtime cannot be used: {error.message}", error.hint)
        # What was installed for a device comes first, and of the processor's own the plain one.
        found.sort(key=lambda each: _ON_HOST.index(each) if each in _ON_HOST else -1)
        return Probe(tuple(BackendDevice(each, _title(each), _kind(each)) for each in found))

    def open(self, device: str = "") -> OnnxRuntimeContext:
        probe = self.probe()
        if not probe:
            raise NotSupported(probe.unavailable, hint=probe.hint)
        parts = _DEVICE.fullmatch(device or probe.devices[0].id)
        known = {each.id: each for each in probe.devices}
        if parts is None or parts[1] not in known:
            raise NotSupported(f"ONNX Runtime has no device {device[:60]!r}", hint=f"there are {', '.join(known)}")
        provider, core, threads = parts[1], parts[2], parts[3]
        if provider != CPU and (core or threads):
            raise NotSupported("only the processor can be opened for a core, or with so many threads")
        if core is not None and int(core) not in os.sched_getaffinity(0):
            raise NotSupported(f"there is no core {core} for this process")
        found = BackendDevice(device, f"{known[provider].name}{_suffix(core)}", "cpu") if device else known[provider]
        if provider != CPU:
            found = known[provider]
        return OnnxRuntimeContext(
            found, provider, core=int(core) if core else None, threads=int(threads) if threads else self._threads
        )


def _suffix(core: str | None) -> str:
    return f", core {core}" if core else ""


def _title(provider: str) -> str:
    return f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}"


def _kind(provider: str) -> str:
    return "cpu" if provider in _ON_HOST else "npu" if provider in _NPU else "gpu"


BACKEND = OnnxRuntimeBackend
