"""Giving memory back: somebody asks, the scheduler's thread does it between two steps."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path


class Wish:
    """Somebody waits for memory."""

    __slots__ = ("done", "freed")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.freed = 0


def give_back() -> None:
    """Have the C library return freed memory to the system, where it is one that keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """What this process has in memory; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
