"""Memory and queues of the host: for backends that compute on the CPU, or hand work to a library that does.

A backend built on these has its `compile` to write and little else; backends/null.py and the Python example do so.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    Busy,
    InvalidArgument,
    NotSupported,
    OutOfMemory,
    Timeout,
)
from ai_assistant.hal.contract import (
    Allocator,
    AllocatorStatistics,
    Buffer,
    Event,
    Program,
    Queue,
    Tensor,
)
from ai_assistant.hal.graph import Array, DType, TensorSpec

MAX_ALIGNMENT = 1 << 21


class HostBuffer(Buffer):
    """Bytes of this process, or of somebody who lends them."""

    def __init__(self, allocator: HostAllocator, memory: Array, *, lent: bool = False) -> None:
        self._allocator = allocator
        self.memory: Array | None = memory
        self.nbytes = memory.nbytes
        self.released = [lent]
        """Whether its bytes are not counted any more: lent ones never were."""

    @property
    def allocator(self) -> HostAllocator:
        return self._allocator


class HostAllocator(Allocator):
    """Aligned memory of this process.

    Args:
        limit_bytes: how much may be in use at once; 0: whatever the system gives.
    """

    def __init__(self, *, alignment: int = 64, limit_bytes: int = 0) -> None:
        self._alignment = alignment
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._in_use = self._peak = self._allocations = self._frees = 0

    def allocate(self, nbytes: int, alignment: int = 0) -> HostBuffer:
        alignment = alignment or self._alignment
        if nbytes < 0:
            raise InvalidArgument(f"a buffer cannot have {nbytes} bytes", param="nbytes")
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise InvalidArgument(f"an alignment is a power of two up to {MAX_ALIGNMENT}", param="alignment")
        with self._lock:
            if self._limit_bytes and self._in_use + nbytes > self._limit_bytes:
                raise OutOfMemory(f"{nbytes} bytes were asked for, {self._limit_bytes - self._in_use} are left")
            self._in_use += nbytes
        try:
            buffer = self._make(nbytes, alignment)
        except (MemoryError, ValueError, OSError) as error:
            with self._lock:
                self._in_use -= nbytes
            raise OutOfMemory(f"{nbytes} bytes cannot be had") from error
        with self._lock:
            self._peak = max(self._peak, self._in_use)
            self._allocations += 1
        # Also what nobody frees is given back, and counted, when it goes.
        weakref.finalize(buffer, self._gone, nbytes, buffer.released)
        return buffer

    def _make(self, nbytes: int, alignment: int) -> HostBuffer:
        """The memory itself: overridden where others must see it too. Raises MemoryError, ValueError, OSError."""
        whole = np.empty(nbytes + alignment, np.uint8)
        start = -whole.ctypes.data % alignment
        return HostBuffer(self, whole[start : start + nbytes])

    def free(self, buffer: Buffer) -> None:
        own = self._own(buffer, freed=True)
        own.memory = None
        self._gone(own.nbytes, own.released)

    def _gone(self, nbytes: int, released: list[bool]) -> None:
        with self._lock:
            if not released[0]:
                released[0] = True
                self._in_use -= nbytes
                self._frees += 1

    def _own(self, buffer: Buffer, *, freed: bool = False) -> HostBuffer:
        if not isinstance(buffer, HostBuffer) or buffer.allocator is not self:
            raise InvalidArgument("the buffer belongs to another device")
        if buffer.memory is None and not freed:
            raise InvalidArgument("the buffer was freed")
        return buffer

    def _slice(self, buffer: Buffer, offset: int, nbytes: int) -> Array:
        memory = self._own(buffer).memory
        assert memory is not None
        if offset < 0 or offset + nbytes > buffer.nbytes:
            raise InvalidArgument(f"{nbytes} bytes at {offset} lie outside a buffer of {buffer.nbytes}")
        return memory[offset : offset + nbytes]

    def copy_in(self, buffer: Buffer, data: bytes | bytearray | memoryview | Array, offset: int = 0) -> None:
        source = _as_bytes(data)
        self._slice(buffer, offset, source.nbytes)[:] = source

    def copy_out(self, buffer: Buffer, into: bytearray | memoryview | Array, offset: int = 0) -> None:
        target = _as_bytes(into)
        if not target.flags.writeable:
            raise InvalidArgument("what is to be filled cannot be written to")
        target[:] = self._slice(buffer, offset, target.nbytes)

    def view(self, tensor: Tensor) -> Array:
        spec = tensor.spec
        if tensor.offset % spec.dtype.itemsize:
            raise InvalidArgument(f"{tensor.offset} is no place for {spec.dtype}", param="offset")
        part = self._slice(tensor.buffer, tensor.offset, spec.nbytes)
        return part.view(spec.dtype.numpy).reshape(spec.sizes)

    def adopt(self, array: Any) -> Tensor:
        try:
            found = array if isinstance(array, np.ndarray) else np.from_dlpack(array)
        except (AttributeError, TypeError, RuntimeError, BufferError) as error:
            raise NotSupported("this memory cannot be used without a copy") from error
        if not found.flags.c_contiguous:
            raise NotSupported("only row-major tensors without gaps can be used without a copy")
        spec = TensorSpec(DType.of(found.dtype), found.shape)
        return Tensor(HostBuffer(self, found.reshape(-1).view(np.uint8), lent=True), spec)

    def statistics(self) -> AllocatorStatistics:
        with self._lock:
            return AllocatorStatistics(self._in_use, self._peak, self._allocations, self._frees)


def _as_bytes(data: bytes | bytearray | memoryview | Array) -> Array:
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise InvalidArgument("only row-major memory without gaps can be copied")
        return data.reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8)


class HostProgram(Program):
    """A program that is run by a call, on the thread of its queue."""

    @abstractmethod
    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute; the tensors were checked. Raises one of the product's errors."""


