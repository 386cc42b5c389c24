"""Memory that two processes see: files in memory, whose size nobody can change once they are made."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref

import numpy as np

from ai_assistant.hal.graph import Array

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value
_F_ADD_SEALS = 1033
_SEALS = 0x0001 | 0x0002 | 0x0004  # no other seals, no shrinking, no growing


def create(nbytes: int) -> int:
    """A descriptor of new memory, full of zeros. Sealed: a child that shrank it would kill whoever reads it.

    Raises:
        OSError: the system gives no more.
    """
    descriptor = os.memfd_create("hal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, max(1, nbytes))
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    except (OSError, OverflowError) as error:
        os.close(descriptor)
        raise error if isinstance(error, OSError) else OSError("so much memory has no number") from error
    return descriptor


def view(descriptor: int, nbytes: int) -> Array:
    """All of the memory as bytes, at the start of a page. It stays mapped as long as somebody refers to the array.

    Raises:
        OSError: the system maps no more.
    """
    # Python's own mmap keeps a copy of the descriptor, and a process may have more tensors than descriptors.
    size = max(1, nbytes)
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, _FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_uint8 * size).from_address(address)
    # Not at exit: threads and views may still use it then.
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory).cast("B"), np.uint8)[:nbytes]


def filled(*pieces: bytes | Array) -> tuple[int, int]:
    """A descriptor of new memory with pieces one after the other, and how many bytes they are. Raises OSError."""
    data = [
        np.ascontiguousarray(each).reshape(-1).view(np.uint8)
        if isinstance(each, np.ndarray)
        else np.frombuffer(each, np.uint8)
        for each in pieces
        if len(each)
    ]
    nbytes = sum(len(each) for each in data)
    descriptor = create(nbytes)
    if data:
        whole = view(descriptor, nbytes)
        place = 0
        for each in data:
            whole[place : place + len(each)] = each
            place += len(each)
    return descriptor, nbytes
