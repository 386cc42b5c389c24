"""A right backend over a few operators, and wrong ones: each breaks one promise."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ai_assistant.errors import BackendFailed, NotSupported
from ai_assistant.hal.contract import Backend, BackendDevice, Capabilities, Context, Probe, Program, Tensor
from ai_assistant.hal.graph import Array, DType, Graph, Node, TensorSpec
from ai_assistant.hal.host import HostAllocator, HostBuffer, HostEvent, HostProgram, HostQueue, check
from ai_assistant.hal.operators import OperatorRegistry, Support, broadcast, same

MEMORY_BYTES = 256 << 20
_kept: list[Any] = []


class FakeProgram(HostProgram):
    def __init__(self, graph: Graph, context: FakeContext) -> None:
        self.inputs, self.outputs = graph.input_specs, graph.output_specs
        self.graph, self.context = graph, context

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return self.outputs

    def values(self, inputs: Sequence[Tensor]) -> dict[int, Array]:
        known = {index: value.data for index, value in enumerate(self.graph.values) if value.data is not None}
        return known | {index: tensor.numpy() for index, tensor in zip(self.graph.inputs, inputs, strict=True)}

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        values = self.values(inputs)
        for node in self.graph.nodes:
            kernel = self.context.operators.kernel(node)
            values |= dict(zip(node.outputs, kernel(node, [values[index] for index in node.inputs]), strict=True))
        for index, tensor in zip(self.graph.outputs, outputs, strict=True):
            tensor.numpy()[...] = values[index]


class FakeContext(Context):
    capabilities = Capabilities(dtypes=frozenset({DType.F32}), memory_bytes=MEMORY_BYTES)
    program: ClassVar[type[FakeProgram]] = FakeProgram
    queues: ClassVar[type[HostQueue]] = HostQueue
    memory: ClassVar[type[HostAllocator]] = HostAllocator
    checked: ClassVar[bool] = True

    def __init__(self, device: BackendDevice) -> None:
        self.device = device
        self.operators = OperatorRegistry()
        add, relu = (broadcast, same) if self.checked else (None, None)
        self.operators.register("Add", {DType.F32}, since=7, check=add, kernel=lambda node, x: (x[0] + x[1],))
        self.operators.register(
            "Relu", {DType.F32}, since=6, check=relu, kernel=lambda node, x: (np.maximum(x[0], np.float32(0)),)
        )
        self._memory = self.memory(limit_bytes=MEMORY_BYTES)
        self._open: list[HostQueue] = []

    @property
    def allocator(self) -> HostAllocator:
        return self._memory

    def supports(self, node: Node, graph: Graph) -> Support:
        return self.operators.supports(node, graph)

    def compile(self, graph: Graph) -> Program:
        for node in graph.nodes:
            if not (support := self.supports(node, graph)):
                raise NotSupported(support.reason)
        return self.program(graph, self)

    def queue(self) -> HostQueue:
        self._open.append(self.queues())
        return self._open[-1]

    def close(self) -> None:
        for queue in self._open:
            queue.close()


class Right(Backend):
    """Keeps every promise."""

    name = "fake"
    version = "1"
    context: ClassVar[type[FakeContext]] = FakeContext

    def probe(self) -> Probe:
        return Probe((BackendDevice("0", "nothing but a fake", "cpu"),))

    def open(self, device: str = "") -> Context:
        if device not in ("", "0"):
            raise NotSupported("there is no such device")
        return self.context(self.probe().devices[0])


def _backend(program: type[FakeProgram] = FakeProgram, **parts: Any) -> type[Right]:
    context = type("MadeContext", (FakeContext,), {"program": program, **parts})
    return type("Made", (Right,), {"context": context})


class _WritesPast(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().run(inputs, outputs)
        # As a kernel does that rounds the size up to a whole vector register.
        ctypes.memset(outputs[0].numpy().ctypes.data + outputs[0].spec.nbytes, 0, 16)


class _ReadsBefore(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        ctypes.string_at(inputs[0].numpy().ctypes.data - 4, 4)
        super().run(inputs, outputs)


class _WrongResult(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().run(inputs, outputs)
        result = outputs[0].numpy()
        if result.size > 16:  # the rest that no register divides
            result.reshape(-1)[result.size // 16 * 16 :] += 1


class _Tires(FakeProgram):
    """Right at first, and wrong once it has run for a while."""

    def __init__(self, graph: Graph, context: FakeContext) -> None:
        super().__init__(graph, context)
        self.runs = 0

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().run(inputs, outputs)
        self.runs += 1
        if self.runs > 5:
            outputs[0].numpy()[...] += 1


class _Shifted(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().run(inputs, outputs)
        outputs[0].numpy()[...] += np.float32(0.25)


class _Hangs(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if inputs[0].spec.shape[-1:] == (129,):
            ctypes.CDLL(None).sleep(3600)
        super().run(inputs, outputs)


class _Dies(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if inputs[0].spec.shape[-1:] == (257,):
            os.abort()
        super().run(inputs, outputs)


class _DiesOfLong(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if inputs[0].spec.shape[-1:] >= (7,):
            os.abort()
        super().run(inputs, outputs)


class _Raises(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        raise BackendFailed("the device did not answer")


class _LeaksTensors(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().run(inputs, outputs)
        _kept.append(self.context.allocator.allocate(outputs[0].spec.nbytes))


class _LeaksProcess(FakeProgram):
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().run(inputs, outputs)
        _kept.append(np.ones(256 << 10, np.uint8))


class _LeaksPrograms(FakeProgram):
    def __init__(self, graph: Graph, context: FakeContext) -> None:
        super().__init__(graph, context)
        _kept.append(np.ones(512 << 10, np.uint8))


class _WrongForThreads(FakeProgram):
    _scratch: ClassVar[dict[int, Array]] = {}

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        # One scratch buffer for everybody: another thread writes to it meanwhile.
        self._scratch[0] = inputs[0].numpy().copy()
        time.sleep(0.0005)
        if self._scratch[0].shape != inputs[0].numpy().shape:
            raise BackendFailed("the scratch memory has another size")
        inputs = (Tensor(inputs[0].buffer.allocator.adopt(self._scratch[0]).buffer, inputs[0].spec), *inputs[1:])
        super().run(inputs, outputs)


class _LyingContext(FakeContext):
    def supports(self, node: Node, graph: Graph) -> Support:
        return Support(True)


class _LyingAboutTypes(FakeContext):
    def supports(self, node: Node, graph: Graph) -> Support:
        return Support(True) if node.op in ("Add", "Relu") and not node.domain else super().supports(node, graph)

    def compile(self, graph: Graph) -> Program:
        if graph.input_specs[0].dtype is not DType.F32:
            raise NotSupported("that type after all not")
        return super().compile(graph)


class _Silent(FakeContext):
    def supports(self, node: Node, graph: Graph) -> Support:
        return Support(bool(super().supports(node, graph)))


class _Reorders(HostQueue):
    """Runs programs two by two, and the second first."""

    def __init__(self, name: str = "hal") -> None:
        super().__init__(name)
        self._held: Any = None

    def _push(self, work: Any) -> HostEvent:
        is_program = isinstance(work, partial)
        if is_program and self._held is None:
            self._held = (work, HostEvent())
            return self._held[1]  # type: ignore[no-any-return]
        made = super()._push(work) if is_program else None
        if self._held is not None and (is_program or work.__name__ == "_nothing"):
            (held, event), self._held = self._held, None

            def late() -> None:
                held()
                event.finish()

            super()._push(late)
        return made or super()._push(work)


class _IgnoresEvents(HostQueue):
    def wait(self, event: Any) -> None:
        pass


class _ForgetsFailure(HostQueue):
    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            work, event = item
            with contextlib.suppress(Exception):
                work()
            event.finish()


class _Synchronous(HostQueue):
    def _push(self, work: Any) -> HostEvent:
        event = super()._push(work)
        event.wait()
        return event


class _SaysSoAtOnce(HostQueue):
    def _push(self, work: Any) -> HostEvent:
        event = super()._push(work)
        os.eventfd_write(event.fileno(), 1)
        return event


class _ChecksNothing(HostQueue):
    def submit(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> HostEvent:
        assert isinstance(program, HostProgram)
        return self._push(lambda: program.run(tuple(inputs), tuple(outputs)))


class _ChecksLate(HostQueue):
    def submit(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> HostEvent:
        assert isinstance(program, HostProgram)

        def work() -> None:
            check(program, inputs, outputs)
            program.run(tuple(inputs), tuple(outputs))

        return self._push(work)


class _Unaligned(HostAllocator):
    def allocate(self, nbytes: int, alignment: int = 0) -> HostBuffer:
        whole = super().allocate(nbytes + 4, alignment)
        assert whole.memory is not None
        whole.memory = whole.memory[4:]
        whole.nbytes = nbytes
        return whole


class _CountsTwice(HostAllocator):
    def free(self, buffer: Any) -> None:
        with self._lock:
            self._in_use -= buffer.nbytes
            self._frees += 1
        buffer.released[0] = True
        buffer.memory = None


class _CopiesOutside(HostAllocator):
    def _slice(self, buffer: Any, offset: int, nbytes: int) -> Array:
        return super()._slice(buffer, max(0, min(offset, buffer.nbytes - nbytes)), min(nbytes, buffer.nbytes))


class _Unlimited(HostAllocator):
    def __init__(self, *, limit_bytes: int = 0) -> None:
        super().__init__()


class _CopiesAdopted(HostAllocator):
    def adopt(self, array: Any) -> Tensor:
        return self.upload(array)


class Absent(Right):
    """No device."""

    def probe(self) -> Probe:
        return Probe((), "the firmware is missing", "install firmware-fake")


class ProbeDies(Right):
    def probe(self) -> Probe:
        os.abort()


class ProbeHangs(Right):
    def probe(self) -> Probe:
        time.sleep(3600)
        return super().probe()


class ProbeRaises(Right):
    def probe(self) -> Probe:
        raise ZeroDivisionError("by design")


class Prints(Right):
    """Writes to the standard output, where the suite's messages go."""

    def probe(self) -> Probe:
        print('{"end": "L2.run", "outcome": "passed"}', flush=True)
        os.write(1, b"\xff\xfe garbage\n")
        return super().probe()


