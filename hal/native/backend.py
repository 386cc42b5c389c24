"""A shared library with the C ABI as a `Backend`."""

from __future__ import annotations

import ctypes
import threading
import weakref
from ctypes import byref, c_double, c_void_p
from math import isfinite
from pathlib import Path
from typing import Any

from ai_assistant.errors import BackendFailed, InvalidArgument, NotSupported
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe
from ai_assistant.hal.graph import Graph, Node
from ai_assistant.hal.native import abi, programs
from ai_assistant.hal.native.abi import Feature, Status
from ai_assistant.hal.native.graphs import NativeGraph
from ai_assistant.hal.native.library import Library, status_of, structure, text
from ai_assistant.hal.native.memory import NativeAllocator, Opened
from ai_assistant.hal.native.programs import NativeProgram
from ai_assistant.hal.native.queues import NativeQueue
from ai_assistant.hal.operators import YES, Support

MAX_DEVICES = 1024
MAX_ALIGNMENT = 1 << 30
_NEEDS = {
    Feature.DYNAMIC_SHAPES: ("program_output_dims",),
    Feature.HOST_MEMORY: ("map",),
    Feature.CACHES_PROGRAMS: ("program_serialize", "program_load"),
    Feature.READS_POWER: ("power",),
}


class NativeBackend(Backend):
    """The backend in a shared library. Loads it into this process.

    Raises:
        NotSupported: the file is no such library, or of another major version.
        BackendFailed: what it says of itself is impossible.
    """

    name = "native"

    def __init__(self, path: Path) -> None:
        self._library = Library(path)
        self.name = self._library.name  # type: ignore[misc]
        self.version = self._library.version

    def probe(self) -> Probe:
        library = self._library
        found = c_void_p()
        try:
            library.call("probe", byref(library.host), byref(found))
        except NotSupported as error:
            if status_of(error) != Status.UNAVAILABLE:
                raise
            return Probe(unavailable=error.message, hint=error.hint)
        if not found.value:
            raise BackendFailed(f"{self.name} said that it found devices, and gave no list")
        try:
            devices = self._devices(found.value)
        finally:
            library.function("devices_free")(found.value)
        return Probe(devices) if devices else Probe(unavailable=f"{self.name} found no device")

    def _devices(self, address: int) -> tuple[BackendDevice, ...]:
        found = structure(abi.Devices, address, "list of devices")
        if found.count > MAX_DEVICES or (found.count and (not found.devices or found.devices % 8)):
            raise BackendFailed(f"{self.name} says that there are {found.count} devices")
        pointers = (c_void_p * found.count).from_address(found.devices) if found.count else ()
        devices = []
        for pointer in pointers:
            each = structure(abi.Device, pointer, "device")
            devices.append(BackendDevice(text(each.id), text(each.name), text(each.kind), text(each.hal_id)))
        if len({each.id for each in devices}) != len(devices) or not all(each.id for each in devices):
            raise BackendFailed(f"{self.name} has devices without an id, or with the same one")
        return tuple(devices)

    def open(self, device: str = "") -> NativeContext:
        library = self._library
        probe = self.probe()
        if not probe:
            raise NotSupported(probe.unavailable, hint=probe.hint)
        chosen = next((each for each in probe.devices if device in ("", each.id)), None)
        if chosen is None:
            known = ", ".join(each.id for each in probe.devices)[:200]
            raise NotSupported(f"{self.name} has no device {device[:40]!r}", hint=f"it has {known}")
        args = abi.filled(abi.OpenArgs, host=ctypes.addressof(library.host), device=chosen.id.encode())
        return NativeContext(Opened(library, library.handle("open", byref(args))), chosen)


