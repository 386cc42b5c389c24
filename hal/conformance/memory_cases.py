"""L2, memory: allocation, alignment, limits, copies, views, writes out of bounds, leaks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np

from ai_assistant.errors import AIAssistantError, InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.conformance.case import CaseFailed, Cases, Note, Unsupported, expect
from ai_assistant.hal.conformance.guard import Guarded
from ai_assistant.hal.conformance.subject import WAIT_S, Subject, place, refused, run, viewable
from ai_assistant.hal.contract import Buffer, Context, Tensor
from ai_assistant.hal.graph import Array, DType, TensorSpec

CASES = Cases()
RUNS = 300
"""How often a program is run to see whether it leaks."""
LEAK_BYTES = 256 << 10
"""Size of a tensor in those runs, so that a leak of one per run makes 75 MiB."""
GROWTH_BYTES = 24 << 20
"""How much the process may grow in those runs: an allocator's own caches, not a leak."""


@CASES.case("L2.allocate")
def allocate(subject: Subject) -> None:
    """Buffers have the size that was asked for, hold what is written, and do not overlap."""
    with subject.context() as context:
        random = subject.random()
        sizes = (1, 2, 3, 63, 64, 65, 4095, 4096, 4097, (1 << 20) + 1)
        held = []
        for size in sizes:
            data = random.bytes(size)
            buffer = context.allocator.allocate(size)
            expect(buffer.nbytes == size, f"{size} bytes were asked for, the buffer says {buffer.nbytes}")
            context.allocator.copy_in(buffer, data)
            held.append((buffer, data))
        for buffer, data in held:
            found = bytearray(buffer.nbytes)
            context.allocator.copy_out(buffer, found)
            expect(found == data, f"a buffer of {buffer.nbytes} bytes lost what was written to it")
            buffer.free()


@CASES.case("L2.alignment")
def alignment(subject: Subject) -> None:
    """Buffers start where they should: at multiples of the device's alignment, or of the one asked for."""
    with subject.context() as context:
        viewable(context)
        default = context.capabilities.alignment
        for wanted in (0, *(1 << power for power in range(13))):
            for size in (1, 100, 4096):
                buffer = context.allocator.allocate(size, wanted)
                address = context.allocator.view(Tensor(buffer, TensorSpec(DType.U8, (size,)))).ctypes.data
                expect(address % (wanted or default) == 0, f"a buffer for alignment {wanted or default} is not aligned")


@CASES.case("L2.limits")
def limits(subject: Subject) -> None:
    """More memory than there is is refused as OutOfMemory, and the next allocation works."""
    with subject.context() as context:
        known = context.capabilities.memory_bytes
        for size in ((1 << 62), *((known + 1,) if known else ())):
            refused(OutOfMemory, f"{size} bytes", context.allocator.allocate, size)
        before = context.allocator.statistics().in_use_bytes
        context.allocator.allocate(1024).free()
        expect(context.allocator.statistics().in_use_bytes == before, "memory that was refused is counted")


@CASES.case("L2.free")
def free(subject: Subject) -> None:
    """Freeing twice does no harm and is counted once; what was freed cannot be used."""
    with subject.context() as context:
        start = context.allocator.statistics()
        buffer = context.allocator.allocate(4096)
        one = context.allocator.statistics()
        expect(one.in_use_bytes >= start.in_use_bytes + 4096, "4096 bytes were taken and are not counted")
        expect(one.allocations == start.allocations + 1, "an allocation was not counted")
        buffer.free()
        context.allocator.free(buffer)
        end = context.allocator.statistics()
        expect(end.in_use_bytes == start.in_use_bytes, "a buffer that was freed twice is not counted once")
        expect(end.frees == start.frees + 1, "a free was not counted once")
        expect(end.peak_bytes >= one.in_use_bytes, "the peak is less than what was in use")
        refused(InvalidArgument, "writing to freed memory", context.allocator.copy_in, buffer, b"x")
        refused(InvalidArgument, "reading freed memory", context.allocator.copy_out, buffer, bytearray(1))


@CASES.case("L2.free.unowned")
def free_unowned(subject: Subject) -> None:
    """A buffer that nobody refers to any more is given back."""
    with subject.context() as context:
        start = context.allocator.statistics().in_use_bytes
        for _ in range(64):
            context.allocator.allocate(1 << 16)
        gc.collect()
        left = context.allocator.statistics().in_use_bytes - start
        expect(left <= 0, f"{left} bytes of buffers that nobody has are still in use")


