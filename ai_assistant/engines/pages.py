"""Memory that the native library cleared and nobody has used: given back to the system until somebody does.

llama.cpp writes zeros over a new cache, so all of it is resident although few conversations ever fill theirs. A page of
zeros that is given back reads as zeros, so nothing changes but what is free: the cache's memory grows with its use.
Linux only; elsewhere nothing is given back.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LEAST = 64 << 20
"""Bytes of a mapping below which nothing is given back. Greater than anything else here that is mapped meanwhile, such
as a message: between the look and the giving back, nobody else may write."""
_CHUNK = 1 << 20
_MADV_DONTNEED, _MADV_NOHUGEPAGE = 4, 15
_opening = threading.Lock()

Range = tuple[int, int]
"""First address, and the one after the last."""


@dataclass(slots=True)
class Fresh:
    """Mappings that were made while something native was opened, and are its own until it is closed."""

    ranges: list[Range] = field(default_factory=list)

    def give_back(self) -> int:
        """Give back what holds nothing but zeros. Returns bytes. Only before the memory is used."""
        return sum(_give_back(each) for each in self.ranges)

    def untouched_bytes(self) -> int:
        """What is not in memory, and will be when the cache is full."""
        if not self.ranges:
            return 0
        try:
            text = Path("/proc/self/smaps").read_text()
        except OSError:
            return 0
        return sum(max(0, each[1] - each[0] - taken_in(text, each)) for each in self.ranges)


@contextmanager
def opening() -> Iterator[Fresh]:
    """Notes the mappings that are made within. One at a time: nobody else's get among them."""
    fresh = Fresh()
    with _opening:
        before = _anonymous()
        yield fresh
        fresh.ranges = [each for each in without(_anonymous(), before) if each[1] - each[0] >= LEAST]


def parse_maps(text: str) -> list[Range]:
    """Private writable mappings without a file, from the text of /proc/PID/maps."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 5 and fields[1] == "rw-p" and fields[4] == "0":
            first, _, end = fields[0].partition("-")
            found.append((int(first, 16), int(end, 16)))
    return found


def without(ranges: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    """The parts of `ranges` that no range of `taken` covers: the kernel merges neighbours."""
    known = sorted(taken)
    left = []
    for first, end in sorted(ranges):
        for other_first, other_end in known:
            if other_end <= first or other_first >= end:
                continue
            if other_first > first:
                left.append((first, other_first))
            first = max(first, other_end)
        if first < end:
            left.append((first, end))
    return left


def _anonymous() -> list[Range]:
    try:
        return parse_maps(Path("/proc/self/maps").read_text())
    except OSError:
        return []


def _give_back(each: Range) -> int:
    libc = ctypes.CDLL(None)
    first, end = each
    # A token's part of a layer is a kibibyte or so: a huge page would hold a whole conversation's.
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_NOHUGEPAGE)
    given = 0
    for begin in range(first, end, _CHUNK):
        size = min(_CHUNK, end - begin)
        words = np.ctypeslib.as_array((ctypes.c_uint64 * (size // 8)).from_address(begin))
        if not words.any() and not libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_DONTNEED):
            given += size
    return given


def taken_in(text: str, each: Range) -> int:
    """Bytes of a range that somebody has written, from the text of /proc/PID/smaps.

    A page that was only read is the kernel's one page of zeros, and costs nothing.
    """
    first, end = each
    shared, found = 0, 0
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            begin, _, stop = name.partition("-")
            shared = max(0, min(int(stop, 16), end) - max(int(begin, 16), first))
        elif shared and name == "Anonymous:":
            # A mapping that reaches further says nothing about which of its pages they are.
            found += min(int(rest.split()[0]) << 10, shared)
    return found