class NativeContext(Context):
    """An open device. Buffers and views that are left stay usable until they go."""

    def __init__(self, opened: Opened, device: BackendDevice) -> None:
        self.device = device
        self._opened: Opened | None = opened
        self.capabilities = _capabilities(opened)
        self._allocator = NativeAllocator(opened, host_memory=self.capabilities.host_memory)
        self._queues: weakref.WeakSet[NativeQueue] = weakref.WeakSet()
        self._graphs: weakref.WeakKeyDictionary[Graph, tuple[NativeGraph, dict[int, int]]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def allocator(self) -> NativeAllocator:
        return self._allocator

    def _open(self) -> Opened:
        if self._opened is None:
            raise InvalidArgument("the device was closed")
        return self._opened

    def _graph(self, graph: Graph) -> tuple[NativeGraph, dict[int, int]]:
        """A graph as C sees it, made once however often its nodes are asked about."""
        with self._lock:
            found = self._graphs.get(graph)
            if found is None:
                found = NativeGraph(graph), {id(node): number for number, node in enumerate(graph.nodes)}
                self._graphs[graph] = found
            return found

    def supports(self, node: Node, graph: Graph) -> Support:
        opened = self._open()
        try:
            native, numbers = self._graph(graph)
        except NotSupported as error:
            return Support(False, error.message)
        number = numbers.get(id(node))
        if number is None:
            raise InvalidArgument("the node is not one of that graph")
        found: Any = abi.filled(abi.Support)
        try:
            opened.library.call("node_supported", opened.handle, native.address, number, byref(found))
        except NotSupported as error:
            return Support(False, error.message)
        if found.supported == 1:
            return YES
        reason = "".join(c if c.isprintable() else " " for c in bytes(found.reason).decode("utf-8", "replace")).strip()
        return Support(False, reason or f"{opened.library.name} gave no reason")

    def compile(self, graph: Graph) -> NativeProgram:
        opened = self._open()
        native, _ = self._graph(graph)
        args = abi.filled(abi.CompileArgs, graph=ctypes.pointer(native.struct))
        program = NativeProgram(opened, opened.library.handle("compile", opened.handle, byref(args)), self.device.id)
        program.fits(graph)
        return program

    def load(self, blob: bytes) -> NativeProgram:
        return programs.load(self._open(), self.device.id, blob)

    def queue(self) -> NativeQueue:
        opened = self._open()
        queue = NativeQueue(opened, opened.library.handle("queue_create", opened.handle))
        with self._lock:
            self._queues.add(queue)
        return queue

    def power_w(self) -> float | None:
        opened = self._open()
        if not self.capabilities.reads_power:
            return None
        watts = c_double(-1.0)
        opened.library.call("power", opened.handle, byref(watts))
        if not isfinite(watts.value) or watts.value < 0:
            raise BackendFailed(f"{opened.library.name} says that its device draws {watts.value} W")
        return watts.value

    def close(self) -> None:
        with self._lock:
            queues = list(self._queues)
            self._graphs.clear()
        for queue in queues:
            queue.close()
        self._allocator.close()
        self._opened = None


def _capabilities(opened: Opened) -> Capabilities:
    library = opened.library
    found = abi.filled(abi.Capabilities)
    library.call("capabilities", opened.handle, byref(found))
    features = Feature(found.features & sum(Feature))
    for feature in Feature:
        for function in _NEEDS[feature]:
            if feature in features and not library.has(function):
                raise BackendFailed(f"{library.name} says that it has {feature.name}, and has no function {function}")
    if not 0 < found.alignment <= MAX_ALIGNMENT or found.alignment & (found.alignment - 1):
        raise BackendFailed(f"{library.name} says that its alignment is {found.alignment}, which is no power of two")
    if found.dtype_count > 256 or (found.dtype_count and (not found.dtypes or found.dtypes % 4)):
        raise BackendFailed(f"{library.name} says that it has {found.dtype_count} types of elements")
    if found.memory_bytes >= 1 << 63:
        raise BackendFailed(f"{library.name} says that its device has {found.memory_bytes} bytes of memory")
    numbers = (ctypes.c_int32 * found.dtype_count).from_address(found.dtypes) if found.dtype_count else ()
    dtypes = frozenset(abi.DTYPE_OF[number] for number in numbers if number in abi.DTYPE_OF)
    if not dtypes:
        raise BackendFailed(f"{library.name} names no type of elements that is known here")
    return Capabilities(
        dtypes,
        memory_bytes=found.memory_bytes,
        alignment=found.alignment,
        dynamic_shapes=Feature.DYNAMIC_SHAPES in features,
        host_memory=Feature.HOST_MEMORY in features,
        caches_programs=Feature.CACHES_PROGRAMS in features,
        reads_power=Feature.READS_POWER in features,
        max_queues=found.max_queues,
    )
