"""Memory of a device behind the C ABI."""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import numpy as np

from ai_assistant.errors import BackendFailed, InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.contract import Allocator, AllocatorStatistics, Buffer, Tensor
from ai_assistant.hal.graph import Array, DType, TensorSpec
from ai_assistant.hal.native import abi
from ai_assistant.hal.native.library import Library


class Opened:
    """A context of the library. Closed when nothing that was made of it is left, views included.

    That everything made of it refers to it is not enough: of garbage that refers to itself in a circle, Python ends
    one after the other in no order, and a context must go last. So what was made of it is also counted.
    """

    def __init__(self, library: Library, handle: int) -> None:
        self.library = library
        self.handle = handle
        # Changed by single steps of the interpreter, without a lock: garbage is collected in the midst of anything.
        self._made: set[int] = set()
        self._left = False
        self._closing = [library.function("close")]

    def hold(self, made: object) -> None:
        """It came of this context: `release` is called when it has been given back."""
        self._made.add(id(made))

    def release(self, made: object) -> None:
        self._made.discard(id(made))
        self._end()

    def _end(self) -> None:
        if not self._left or self._made:
            return
        try:
            close = self._closing.pop()
        except IndexError:
            return
        close(self.handle)

    def __del__(self) -> None:
        self._left = True
        self._end()


class Memory:
    """A buffer of the library. Given back when its Buffer was freed, no view is left and no work uses it."""

    __slots__ = ("_free", "address", "handle", "lent", "opened")

    def __init__(self, opened: Opened, handle: int, lent: Array | None = None) -> None:
        self.opened = opened
        self.handle = handle
        self.lent = lent
        self.address = 0
        self._free = opened.library.function("free")
        opened.hold(self)

    def __del__(self) -> None:
        self._free(self.opened.handle, self.handle)
        self.opened.release(self)


class NativeBuffer(Buffer):
    __slots__ = ("_allocator", "memory", "nbytes")

    def __init__(self, allocator: NativeAllocator, memory: Memory, nbytes: int) -> None:
        self._allocator = allocator
        self.memory: Memory | None = memory
        self.nbytes = nbytes

    @property
    def allocator(self) -> NativeAllocator:
        return self._allocator


class NativeAllocator(Allocator):
    """Args: host_memory: whether buffers can be mapped."""

    def __init__(self, opened: Opened, *, host_memory: bool) -> None:
        self._opened: Opened | None = opened
        self._host_memory = host_memory

    def close(self) -> None:
        """Take no more. What was allocated stays until it is freed."""
        self._opened = None

    def _open(self) -> Opened:
        if self._opened is None:
            raise InvalidArgument("the device was closed")
        return self._opened

    def allocate(self, nbytes: int, alignment: int = 0) -> NativeBuffer:
        opened = self._open()
        if nbytes < 0:
            raise InvalidArgument(f"a buffer cannot have {nbytes} bytes", param="nbytes")
        if alignment < 0 or alignment >= 1 << 63 or alignment & (alignment - 1):
            raise InvalidArgument("an alignment is a power of two", param="alignment")
        if nbytes >= 1 << 63:
            raise OutOfMemory(f"{nbytes} bytes were asked for, no device has as many")
        args = abi.filled(abi.AllocateArgs, nbytes=nbytes, alignment=alignment)
        handle = opened.library.handle("allocate", opened.handle, byref(args))
        return NativeBuffer(self, Memory(opened, handle), nbytes)

    def free(self, buffer: Buffer) -> None:
        if not isinstance(buffer, NativeBuffer) or buffer.allocator is not self:
            raise InvalidArgument("the buffer belongs to another device")
        buffer.memory = None

    def _own(self, buffer: Buffer) -> Memory:
        if not isinstance(buffer, NativeBuffer) or buffer.allocator is not self:
            raise InvalidArgument("the buffer belongs to another device")
        memory = buffer.memory
        if memory is None:
            raise InvalidArgument("the buffer was freed")
        return memory

    def _copy(self, function: str, buffer: Buffer, bytes_: Array, offset: int) -> None:
        memory = self._own(buffer)
        if offset < 0 or offset + bytes_.nbytes > buffer.nbytes:
            raise InvalidArgument(f"{bytes_.nbytes} bytes at {offset} lie outside a buffer of {buffer.nbytes}")
        opened = memory.opened
        opened.library.call(function, opened.handle, memory.handle, offset, bytes_.ctypes.data, bytes_.nbytes)

    def copy_in(self, buffer: Buffer, data: bytes | bytearray | memoryview | Array, offset: int = 0) -> None:
        self._copy("copy_in", buffer, _flat(data), offset)

    def copy_out(self, buffer: Buffer, into: bytearray | memoryview | Array, offset: int = 0) -> None:
        target = _flat(into)
        if not target.flags.writeable:
            raise InvalidArgument("what is to be filled cannot be written to")
        self._copy("copy_out", buffer, target, offset)

    def view(self, tensor: Tensor) -> Array:
        spec, buffer = tensor.spec, tensor.buffer
        memory = self._own(buffer)
        if not self._host_memory:
            raise NotSupported("this device's memory is out of the host's reach", hint="use Allocator.download")
        if tensor.offset < 0 or tensor.offset + spec.nbytes > buffer.nbytes or tensor.offset % spec.dtype.itemsize:
            raise InvalidArgument(f"{spec} at {tensor.offset} does not lie in a buffer of {buffer.nbytes} bytes")
        if not spec.nbytes:
            return np.empty(spec.sizes, spec.dtype.numpy)
        if not memory.address:
            opened = memory.opened
            memory.address = opened.library.handle("map", opened.handle, memory.handle)
        mapped: Any = (ctypes.c_ubyte * buffer.nbytes).from_address(memory.address)
        mapped.memory = memory  # The array keeps `mapped`, and so the memory.
        return np.ndarray(spec.sizes, spec.dtype.numpy, mapped, tensor.offset)

    def adopt(self, array: Any) -> Tensor:
        opened = self._open()
        try:
            found = array if isinstance(array, np.ndarray) else np.from_dlpack(array)
        except (AttributeError, TypeError, RuntimeError, BufferError) as error:
            raise NotSupported("this memory cannot be used without a copy") from error
        if not found.flags.c_contiguous:
            raise NotSupported("only row-major tensors without gaps can be used without a copy")
        spec = TensorSpec(DType.of(found.dtype), found.shape)
        handle = opened.library.handle("import_memory", opened.handle, found.ctypes.data, found.nbytes)
        return Tensor(NativeBuffer(self, Memory(opened, handle, found), found.nbytes), spec)

    def statistics(self) -> AllocatorStatistics:
        opened = self._open()
        found = abi.filled(abi.Statistics)
        opened.library.call("statistics", opened.handle, byref(found))
        if max(found.in_use_bytes, found.peak_bytes, found.allocations, found.frees) >= 1 << 63:
            raise BackendFailed(f"{opened.library.name} counts a negative number of bytes or allocations")
        return AllocatorStatistics(found.in_use_bytes, found.peak_bytes, found.allocations, found.frees)


def _flat(data: bytes | bytearray | memoryview | Array) -> Array:
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise InvalidArgument("only row-major memory without gaps can be copied")
        return data.reshape(-1).view(np.uint8)
    try:
        return np.frombuffer(data, np.uint8)
    except ValueError as error:
        raise InvalidArgument("only memory without gaps can be copied") from error
