"""The partitions of a disk image, read from its GUID partition table (UEFI 2.10, chapter 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from image.rebuild.errors import RebuildError

SECTOR = 512
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
ENTRY = struct.Struct("<16s16sQQQ72s")
MOST_ENTRIES = 1024


@dataclass(frozen=True)
class Partition:
    """`offset` and `size` are in bytes; `number` counts from 1."""

    number: int
    name: str
    offset: int
    size: int


def partitions(path: Path) -> list[Partition]:
    """In the table's order. Raises RebuildError when there is no table, or it points outside of the file."""
    end = path.stat().st_size
    with path.open("rb") as file:
        file.seek(SECTOR)
        raw = file.read(HEADER.size)
        if len(raw) < HEADER.size or raw[:8] != b"EFI PART":
            raise RebuildError(f"{path.name} has no GUID partition table")
        header = HEADER.unpack(raw)
        table, count, size = header[10], header[11], header[12]
        if size < ENTRY.size or count > MOST_ENTRIES or table * SECTOR + count * size > end:
            raise RebuildError(f"{path.name}: its partition table is damaged")
        file.seek(table * SECTOR)
        entries = file.read(count * size)
    found = []
    for number in range(1, count + 1):
        kind, _, first, last, _, name = ENTRY.unpack_from(entries, (number - 1) * size)
        if not any(kind):
            continue
        text = name.decode("utf-16-le", "replace").split("\0")[0] or f"partition {number}"
        if last < first or (last + 1) * SECTOR > end:
            raise RebuildError(f"{path.name}: partition {number} ({text}) lies outside of the image")
        found.append(Partition(number, text, first * SECTOR, (last + 1 - first) * SECTOR))
    return found


def outside(found: list[Partition], end: int) -> list[tuple[int, int]]:
    """Offset and size of what no partition covers: the tables and the gaps."""
    gaps, position = [], 0
    for each in sorted(found, key=lambda partition: partition.offset):
        if each.offset > position:
            gaps.append((position, each.offset - position))
        position = max(position, each.offset + each.size)
    if end > position:
        gaps.append((position, end - position))
    return gaps
