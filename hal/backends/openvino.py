"""OpenVINO: Intel processors, GPUs and NPUs, each a device by OpenVINO's own name (`CPU`, `GPU`, `GPU.1`, `NPU`).

Debian has no package of it. Programs are compiled for accuracy (f32 stays f32) but on the NPU, which computes in
16 bits whatever it is asked. Inputs and outputs are used where they lie.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    DeviceLost,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)
from ai_assistant.hal import onnx_graph
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Tensor
from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support
from ai_assistant.hal.single import alone

_HINT = "pip install openvino onnx; the NPU also needs Intel's user-mode driver (intel-driver-compiler-npu)"
_MAGIC = b"ai-assistant openvino 1\n"
_KINDS = {"CPU": "cpu", "GPU": "gpu", "NPU": "npu"}
_KNOWN_SHAPES = 64
_OF_NO_DEVICE = ("Parameter", "Result", "Constant")

_lock = threading.Lock()
_loaded: tuple[Any, Any] | None = None


def _library() -> tuple[Any, Any]:
    """The module `openvino` and its core. Raises NotSupported: it is not installed, or does not work here."""
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                import onnx  # noqa: F401 - graphs are handed over as ONNX files
                import openvino
            except ImportError as error:
                raise NotSupported(f"{error.name or error} is not installed", hint=_HINT) from error
            try:
                _loaded = openvino, openvino.Core()
            except RuntimeError as error:
                raise NotSupported(f"it does not start: {_short(error)}", hint=_HINT) from error
        return _loaded


def _short(error: Exception) -> str:
    """The last line of what it says, which is the reason; before it are places in its source."""
    lines = [each.strip() for each in str(error).splitlines() if each.strip()]
    told = [each for each in lines if not each.startswith(("Exception from", "To facilitate"))]
    return re.sub(r"\s+", " ", "; ".join((told or lines)[-3:]))[:300]


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """OpenVINO's errors, which have no kinds, as ours."""
    try:
        yield
    except AIAssistantError:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{doing}: there is not enough memory") from error
    except Exception as error:
        whole, text = str(error).lower(), f"{doing}: {_short(error)}"
        if "device_lost" in whole or "device lost" in whole:
            raise DeviceLost(text) from error
        if "out of memory" in whole or "bad_alloc" in whole or "out_of_device_memory" in whole:
            raise OutOfMemory(text) from error
        if "no conversion rule" in whole or "not supported" in whole or "unsupported" in whole:
            raise NotSupported(text) from error
        raise BackendFailed(text) from error