@CASES.case("L2.copy")
def copy(subject: Subject) -> None:
    """Copies reach the bytes that they are told, and no others."""
    with subject.context() as context:
        random = subject.random()
        size = 1000
        buffer = context.allocator.allocate(size)
        model = bytearray(size)
        context.allocator.copy_in(buffer, model)
        for _ in range(100):
            offset = int(random.integers(0, size + 1))
            data = random.bytes(int(random.integers(0, size - offset + 1)))
            context.allocator.copy_in(buffer, data, offset)
            model[offset : offset + len(data)] = data
            start = int(random.integers(0, size + 1))
            part = bytearray(int(random.integers(0, size - start + 1)))
            context.allocator.copy_out(buffer, part, start)
            expect(part == model[start : start + len(part)], f"{len(part)} bytes at {start} are not what was written")


@CASES.case("L2.copy.outside")
def copy_outside(subject: Subject) -> None:
    """Copies that reach outside a buffer are refused, and write nothing."""
    with subject.context() as context:
        size = 256
        buffer = context.allocator.allocate(size)
        context.allocator.copy_in(buffer, bytes(size))
        far = 1 << 62
        for offset, length in ((0, size + 1), (size, 1), (1, size), (-1, 1), (-1, size), (far, 1), (-far, 1)):
            what = f"copying {length} bytes at {offset} of {size}"
            ones = b"\xff" * length
            refused(InvalidArgument, what, context.allocator.copy_in, buffer, ones, offset)
            refused(InvalidArgument, what, context.allocator.copy_out, buffer, bytearray(length), offset)
        found = bytearray(size)
        context.allocator.copy_out(buffer, found)
        expect(found == bytes(size), "a copy that was refused wrote something")


@CASES.case("L2.view")
def view(subject: Subject) -> None:
    """A view is the memory itself, and crosses by DLPack without a copy."""
    with subject.context() as context:
        viewable(context)
        tensor = context.allocator.upload(np.arange(24, dtype=np.float32).reshape(4, 6))
        tensor.numpy()[1, 2] = -5.0
        expect(context.allocator.download(tensor)[1, 2] == -5.0, "what was written to a view did not reach the tensor")
        shared = np.from_dlpack(tensor)
        context.allocator.copy_in(tensor.buffer, np.full((4, 6), 3, np.float32))
        expect(np.all(shared == 3), "DLPack gave a copy")
        outside = Tensor(tensor.buffer, TensorSpec(DType.F32, (25,)))
        refused(InvalidArgument, "a view past the end", context.allocator.view, outside)


@CASES.case("L2.offset")
def offset(subject: Subject) -> None:
    """Tensors in the midst of larger buffers are computed, and nothing around them is written to."""
    with subject.context() as context:
        random = subject.random()
        queue = context.queue()
        step = max(64, context.capabilities.alignment)
        for columns in (1, 3, 7, 16, 31, 33, 64, 129):
            work = subject.work(context, (3, columns))
            arrays = work.arrays(random)
            inputs = [place(context, array, step, step) for array in arrays]
            output, intact = place(context, np.zeros(work.made, np.float32), 2 * step, step)
            queue.submit(work.program, [tensor for tensor, _ in inputs], [output]).wait(WAIT_S)
            intact()
            for _, unchanged in inputs:
                unchanged()
            work.check(context.allocator.download(output), arrays, "at an offset")


def _adopted(context: Context, memory: Guarded, array: Array) -> Tensor | None:
    try:
        return context.allocator.adopt(memory.array(array))
    except NotSupported:
        return None


@CASES.case("L2.bounds")
def bounds(subject: Subject) -> Note:
    """Programs read and write inside their tensors only: guard pages stand at both sides."""
    with subject.context() as context:
        viewable(context)
        random = subject.random()
        queue = context.queue()
        tried = 0
        for columns in (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 67, 1024):
            for at_end in (True, False):
                work = subject.work(context, (3, columns))
                arrays = work.arrays(random)
                nothing = np.zeros(work.made, np.float32)
                with Guarded(nothing.nbytes, at_end=at_end) as memory:
                    output = _adopted(context, memory, nothing)
                    if output is None:
                        continue
                    held = [Guarded(array.nbytes, at_end=at_end) for array in arrays]
                    inputs = [_adopted(context, each, array) for each, array in zip(held, arrays, strict=True)]
                    given = [
                        each or context.allocator.upload(array) for each, array in zip(inputs, arrays, strict=True)
                    ]
                    queue.submit(work.program, given, [output]).wait(WAIT_S)
                    # What the host sees of its own memory, not what the backend says of it.
                    work.check(memory.bytes.view(np.float32).reshape(work.made), arrays, "in memory of the host")
                    tried += 1
        if not tried:
            raise Unsupported("the device cannot use memory of the host; L2.offset watches its own")
        return Note(f"{tried} of 28 sizes and places could be adopted", 28, tried)


