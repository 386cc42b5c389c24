"""A vendor's backend for tests: it doubles, or misbehaves in the way that its device is named for."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ai_assistant.errors import DeviceLost, InvalidModel, NotSupported
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Program, Tensor
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support


def _connection() -> int:
    """The descriptor on which this process is asked."""
    return int(sys.argv[1])


def _say(data: bytes) -> None:
    os.write(_connection(), data)
    time.sleep(60)


def _hang_up() -> None:
    socket.socket(fileno=os.dup(_connection())).shutdown(socket.SHUT_RDWR)
    time.sleep(60)


def _segfault() -> None:
    ctypes.string_at(8)


def _leak() -> None:
    kept = []
    while True:
        kept.append(np.ones(1 << 22, np.uint8))


def _hang_with_the_interpreter() -> None:
    # Holds the interpreter's lock: no thread of this process can answer.
    ctypes.PyDLL(None).sleep(60)


def _lost() -> None:
    raise DeviceLost("the stick was pulled out", hint="put it back")


def _other_error() -> None:
    raise SystemError("a driver said \x1b[31mthis\n" + "x" * 5000)


def _fork() -> None:
    os.fork()


def _connect() -> None:
    socket.socket()


def _spawn() -> None:
    os.execv("/bin/true", ["true"])


def _write() -> None:
    Path(__file__).with_name("written-by-a-backend").write_text("x")


def _read() -> None:
    list(Path("/var").iterdir())


def _kill_parent() -> None:
    os.kill(os.getppid(), 0)


def _borrow() -> None:
    descriptor = os.pidfd_open(os.getppid())
    if ctypes.CDLL(None, use_errno=True).syscall(438, descriptor, 0, 0) < 0:
        raise PermissionError(ctypes.get_errno(), "no descriptors of others")


def _threads() -> None:
    done: list[int] = []
    threads = [threading.Thread(target=done.append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


MISCHIEF: dict[str, Callable[[], None]] = {
    "crash": _segfault,
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "hang": lambda: time.sleep(60),
    "hang-hard": _hang_with_the_interpreter,
    "garbage": lambda: _say(b"\xff" * 64),
    "huge": lambda: _say((0xFFFFFFF0).to_bytes(4, "little")),
    "empty": lambda: _say(bytes(4)),
    "no-json": lambda: _say((5).to_bytes(4, "little") + b"hello"),
    "no-object": lambda: _say((2).to_bytes(4, "little") + b"[]"),
    "deep": lambda: _say((200000).to_bytes(4, "little") + b"[" * 200000),
    "unasked": lambda: _say((10).to_bytes(4, "little") + b'{"id":999}'),
    "no-id": lambda: _say((10).to_bytes(4, "little") + b'{"id":"1"}'),
    "bad-error": lambda: _say((22).to_bytes(4, "little") + b'{"id":-1,"error":true}'),
    "closed": _hang_up,
    "leak": _leak,
    "lost": _lost,
    "other-error": _other_error,
    "fork": _fork,
    "connect": _connect,
    "spawn": _spawn,
    "write": _write,
    "read": _read,
    "kill-parent": _kill_parent,
    "borrow": _borrow,
    "threads": _threads,
}


class Doubled(HostProgram):
    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], mischief: str) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._mischief = mischief

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(inputs)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if self._mischief in MISCHIEF:
            MISCHIEF[self._mischief]()
        np.multiply(inputs[0].numpy(), np.float32(2), out=outputs[0].numpy())

    def blob(self) -> bytes:
        return b"double"


class NoAdoption(HostAllocator):
    def adopt(self, array: Any) -> Tensor:
        raise NotSupported("a device with memory of its own")


class VendorContext(Context):
    capabilities = Capabilities(
        frozenset({DType.F32}), memory_bytes=1 << 30, dynamic_shapes=True, caches_programs=True, reads_power=True
    )

    def __init__(self, device: BackendDevice) -> None:
        self.device = device
        self._memory = NoAdoption() if device.id == "own-memory" else HostAllocator()
        if device.id == "crash-in-open":
            ctypes.string_at(8)

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        return YES if node.op == "Double" else Support(False, f"{node} is not implemented")

    def compile(self, graph: Graph) -> Program:
        if self.device.id == "crash-in-compile":
            os.abort()
        if self.device.id == "weights":
            return Weighted(graph)
        return Doubled(graph.input_specs, graph.output_specs, self.device.id)

    def load(self, blob: bytes) -> Program:
        if blob != b"double":
            raise InvalidModel("damaged")
        spec = TensorSpec(DType.F32, (4,))
        return Doubled((spec,), (spec,), "")

    def queue(self) -> HostQueue:
        return HostQueue()

    def power_w(self) -> float:
        return 4.5

    def close(self) -> None:
        pass


class Weighted(Doubled):
    """Adds the graph's constant, which is an attribute too."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.input_specs, graph.output_specs, "")
        self._graph = graph

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        weight = next(each.data for each in self._graph.values if each.data is not None)
        attributes = self._graph.nodes[0].attributes
        kinds = [type(attributes[name]).__name__ for name in ("i", "f", "s", "b", "is", "a")]
        assert kinds == ["int", "float", "str", "bytes", "tuple", "ndarray"], kinds
        outputs[0].numpy()[...] = inputs[0].numpy() + weight + attributes["f"]


class VendorBackend(Backend):
    name = "vendor"
    version = "7.5"

    def probe(self) -> Probe:
        names = ("good", "own-memory", "weights", "crash-in-open", "crash-in-compile", *MISCHIEF)
        return Probe(tuple(BackendDevice(name, f"a device that does {name}", "npu") for name in names))

    def open(self, device: str = "") -> VendorContext:
        for each in self.probe().devices:
            if device in ("", each.id):
                return VendorContext(each)
        raise NotSupported(f"there is no device {device}")


BACKEND = VendorBackend
