"""Memory between guard pages: one byte too far, and the process dies of it – which the suite sees and reports."""

from __future__ import annotations

import ctypes
import mmap
import os
from types import TracebackType
from typing import Self

import numpy as np

from ai_assistant.errors import NotSupported
from ai_assistant.hal.graph import Array

_PROT_NONE = 0


class Guarded:
    """Bytes whose neighbours nobody may touch.

    Args:
        nbytes: size.
        at_end: the last byte is followed by a guard page; otherwise the first one is preceded by it.

    Raises:
        NotSupported: the system does not protect memory.
    """

    def __init__(self, nbytes: int, *, at_end: bool = True) -> None:
        page = mmap.PAGESIZE
        room = max(page, -(-nbytes // page) * page)
        self._map = mmap.mmap(-1, room + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address in (base, base + page + room):
            if libc.mprotect(address, page, _PROT_NONE) != 0:
                raise NotSupported(f"memory cannot be protected: {os.strerror(ctypes.get_errno())}")
        start = page + (room - nbytes if at_end else 0)
        self.bytes: Array = np.frombuffer(self._map, np.uint8, nbytes, start)

    def array(self, like: Array) -> Array:
        """A copy of an array in this memory."""
        view = self.bytes[: like.nbytes].view(like.dtype).reshape(like.shape)
        view[...] = like
        return view

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The mapping goes when the last array over it goes: a view that a backend still holds must not dangle.
        self.bytes = np.empty(0, np.uint8)