@CASES.case("L2.adopt")
def adopt(subject: Subject) -> None:
    """Memory of the host is used without a copy or refused; what has gaps is refused."""
    with subject.context() as context:
        array = np.ones((8, 8), np.float32)
        before = context.allocator.statistics().in_use_bytes
        try:
            tensor = context.allocator.adopt(array)
        except NotSupported as error:
            raise Unsupported(error.message) from error
        array[0, 0] = 9
        expect(context.allocator.download(tensor)[0, 0] == 9, "the host's memory was copied")
        expect(context.allocator.statistics().in_use_bytes == before, "memory that is lent counts as the device's own")
        tensor.buffer.free()
        expect(array[0, 0] == 9, "freeing lent memory destroyed it")
        refused(NotSupported, "memory with gaps", context.allocator.adopt, array[:, ::2])


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@CASES.case("L2.leak", weight=2)
def leak(subject: Subject) -> Note:
    """Running a program over and over takes no more memory, of the device or of the process."""
    with subject.context() as context:
        work = subject.work(context, (1, 256) if _only_matmul(subject, context) else (LEAK_BYTES // 4,))
        queue = context.queue()
        arrays = work.arrays(subject.random())
        for _ in range(20):
            run(context, queue, work.program, arrays)
        gc.collect()
        in_use, resident = context.allocator.statistics().in_use_bytes, resident_bytes()
        for _ in range(RUNS):
            run(context, queue, work.program, arrays)
        gc.collect()
        left = context.allocator.statistics().in_use_bytes - in_use
        expect(left <= 0, f"{left} bytes of the device are still in use after {RUNS} runs")
        growth = resident_bytes() - resident
        expect(growth < GROWTH_BYTES, f"the process grew by {growth >> 20} MiB in {RUNS} runs")
        return Note(f"{RUNS} runs")


def _only_matmul(subject: Subject, context: Context) -> bool:
    return subject.work(context, (8,)).graph.nodes[0].op == "MatMul"


@CASES.case("L2.leak.programs", weight=2)
def leak_programs(subject: Subject) -> Note:
    """Compiling, running and closing programs over and over takes no more memory."""
    rounds = 200
    with subject.context() as context:
        queue = context.queue()

        def once() -> None:
            work = subject.work(context, (1, 1024))
            arrays = work.arrays(subject.random())
            work.check(run(context, queue, work.program, arrays)[0], arrays)
            work.program.close()
            work.program.close()

        for _ in range(20):
            once()
        gc.collect()
        in_use, resident = context.allocator.statistics().in_use_bytes, resident_bytes()
        for _ in range(rounds):
            once()
        gc.collect()
        left = context.allocator.statistics().in_use_bytes - in_use
        expect(left <= 0, f"{left} bytes of the device are still in use after {rounds} programs")
        growth = resident_bytes() - resident
        expect(growth < GROWTH_BYTES, f"the process grew by {growth >> 20} MiB in {rounds} programs")
        return Note(f"{rounds} programs")


@CASES.case("L2.exhausted")
def exhausted(subject: Subject) -> Note:
    """When a device's memory is all taken it says so, and works again when some is given back."""
    with subject.context() as context:
        known = context.capabilities.memory_bytes
        if not known:
            raise Unsupported("how much memory the device has is not known")
        held: list[Buffer] = []
        piece = max(1, min(known // 8, 64 << 20))
        try:
            while len(held) * piece <= known:
                held.append(context.allocator.allocate(piece))
        except OutOfMemory:
            pass
        except AIAssistantError as error:
            raise CaseFailed(f"a full device must raise OutOfMemory, not {error.name}") from error
        else:
            raise CaseFailed(f"more than the {known} bytes that the device has could be allocated")
        for buffer in held:
            buffer.free()
        context.allocator.allocate(piece).free()
        return Note(f"{len(held)} times {piece >> 20} MiB")