class AnyDevice(Right):
    def open(self, device: str = "") -> Context:
        return super().open()


WritesPast = _backend(_WritesPast)
ReadsBefore = _backend(_ReadsBefore)
WrongResult = _backend(_WrongResult)
Tires = _backend(_Tires)
Shifted = _backend(_Shifted)
Hangs = _backend(_Hangs)
Dies = _backend(_Dies)
DiesOfLong = _backend(_DiesOfLong)
Raises = _backend(_Raises)
LeaksTensors = _backend(_LeaksTensors)
LeaksProcess = _backend(_LeaksProcess)
LeaksPrograms = _backend(_LeaksPrograms)
WrongForThreads = _backend(_WrongForThreads)
Lies = type("Lies", (Right,), {"context": _LyingContext})
LiesAboutTypes = type("LiesAboutTypes", (Right,), {"context": _LyingAboutTypes})
Silent = type("Silent", (Right,), {"context": _Silent})
Reorders = _backend(queues=_Reorders)
IgnoresEvents = _backend(queues=_IgnoresEvents)
ForgetsFailure = _backend(queues=_ForgetsFailure)
Synchronous = _backend(queues=_Synchronous)
SaysSoAtOnce = _backend(queues=_SaysSoAtOnce)
BelievesShapes = _backend(checked=False)
ChecksNothing = _backend(queues=_ChecksNothing)
ChecksLate = _backend(queues=_ChecksLate)
Unaligned = _backend(memory=_Unaligned)
CountsTwice = _backend(memory=_CountsTwice)
CopiesOutside = _backend(memory=_CopiesOutside)
Unlimited = _backend(memory=_Unlimited)
CopiesAdopted = _backend(memory=_CopiesAdopted)
