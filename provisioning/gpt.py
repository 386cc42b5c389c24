"""Read a GUID partition table; sfdisk writes them. UEFI specification 2.10, chapter 5.

Read here and not by a tool, because flashing runs on any machine that has Python, and because a table that a
tool would quietly repair is a damaged image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
ROOT = UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
ROOT_VERITY = UUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5")
NAMES = {ESP: "ESP", ROOT: "root", ROOT_VERITY: "root's verity"}

# A device's sectors are of one size; a file is looked at as either.
SECTOR_SIZES = (512, 4096)
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_ENTRIES_MAX = 1024

Read = Callable[[int, int], bytes]
"""(offset, size) to at most `size` bytes, fewer at the end."""


class NoTable(Exception):
    """There is no usable table; the text says why and continues a sentence."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Offsets and sizes are bytes. `number` is the one in the kernel's names, from 1."""

    number: int
    type: UUID
    uuid: UUID
    label: str
    attributes: int
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Table:
    """`end` is the byte after the backup table: a disk or image must have at least that many."""

    uuid: UUID
    sector_bytes: int
    end: int
    partitions: tuple[Partition, ...]

    def of_type(self, kind: UUID) -> tuple[Partition, ...]:
        return tuple(each for each in self.partitions if each.type == kind)


def read(source: Read, sector_sizes: tuple[int, ...] = SECTOR_SIZES) -> Table:
    """The primary table.

    Raises:
        NoTable: there is none, or it is damaged.
    """
    for sector in sector_sizes:
        header = source(sector, sector)
        if header[:8] == b"EFI PART":
            return _parse(source, sector, header)
    raise NoTable("has no GUID partition table")


def has_backup(source: Read, table: Table) -> bool:
    """Whether the second header stands where the first says, whole."""
    header = source(table.end - table.sector_bytes, table.sector_bytes)
    if len(header) < _HEADER.size or header[:8] != b"EFI PART":
        return False
    return _checksum_holds(header) and bool(_HEADER.unpack_from(header)[9] == table.uuid.bytes_le)


def _checksum_holds(header: bytes) -> bool:
    size, checksum = struct.unpack_from("<II", header, 12)
    if not _HEADER.size <= size <= len(header):
        return False
    return bool(zlib.crc32(header[:16] + bytes(4) + header[20:size]) == checksum)


def _parse(source: Read, sector: int, header: bytes) -> Table:
    if len(header) < sector or not _checksum_holds(header):
        raise NoTable("has a damaged partition table: the checksum of its header is wrong")
    _, _, _, _, _, _, backup, _, _, disk, first, count, size, checksum = _HEADER.unpack_from(header)
    if count > _ENTRIES_MAX or size < _ENTRY.size or size > 4096:
        raise NoTable(f"has a damaged partition table: {count} entries of {size} bytes")
    entries = source(first * sector, count * size)
    if len(entries) < count * size or zlib.crc32(entries) != checksum:
        raise NoTable("has a damaged partition table: the checksum of its entries is wrong")
    found = []
    for number in range(count):
        kind, own, start, last, attributes, label = _ENTRY.unpack_from(entries, number * size)
        if kind == bytes(16):
            continue
        if last < start:
            raise NoTable(f"has a damaged partition table: partition {number + 1} ends before it starts")
        found.append(
            Partition(
                number + 1,
                UUID(bytes_le=kind),
                UUID(bytes_le=own),
                label.decode("utf-16-le", "replace").partition("\0")[0],
                attributes,
                start * sector,
                (last + 1 - start) * sector,
            )
        )
    return Table(UUID(bytes_le=disk), sector, (backup + 1) * sector, tuple(found))