_DESCRIPTORS = threading.Lock()
"""So that no event gets two."""


def _descriptor() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise Busy(f"no descriptor can be had: {error.strerror}") from error


class HostEvent(Event):
    def __init__(self) -> None:
        self._waiting: list[threading.Lock] = []
        """A lock for each who waits, so that all wake at the same time and not one after the other."""
        self._done = False
        self._fd = -1
        self.error: AIAssistantError | None = None

    @property
    def done(self) -> bool:
        return self._done

    def finish(self, error: AIAssistantError | None = None) -> None:
        self.error = error
        self._done = True
        for each in self._waiting:
            each.release()
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        with _DESCRIPTORS:
            if self._fd < 0:
                self._fd = _descriptor()
        if self._done:
            # Perhaps `finish` came by before there was a descriptor; that both say so does no harm.
            os.eventfd_write(self._fd, 1)
        return self._fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def wait(self, timeout_s: float | None = None) -> None:
        if not self._done:
            lock = threading.Lock()
            lock.acquire()
            self._waiting.append(lock)
            # Who came after `finish` had looked sees that it is done.
            if not self._done and not lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
                raise Timeout(f"the device has not finished within {timeout_s} s")
        if self.error is not None:
            raise self.error


class HostQueue(Queue):
    """One thread that runs what it is given, in order. Its thread starts with the first work."""

    def __init__(self, name: str = "hal") -> None:
        self._name = name
        self._work: SimpleQueue[tuple[Callable[[], None], HostEvent] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._failure: AIAssistantError | None = None

    def submit(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> HostEvent:
        if not isinstance(program, HostProgram):
            raise InvalidArgument("the program belongs to another backend")
        check(program, inputs, outputs)
        return self._push(partial(program.run, tuple(inputs), tuple(outputs)))

    def record(self) -> HostEvent:
        return self._push(_nothing)

    def wait(self, event: Event) -> None:
        self._push(event.wait)

    def callback(self, function: Callable[[], None]) -> HostEvent:
        return self._push(function)

    def synchronize(self, timeout_s: float | None = None) -> None:
        last = self._push(_nothing)
        try:
            last.wait(timeout_s)
        except Timeout:
            raise
        except AIAssistantError:
            self._failure = None
            raise

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._work.put(None)
            if thread is not threading.current_thread():
                thread.join()

    def _push(self, work: Callable[[], None]) -> HostEvent:
        event = HostEvent()
        if self._thread is None:
            self._start()
        if self._closed:
            raise InvalidArgument("the queue was closed")
        self._work.put((work, event))
        return event

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        _wake_gently()
        while (item := self._work.get()) is not None:
            work, event = item
            if self._failure is None:
                try:
                    work()
                except AIAssistantError as error:
                    self._failure = error
                except Exception as error:
                    self._failure = BackendFailed(f"{type(error).__name__}: {str(error)[:300]}")
            event.finish(self._failure)


def _wake_gently() -> None:
    """Have this thread, when somebody wakes it, not take the processor from them.

    Whoever submits has something left to do: to return, and to let go of the interpreter, which this thread waits for
    first of all. Being interrupted for that costs both of them two changes of threads. With a processor to spare this
    thread starts there and nothing changes. One that must stay on some processors is left as it is: what it finds there
    is not who woke it, but whatever else the machine does.
    """
    with contextlib.suppress(OSError):
        free = os.sched_getaffinity(0) == os.sched_getaffinity(os.getpid())
        if free and os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _nothing() -> None:
    pass


def check(program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Whether tensors fit a program.

    Raises:
        InvalidArgument: which does not, and why.
    """
    for what, tensors, specs in (("input", inputs, program.inputs), ("output", outputs, program.outputs)):
        if len(tensors) != len(specs):
            raise InvalidArgument(f"the program has {len(specs)} {what}s, {len(tensors)} were given")
        for number, (tensor, spec) in enumerate(zip(tensors, specs, strict=True)):
            given = tensor.spec
            if given is spec or given == spec:
                pass
            elif given.dtype != spec.dtype or not _fits(given.shape, spec.shape):
                raise InvalidArgument(f"{what} {number} is {given}, the program wants {spec}")
            if tensor.offset < 0 or tensor.offset + given.nbytes > tensor.buffer.nbytes:
                raise InvalidArgument(f"{what} {number} lies outside its buffer of {tensor.buffer.nbytes} bytes")


def _fits(given: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(given) == len(wanted) and all(
        mine is not None and theirs in (None, mine) for mine, theirs in zip(given, wanted, strict=True)
    )
