"""A backend that runs in another process, with the contract of any other.

Tensors lie in memory that both processes see, so that they are not copied. A process that dies, hangs or talks
nonsense is ended; what waited fails with BackendFailed (or DeviceLost, where that was asked for), and the next `open`
starts a new one. What the process is kept from is in `ai_assistant.hal.confine`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)
from ai_assistant.hal.contract import Backend, Buffer, Context, Probe, Program, Tensor
from ai_assistant.hal.graph import Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostBuffer, HostEvent, HostProgram, HostQueue
from ai_assistant.hal.operators import YES, Support
from ai_assistant.hal.remote import graphs, shared, wire
from ai_assistant.hal.remote.process import Child, Limits

MAX_BLOB_BYTES = 4 << 30
_PAGE = 4096
_KNOWN_SHAPES = 64


class RemoteBackend(Backend):
    """Another backend, in a process of its own for each device that is opened.

    Args:
        spec: a shared library (`*.so`), a Python file, or the name of a backend that ships with the product.
        name: what it is called until it was asked; by default the file's name.
        loss: the death of the process counts as the loss of the device.
    """

    name = "remote"

    def __init__(self, spec: str, *, name: str = "", limits: Limits | None = None, loss: bool = False) -> None:
        self.spec = str(Path(spec).absolute()) if "/" in spec else spec
        self.name = name or Path(spec).stem  # type: ignore[misc]
        self._named = bool(name)
        self._limits = limits or Limits()
        self._loss = loss

    def probe(self) -> Probe:
        """In a process that ends again. A backend that fails there is unavailable, and that is said."""
        try:
            child = self._start()
        except AIAssistantError as error:
            return Probe((), error.message, error.hint)
        try:
            answer = child.ask("probe", self._limits.start_s)
            found: Probe = wire.checked(lambda: wire.probe(answer))
            return found
        except AIAssistantError as error:
            return Probe((), error.message, error.hint)
        finally:
            child.end()

    def open(self, device: str = "") -> RemoteContext:
        child = self._start()
        try:
            return RemoteContext(child, device)
        except BaseException:
            child.kill()
            raise

    def _start(self) -> Child:
        child = Child(self.spec, self._limits, loss=self._loss)
        try:
            answer = child.ask("load", self._limits.start_s, spec=self.spec)
            name, version = wire.checked(lambda: (wire.text(answer.get("name")), wire.text(answer.get("version"))))
        except BaseException:
            child.kill()
            raise
        self.version = version
        if not self._named and name:
            self.name = name  # type: ignore[misc]
        return child


class RemoteAllocator(HostAllocator):
    """Memory that this process and the child see. Nothing else can be used by the child without a copy."""

    def __init__(self, child: Child, *, alignment: int, limit_bytes: int) -> None:
        super().__init__(alignment=alignment, limit_bytes=limit_bytes)
        self._child = child
        self._numbers = 0
        self._counting = threading.Lock()
        self._gone_buffers: deque[int] = deque()

    def _make(self, nbytes: int, alignment: int) -> HostBuffer:
        spare = alignment if alignment > _PAGE else 0
        descriptor = shared.create(nbytes + spare)
        try:
            whole = shared.view(descriptor, nbytes + spare)
            start = -whole.ctypes.data % alignment if spare else 0
            with self._counting:
                self._numbers += 1
                number = self._numbers
            buffer = RemoteBuffer(self, whole[start : start + nbytes], number, start)
            self._child.tell("map", descriptor, buffer=number, nbytes=nbytes + spare)
        finally:
            os.close(descriptor)
        # A finalizer may run anywhere, also while a message is being sent: it only takes note.
        weakref.finalize(buffer, self._gone_buffers.append, number)
        return buffer

    def free(self, buffer: Buffer) -> None:
        super().free(buffer)
        assert isinstance(buffer, RemoteBuffer)
        if not self._child.failed:
            self._gone_buffers.append(buffer.number)
            self.give_back()

    def give_back(self) -> None:
        """Tell the child what is not used any more."""
        gone = []
        while self._gone_buffers:
            gone.append(self._gone_buffers.popleft())
        if gone:
            with suppress(AIAssistantError):  # it died, and all its memory with it
                self._child.tell("unmap", buffers=gone)

    def place(self, tensor: Tensor) -> list[object]:
        """A tensor, as the child is told of it. Raises InvalidArgument: it lies elsewhere."""
        buffer = self._own(tensor.buffer)
        if not isinstance(buffer, RemoteBuffer):
            raise InvalidArgument("the tensor lies in memory that the backend's process cannot see")
        return [buffer.number, buffer.start + tensor.offset, wire.of_spec(tensor.spec)]

    def adopt(self, array: object) -> Tensor:
        raise NotSupported(
            "another process cannot use this memory without a copy", hint="upload it to a tensor of this device"
        )


class RemoteBuffer(HostBuffer):
    def __init__(self, allocator: RemoteAllocator, memory: object, number: int, start: int) -> None:
        super().__init__(allocator, memory)  # type: ignore[arg-type]
        self.number = number
        self.start = start


class RemoteProgram(HostProgram):
    def __init__(
        self, context: RemoteContext, number: int, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.context = context
        self._number = number
        self._shapes: dict[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = {}

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        key = tuple(inputs)
        if key not in self._shapes:
            child = self.context.child
            answer = child.ask(
                "output_specs", child.limits.answer_s, program=self._number, inputs=wire.of_specs(key)
            )  # fmt: skip
            found: tuple[TensorSpec, ...] = wire.checked(lambda: wire.specs(answer.get("outputs")))
            if len(found) != len(self.outputs) or not all(each.static for each in found):
                raise BackendFailed("the backend's process gave sizes that are none")
            if len(self._shapes) >= _KNOWN_SHAPES:
                self._shapes.clear()
            self._shapes[key] = found
        return self._shapes[key]

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.run_on(0, inputs, outputs)

    def run_on(self, queue: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        child, allocator = self.context.child, self.context.allocator
        allocator.give_back()
        child.ask(
            "run",
            child.limits.run_s,
            queue=queue,
            program=self._number,
            inputs=[allocator.place(each) for each in inputs],
            outputs=[allocator.place(each) for each in outputs],
        )

    def blob(self) -> bytes:
        child = self.context.child
        answer = child.ask("keep", child.limits.compile_s, program=self._number)
        nbytes = wire.checked(lambda: wire.integer(answer.get("nbytes"), 0, MAX_BLOB_BYTES))
        try:
            descriptor = shared.create(nbytes)
        except OSError as error:
            raise OutOfMemory(f"there is no room for a program of {nbytes} bytes") from error
        try:
            child.ask("kept", child.limits.compile_s, descriptor, program=self._number)
            return shared.view(descriptor, nbytes).tobytes()
        finally:
            os.close(descriptor)

    def close(self) -> None:
        if not self.context.child.failed:
            with suppress(AIAssistantError):  # it died, and the program with it
                self.context.child.ask("forget", self.context.child.limits.answer_s, program=self._number)


class RemoteQueue(HostQueue):
    """The order is kept here, and each program is asked for when its turn comes."""

    def __init__(self, context: RemoteContext, number: int) -> None:
        super().__init__("hal-remote-queue")
        self._context = context
        self._number = number
        self.ended = False

    def submit(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> HostEvent:
        if not isinstance(program, RemoteProgram) or program.context is not self._context:
            raise InvalidArgument("the program belongs to another backend")
        for each in (*inputs, *outputs):
            self._context.allocator.place(each)
        return super().submit(_OnQueue(program, self._number), inputs, outputs)

    def close(self) -> None:
        super().close()
        if not self.ended and not self._context.child.failed:
            with suppress(AIAssistantError):  # it died, and its queues with it
                self._context.child.tell("unqueue", queue=self._number)
        self.ended = True


class _OnQueue(HostProgram):
    """A program together with the queue that it is run on."""

    def __init__(self, program: RemoteProgram, queue: int) -> None:
        self.inputs, self.outputs = program.inputs, program.outputs
        self._program = program
        self._queue = queue

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return self._program.output_specs(inputs)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._program.run_on(self._queue, inputs, outputs)


class RemoteContext(Context):
    def __init__(self, child: Child, device: str) -> None:
        answer = child.ask("open", child.limits.start_s, device=device)
        self.device, self.capabilities = wire.checked(
            lambda: (wire.device(answer.get("device")), wire.capabilities(answer.get("capabilities")))
        )
        self.child = child
        self._allocator = RemoteAllocator(
            child, alignment=self.capabilities.alignment, limit_bytes=self.capabilities.memory_bytes
        )
        self._supported: weakref.WeakKeyDictionary[Graph, dict[int, Support]] = weakref.WeakKeyDictionary()
        self._queues: list[RemoteQueue] = []
        self._lock = threading.Lock()
        self._programs = 0
        self._closed = False
        weakref.finalize(self, child.kill)

    @property
    def allocator(self) -> RemoteAllocator:
        return self._allocator

    @property
    def confinement(self) -> Mapping[str, str]:
        """What the child gave up before it loaded the backend, each with "yes" or why not."""
        return self.child.confinement

    def supports(self, node: Node, graph: Graph) -> Support:
        answers = self._supported.get(graph)
        if answers is None:
            answers = self._ask_supports(graph)
            self._supported[graph] = answers
        if id(node) not in answers:
            raise InvalidArgument("the node is not of that graph", param="node")
        return answers[id(node)]

    def _ask_supports(self, graph: Graph) -> dict[int, Support]:
        """For all nodes at once: a graph is sent once, not once for each."""
        answer = self._with_graph("supports", graph)
        reasons = wire.checked(lambda: [
            None if each is None else wire.text(each) for each in wire.items(answer.get("reasons"), len(graph.nodes))
        ])  # fmt: skip
        if len(reasons) != len(graph.nodes):
            raise BackendFailed("the backend's process did not answer for every node")
        return {
            id(node): YES if reason is None else Support(False, reason)
            for node, reason in zip(graph.nodes, reasons, strict=True)
        }

    def _with_graph(self, op: str, graph: Graph, **fields: object) -> dict[str, object]:
        return self._with_data(op, *graphs.pack(graph), **fields)

    def _with_data(self, op: str, *pieces: object, **fields: object) -> dict[str, object]:
        try:
            descriptor, nbytes = shared.filled(*pieces)  # type: ignore[arg-type]
        except (OSError, MemoryError) as error:
            raise OutOfMemory("there is no room for what the backend's process must see") from error
        try:
            return self.child.ask(op, self.child.limits.compile_s, descriptor, nbytes=nbytes, **fields)
        finally:
            os.close(descriptor)

    def compile(self, graph: Graph) -> RemoteProgram:
        number = self._number()
        program = self._program(number, self._with_graph("compile", graph, program=number))
        if len(program.inputs) != len(graph.inputs) or len(program.outputs) != len(graph.outputs):
            raise BackendFailed("the backend's program has other inputs or outputs than its graph")
        return program

    def load(self, blob: bytes) -> RemoteProgram:
        if not blob:
            raise InvalidModel("a compiled program has no bytes")
        number = self._number()
        return self._program(number, self._with_data("restore", blob, program=number))

    def _number(self) -> int:
        with self._lock:
            self._programs += 1
            return self._programs

    def _program(self, number: int, answer: dict[str, object]) -> RemoteProgram:
        inputs, outputs = wire.checked(lambda: (wire.specs(answer.get("inputs")), wire.specs(answer.get("outputs"))))
        return RemoteProgram(self, number, inputs, outputs)

    def queue(self) -> RemoteQueue:
        with self._lock:
            most = self.capabilities.max_queues
            self._queues = [each for each in self._queues if not each.ended]
            if most and len(self._queues) >= most:
                raise NotSupported(f"the device has {most} queues, and all are in use")
            self._programs += 1
            self._queues.append(RemoteQueue(self, self._programs))
            return self._queues[-1]

    def power_w(self) -> float | None:
        if not self.capabilities.reads_power:
            return None
        watts = self.child.ask("power", self.child.limits.answer_s).get("watts")
        return float(watts) if isinstance(watts, int | float) and 0 <= watts < 1e5 else None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for queue in self._queues:
                queue.close()
            self.child.end()