class OpenVinoProgram(HostProgram):
    def __init__(
        self,
        context: OpenVinoContext,
        compiled: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        graph: Graph | None,
    ) -> None:
        if len(compiled.outputs) != len(outputs):
            raise BackendFailed("OpenVINO's program has other outputs than its graph")
        # It goes by its own inference and does not look at what the graph says.
        for number, (port, spec) in enumerate(zip(compiled.outputs, outputs, strict=True)):
            made = [None if each.is_dynamic else each.get_length() for each in port.partial_shape]
            if len(made) != len(spec.shape) or any(
                None not in pair and pair[0] != pair[1] for pair in zip(made, spec.shape, strict=True)
            ):
                raise InvalidModel(f"output {number} is {spec}, and OpenVINO makes {port.partial_shape} of it")
        self.inputs, self.outputs = inputs, outputs
        self._context = context
        self._compiled: Any = compiled
        self._graph = graph
        # An input that nothing depends on may be gone.
        names = {name: place for place, port in enumerate(compiled.inputs) for name in port.names}
        self._places = [names.get(f"i{number}") for number in range(len(inputs))]
        self._fixed = all(each.static for each in (*inputs, *outputs))
        self._requests: list[Any] = []
        self._shapes: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        key = tuple(inputs)
        if self._fixed or self._graph is None:
            if key != self.inputs:
                raise InvalidArgument("the program was compiled for other sizes")
            return self.outputs
        if key not in self._shapes:
            found = onnx_graph.output_specs(self._graph, key)
            if len(self._shapes) >= _KNOWN_SHAPES:
                self._shapes.clear()
            self._shapes[key] = found
        return self._shapes[key]

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        compiled = self._compiled
        if compiled is None:
            raise InvalidArgument("the program was closed")
        if not self._fixed:
            # OpenVINO puts an output of another size elsewhere, and says nothing.
            wanted = self.output_specs([each.spec for each in inputs])
            for number, (each, spec) in enumerate(zip(outputs, wanted, strict=True)):
                if each.spec != spec:
                    raise InvalidArgument(f"output {number} is {each.spec}, with these inputs it is {spec}")
        library, _ = _library()
        with _errors("OpenVINO failed"):
            try:
                request = self._requests.pop()  # several queues may run the program at once
            except IndexError:
                request = compiled.create_infer_request()
            for place, tensor in zip(self._places, inputs, strict=True):
                if place is not None:
                    request.set_input_tensor(place, library.Tensor(tensor.numpy(), shared_memory=True))
            for place, tensor in enumerate(outputs):
                request.set_output_tensor(place, library.Tensor(tensor.numpy(), shared_memory=True))
            request.infer()
        self._requests.append(request)

    def blob(self) -> bytes:
        """The compiled program, with what must be the same for it to be taken back."""
        if not self._context.capabilities.caches_programs:
            raise NotSupported(f"{self._context.device.name} cannot keep compiled programs")
        if not self._fixed:
            raise NotSupported("programs whose sizes are open are not kept", hint="give every input a fixed shape")
        if self._compiled is None:
            raise InvalidArgument("the program was closed")
        with _errors("OpenVINO cannot export the program"):
            exported = self._compiled.export_model()
        content = exported if isinstance(exported, bytes) else exported.getvalue()
        head = {
            "is": self._context.identity,
            "inputs": [[each.dtype, *each.shape] for each in self.inputs],
            "outputs": [[each.dtype, *each.shape] for each in self.outputs],
        }
        text = json.dumps(head, sort_keys=True).encode()
        return _MAGIC + hashlib.sha256(text + content).hexdigest().encode() + b"\n" + text + b"\n" + content

    def close(self) -> None:
        self._requests = []
        self._compiled = None


