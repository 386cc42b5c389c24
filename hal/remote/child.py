"""The child's end: loads one backend and does what the parent asks. Runs after `ai_assistant.hal.confine`.

Three kinds of threads: this one reads, one does what is asked once in a while (open, compile …), and one for each queue
runs programs. So a program that runs long delays no other queue, and compiling delays no program.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from ai_assistant.errors import BackendFailed, NotSupported, OutOfMemory
from ai_assistant.hal.contract import Backend, Buffer, Context, Program, Tensor
from ai_assistant.hal.graph import Array, TensorSpec
from ai_assistant.hal.remote import graphs, shared, wire

Message = dict[str, Any]
_CONTROL = -1


class _Memory:
    """Memory of the parent as the device sees it: in place, or in a buffer of the device beside it."""

    def __init__(self, context: Context, array: Array) -> None:
        self.array = array
        self._context = context
        self.copied = False
        try:
            self._buffer: Buffer = context.allocator.adopt(array).buffer
        except NotSupported:
            self._buffer = context.allocator.allocate(array.nbytes)
            self.copied = True

    def tensor(self, spec: TensorSpec, offset: int) -> Tensor:
        return Tensor(self._buffer, spec, offset)

    def before(self, tensor: Tensor) -> None:
        if self.copied:
            part = self.array[tensor.offset : tensor.offset + tensor.spec.nbytes]
            self._context.allocator.copy_in(self._buffer, part, tensor.offset)

    def after(self, tensor: Tensor) -> None:
        if self.copied:
            part = self.array[tensor.offset : tensor.offset + tensor.spec.nbytes]
            self._context.allocator.copy_out(self._buffer, part, tensor.offset)


class Server:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._workers: dict[int, SimpleQueue[Message | None]] = {}
        self._backend: Backend | None = None
        self._context: Context | None = None
        self._maps: dict[int, Array] = {}
        self._memories: dict[int, _Memory] = {}
        self._programs: dict[int, Program] = {}
        self._kept: dict[int, bytes] = {}

    # ------------------------------------------------------------------------------------------------ the connection

    def serve(self) -> None:
        """Until the parent closes the connection."""
        while (message := self._receive()) is not None:
            op = message["op"]
            if op == "map":
                self._map(message)
            elif op == "unmap":
                for number in message["buffers"]:
                    self._maps.pop(number, None)
                    self._memories.pop(number, None)
            elif op == "unqueue":
                if (work := self._workers.pop(message["queue"], None)) is not None:
                    work.put(None)
            else:
                self._worker(message["queue"] if op == "run" else _CONTROL).put(message)

    def _receive(self) -> Message | None:
        header = b""
        descriptors: list[int] = []
        while len(header) < 4:
            part, found, _, _ = socket.recv_fds(self._connection, 4 - len(header), 1)
            descriptors += found
            if not part:
                return None
            header += part
        data = bytearray()
        size = wire.length(header)
        while len(data) < size:
            part = self._connection.recv(size - len(data))
            if not part:
                return None
            data += part
        message = wire.parse(bytes(data))
        if descriptors:
            message["descriptor"] = descriptors[0]
        return message

    def _worker(self, number: int) -> SimpleQueue[Message | None]:
        if number not in self._workers:
            work: SimpleQueue[Message | None] = SimpleQueue()
            target = self._control if number == _CONTROL else self._run_queue
            threading.Thread(target=target, args=(work,), daemon=True).start()
            self._workers[number] = work
        return self._workers[number]

    def send(self, message: Message) -> None:
        data = wire.frame(message)
        with self._sending:
            self._connection.sendall(data)

    def _reply(self, message: Message, work: Callable[[], Message]) -> None:
        try:
            answer = work()
        except Exception as error:
            answer = {"error": wire.of_error(error)}
        finally:
            if "descriptor" in message:
                os.close(message["descriptor"])
        self.send({"id": message["id"], **answer})

    # -------------------------------------------------------------------------------------------- asked once in a while

    def _control(self, work: SimpleQueue[Message | None]) -> None:
        does: dict[str, Callable[[Message], Message]] = {
            "load": self._load,
            "probe": self._probe,
            "open": self._open,
            "supports": self._supports,
            "compile": self._compile,
            "restore": self._restore,
            "output_specs": self._output_specs,
            "keep": self._keep,
            "kept": self._write_kept,
            "forget": self._forget,
            "power": self._power,
            "close": self._close,
        }
        while (message := work.get()) is not None:
            self._reply(message, partial(does[message["op"]], message))

    def _load(self, message: Message) -> Message:
        from ai_assistant.hal import discovery

        self._backend = discovery.load_here(message["spec"])
        return {"name": self._backend.name, "version": self._backend.version}

    def _probe(self, message: Message) -> Message:
        assert self._backend is not None
        found = self._backend.probe()
        devices = [wire.of_device(each) for each in found.devices]
        return {"devices": devices, "unavailable": found.unavailable[:300], "hint": found.hint[:300]}

    def _open(self, message: Message) -> Message:
        assert self._backend is not None
        self._context = self._backend.open(message["device"])
        return {
            "device": wire.of_device(self._context.device),
            "capabilities": wire.of_capabilities(self._context.capabilities),
        }

    @property
    def _device(self) -> Context:
        if self._context is None:
            raise BackendFailed("no device is open")
        return self._context

    def _supports(self, message: Message) -> Message:
        graph = graphs.unpack(shared.view(message["descriptor"], message["nbytes"]))
        answers = [self._device.supports(node, graph) for node in graph.nodes]
        return {"reasons": [None if each else (each.reason or "not supported")[:200] for each in answers]}

    def _compile(self, message: Message) -> Message:
        graph = graphs.unpack(shared.view(message["descriptor"], message["nbytes"]))
        return self._program(message["program"], self._device.compile(graph))

    def _restore(self, message: Message) -> Message:
        blob = shared.view(message["descriptor"], message["nbytes"]).tobytes()
        return self._program(message["program"], self._device.load(blob))

    def _program(self, number: int, program: Program) -> Message:
        self._programs[number] = program
        return {"inputs": wire.of_specs(program.inputs), "outputs": wire.of_specs(program.outputs)}

    def _output_specs(self, message: Message) -> Message:
        inputs = wire.specs(message["inputs"])
        return {"outputs": wire.of_specs(self._programs[message["program"]].output_specs(inputs))}

    def _keep(self, message: Message) -> Message:
        blob = self._programs[message["program"]].blob()
        self._kept[message["program"]] = blob
        return {"nbytes": len(blob)}

    def _write_kept(self, message: Message) -> Message:
        blob = self._kept.pop(message["program"])
        shared.view(message["descriptor"], len(blob))[:] = np.frombuffer(blob, np.uint8)
        return {}

    def _forget(self, message: Message) -> Message:
        if (program := self._programs.pop(message["program"], None)) is not None:
            program.close()
        return {}

    def _power(self, message: Message) -> Message:
        return {"watts": self._device.power_w()}

    def _close(self, message: Message) -> Message:
        if self._context is not None:
            self._context.close()
            self._context = None
        return {}

    # ------------------------------------------------------------------------------------------------------ programs

    def _map(self, message: Message) -> None:
        descriptor = message["descriptor"]
        try:
            self._maps[message["buffer"]] = shared.view(descriptor, message["nbytes"])
        except (OSError, ValueError):
            pass  # whoever uses it is told
        finally:
            os.close(descriptor)

    def _memory(self, number: int) -> _Memory:
        if number not in self._memories:
            if number not in self._maps:
                raise OutOfMemory("the backend's process cannot see the memory")
            self._memories[number] = _Memory(self._device, self._maps[number])
        return self._memories[number]

    def _run_queue(self, work: SimpleQueue[Message | None]) -> None:
        queue = None
        while (message := work.get()) is not None:
            try:
                queue = queue or self._device.queue()
            except Exception as error:
                self.send({"id": message["id"], "error": wire.of_error(error)})
                continue
            self._reply(message, partial(self._run, queue, message))
        if queue is not None:
            queue.close()

    def _run(self, queue: Any, message: Message) -> Message:
        inputs, outputs = (
            [
                (memory, memory.tensor(wire.spec(spec), offset))
                for memory, offset, spec in ((self._memory(buffer), offset, spec) for buffer, offset, spec in tensors)
            ]
            for tensors in (message["inputs"], message["outputs"])
        )
        for memory, tensor in inputs:
            memory.before(tensor)
        program = self._programs[message["program"]]
        try:
            queue.submit(program, [tensor for _, tensor in inputs], [tensor for _, tensor in outputs]).wait()
        except Exception:
            with suppress(Exception):
                queue.synchronize()  # raises the same once more, and then the queue works again
            raise
        for memory, tensor in outputs:
            memory.after(tensor)
        return {}


def serve(descriptor: int, confinement: dict[str, str]) -> None:
    """Say what was given up, and then serve until the parent closes the connection."""
    server = Server(socket.socket(fileno=descriptor))
    server.send({"id": 0, "confinement": confinement})
    server.serve()
    os._exit(0)  # threads of the backend may hang; nothing of this process is needed any more
