"""Read what QEMU's blklogwrites recorded: every write, discard and flush of a disk, in the order of completion.

The form is that of Linux's dm-log-writes: a block with the header, then for each entry a block that describes it and
the data that it wrote. A discard has no data.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Self

MAGIC = 0x6A736677736872
VERSION = 1
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")


class Flag(IntFlag):
    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8


class BadLog(Exception):
    """Not a log, or one that ends where more was promised."""


@dataclass(frozen=True)
class Entry:
    """One request, `start` and `size` in bytes of the disk. `data_at` is where the log has its data; -1 for none."""

    number: int
    start: int
    size: int
    flags: Flag
    data_at: int = -1

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def flushes(self) -> bool:
        return Flag.FLUSH in self.flags

    @property
    def forced(self) -> bool:
        """On the disk itself when it completes, whatever happens to others."""
        return Flag.FUA in self.flags

    @property
    def discards(self) -> bool:
        return Flag.DISCARD in self.flags

    def __str__(self) -> str:
        kind = "discard" if self.discards else "flush" if self.flushes and not self.size else "write"
        return f"entry {self.number}: {kind} of {self.size} bytes at {self.start}"


class WriteLog:
    """A recording; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 512:
                raise BadLog(f"{path.name} is no log of writes: too short")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, count, block = SUPER.unpack_from(self._map)
        if magic != MAGIC or version != VERSION:
            raise BadLog(f"{path.name} is no log of writes in a form that is known")
        if block < 512 or block & (block - 1):
            raise BadLog(f"{path.name}: blocks of {block} bytes")
        self.block = block
        self.entries = tuple(self._entries(count))

    def _entries(self, count: int) -> Iterator[Entry]:
        at = self.block
        for number in range(count):
            if at + self.block > len(self._map):
                raise BadLog(f"{self.path.name} ends before entry {number} of {count}")
            block, blocks, flags, _ = ENTRY.unpack_from(self._map, at)
            if flags & ~sum(Flag):
                raise BadLog(f"{self.path.name}: entry {number} has unknown flags {flags:#x}")
            at += self.block
            entry = Entry(number, block * self.block, blocks * self.block, Flag(flags), at)
            if entry.discards or not blocks:
                entry = Entry(number, entry.start, entry.size, entry.flags)
            else:
                at += entry.size
                if at > len(self._map):
                    raise BadLog(f"{self.path.name} ends within entry {number} of {count}")
            yield entry

    def data(self, entry: Entry, first: int = 0, last: int | None = None) -> bytes:
        """What it wrote, or the bytes [first, last) of it; a discard wrote nothing."""
        if entry.data_at < 0:
            return b""
        end = entry.size if last is None else last
        return self._map[entry.data_at + first : entry.data_at + end]

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_log(path: Path, requests: list[tuple[int, bytes | int, Flag]], block: int = 512) -> None:
    """Make a log, for trying out what reads one: (start, data, or for a discard its size, flags) each."""
    parts = [SUPER.pack(MAGIC, VERSION, len(requests), block).ljust(block, b"\0")]
    for start, data, flags in requests:
        size = data if isinstance(data, int) else len(data)
        parts.append(ENTRY.pack(start // block, size // block, int(flags), 0).ljust(block, b"\0"))
        if not isinstance(data, int):
            parts.append(data)
    path.write_bytes(b"".join(parts))