class OpenVinoContext(Context):
    def __init__(self, device: BackendDevice, threads: int) -> None:
        library, core = _library()
        self.device = device
        self._npu = device.kind == "npu"
        with _errors(f"OpenVINO cannot open {device.id}"):
            able = [str(each) for each in core.get_property(device.id, "OPTIMIZATION_CAPABILITIES")]
        self.identity = {"openvino": str(library.__version__), "device": device.id, "name": device.name}
        """What a kept program must fit."""
        self.capabilities = Capabilities(
            dtypes=frozenset(DType) - {DType.BF16},
            dynamic_shapes=not self._npu,
            caches_programs="EXPORT_IMPORT" in able,
        )
        self._settings: dict[str, Any] = {} if self._npu else {"EXECUTION_MODE_HINT": "ACCURACY"}
        if threads and device.kind == "cpu":
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self._memory = HostAllocator()
        self._queues: list[HostQueue] = []

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        for index in (*node.inputs, *node.outputs):
            if index == NO_VALUE:
                continue
            value = graph.values[index]
            if value.spec is None:
                return Support(False, f"the type of {value.name[:60]!r} is not known")
            if value.spec.dtype not in self.capabilities.dtypes:
                return Support(False, f"{value.spec.dtype} cannot be handed over")
            if not value.spec.static and not self.capabilities.dynamic_shapes:
                return Support(False, "the device needs fixed sizes")
        _, core = _library()
        try:
            with _errors("OpenVINO refuses it"):
                model = core.read_model(onnx_graph.write(alone(node, graph)))
                able = core.query_model(model, self.device.id)
        except AIAssistantError as error:
            return Support(False, error.message)
        for each in model.get_ops():
            if each.get_type_name() not in _OF_NO_DEVICE and each.get_friendly_name() not in able:
                return Support(False, f"{self.device.id} does not have OpenVINO's {each.get_type_name()} for it")
        return YES

    def compile(self, graph: Graph) -> OpenVinoProgram:
        for spec in (*graph.input_specs, *graph.output_specs):
            if spec.dtype not in self.capabilities.dtypes:
                raise NotSupported(f"tensors of {spec.dtype} cannot be handed over")
            if not spec.static and not self.capabilities.dynamic_shapes:
                raise NotSupported(f"{self.device.id} needs fixed sizes", hint="give every input a fixed shape")
        _, core = _library()
        try:
            with _errors("OpenVINO refuses the graph"):
                model = core.read_model(onnx_graph.write(graph))
                compiled = core.compile_model(model, self.device.id, self._settings)
        except (BackendFailed, NotSupported):
            for node in graph.nodes:  # it names its own operators
                if not (support := self.supports(node, graph)):
                    raise NotSupported(f"{node} {node.name[:60]!r}: {support.reason}") from None
            raise
        return OpenVinoProgram(self, compiled, graph.input_specs, graph.output_specs, graph)

    def load(self, blob: bytes) -> OpenVinoProgram:
        digest, _, rest = blob.removeprefix(_MAGIC).partition(b"\n")
        if not blob.startswith(_MAGIC) or hashlib.sha256(rest.replace(b"\n", b"", 1)).hexdigest().encode() != digest:
            raise InvalidModel("this is no program that OpenVINO's backend kept, or it is damaged")
        text, _, content = rest.partition(b"\n")
        try:
            head = json.loads(text)
            inputs, outputs = (
                tuple(TensorSpec(DType(dtype), tuple(shape)) for dtype, *shape in head[key])
                for key in ("inputs", "outputs")
            )
            identity = head["is"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidModel("the kept program is damaged") from error
        if identity != self.identity:
            raise NotSupported("the program was kept by another version or for another device", hint="compile it again")
        _, core = _library()
        try:
            with _errors("OpenVINO refuses the kept program"):
                compiled = core.import_model(content, self.device.id, self._settings)
        except BackendFailed as error:  # of another driver, for one
            raise NotSupported(error.message, hint="compile it again") from error
        return OpenVinoProgram(self, compiled, inputs, outputs, None)

    def queue(self) -> HostQueue:
        self._queues.append(HostQueue("openvino"))
        return self._queues[-1]

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


class OpenVinoBackend(Backend):
    """
    Args:
        threads: of a program on the processor; 0: as OpenVINO has it.
    """

    name = "openvino"

    def __init__(self, *, threads: int = 0) -> None:
        self._threads = threads

    @property
    def version(self) -> str:  # type: ignore[override]
        try:
            return str(_library()[0].__version__)
        except NotSupported:
            return "0"

    def probe(self) -> Probe:
        try:
            _, core = _library()
            with _errors("OpenVINO cannot look for devices"):
                found = [str(each) for each in core.available_devices]
                devices = tuple(
                    BackendDevice(each, f"OpenVINO, {core.get_property(each, 'FULL_DEVICE_NAME')}", kind)
                    for each in found
                    if (kind := _KINDS.get(each.partition(".")[0]))
                )
        except AIAssistantError as error:
            return Probe((), f"OpenVINO cannot be used: {error.message}", error.hint or _HINT)
        if not devices:
            return Probe((), "OpenVINO has no device here", _HINT)
        return Probe(devices)

    def open(self, device: str = "") -> OpenVinoContext:
        probe = self.probe()
        if not probe:
            raise NotSupported(probe.unavailable, hint=probe.hint)
        for each in probe.devices:
            if device in ("", each.id):
                return OpenVinoContext(each, self._threads)
        raise NotSupported(
            f"OpenVINO has no device {device[:60]!r}", hint=f"there are {', '.join(each.id for each in probe.devices)}"
        )


BACKEND = OpenVinoBackend
