"""GUID partition tables as firmware reads them: the primary one, the backup, and what follows when one is broken.

UEFI 2.10, section 5.3. EDK2 (MdeModulePkg PartitionDxe) takes the primary table; when that one is broken it takes the
backup in the disk's last block and writes the primary anew. Linux takes the primary, or else the backup only with `gpt`
on its command line: so a disk boots when the firmware can repair it. It is written from the specification and shares
nothing with the product's own reader, which it judges.
"""

from __future__ import annotations

import itertools
import struct
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass

SECTOR = 512
SIGNATURE = b"EFI PART"
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
ENTRY = struct.Struct("<16s16sQQQ72s")
MOST_ENTRIES = 1024  # a hostile header does not make us read gigabytes

TYPES = {
    uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"): "esp",
    uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"): "root",
    uuid.UUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"): "root-verity",
    uuid.UUID("4d21b016-b534-45c2-a9fb-5c16e091fd2d"): "var",
}

Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], None]


class BrokenTable(Exception):
    """No valid table where one was looked for, and why."""


@dataclass(frozen=True)
class Partition:
    """One entry. `start` and `size` are in bytes."""

    number: int
    kind: str
    type_uuid: uuid.UUID
    uuid: uuid.UUID
    start: int
    size: int
    label: str

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Table:
    """A valid table: header and entries agree with their checksums."""

    lba: int
    alternate_lba: int
    entries_lba: int
    entry_size: int
    entries: bytes
    first_usable: int
    last_usable: int
    disk_uuid: uuid.UUID
    partitions: tuple[Partition, ...]

    def find(self, name: str | int) -> Partition:
        """By number, label, or kind ("esp", "root", "root-verity", "var"); the first that fits."""
        for each in self.partitions:
            if name in (each.number, each.label, each.kind):
                return each
        raise BrokenTable(f"no partition {name} among {[each.label for each in self.partitions]}")


def read_table(read: Read, lba: int) -> Table:
    """The table whose header is in block `lba`; BrokenTable says what is wrong with it."""
    block = read(lba * SECTOR, SECTOR)
    fields = HEADER.unpack_from(block)
    signature, _, size, checksum, _, own, alternate, first, last, disk, entries_lba, count, entry_size, entries_crc = (
        fields
    )
    if signature != SIGNATURE:
        raise BrokenTable(f"block {lba}: no signature")
    if not HEADER.size <= size <= SECTOR:
        raise BrokenTable(f"block {lba}: header size {size}")
    if zlib.crc32(block[:16] + bytes(4) + block[20:size]) != checksum:
        raise BrokenTable(f"block {lba}: header checksum")
    if own != lba:
        raise BrokenTable(f"block {lba}: says that it is block {own}")
    if count > MOST_ENTRIES or entry_size < ENTRY.size or entry_size > SECTOR * 8:
        raise BrokenTable(f"block {lba}: {count} entries of {entry_size} bytes")
    entries = read(entries_lba * SECTOR, count * entry_size)
    if zlib.crc32(entries) != entries_crc:
        raise BrokenTable(f"block {lba}: entries checksum")
    return Table(
        lba, alternate, entries_lba, entry_size, entries, first, last, uuid.UUID(bytes_le=disk),
        tuple(_partitions(entries, entry_size)),
    )  # fmt: skip


def _partitions(entries: bytes, entry_size: int) -> list[Partition]:
    found = []
    for number, offset in enumerate(range(0, len(entries), entry_size), start=1):
        kind, own, first, last, _, label = ENTRY.unpack_from(entries, offset)
        type_uuid = uuid.UUID(bytes_le=kind)
        if type_uuid.int == 0:
            continue
        name = label.decode("utf-16-le", errors="replace").split("\0")[0]
        found.append(
            Partition(
                number,
                TYPES.get(type_uuid, str(type_uuid)),
                type_uuid,
                uuid.UUID(bytes_le=own),
                first * SECTOR,
                (last + 1 - first) * SECTOR,
                name,
            )
        )
    return found


@dataclass(frozen=True)
class Tables:
    """What a disk has; `used` is what firmware goes by, `problems` names what it would find broken."""

    primary: Table | None
    backup: Table | None
    used: Table | None
    problems: tuple[str, ...]


def read_tables(read: Read, disk_size: int) -> Tables:
    """Both tables, by EDK2's rules: a broken primary is replaced by the one in the last block, and only by that."""
    problems = []
    primary = backup = None
    mbr = read(0, SECTOR)
    if not any(mbr[at] == 0 and mbr[at + 4] == 0xEE and mbr[at + 8 : at + 12] == b"\1\0\0\0" for at in MBR_ENTRIES):
        return Tables(None, None, None, ("no protective MBR",))
    try:
        primary = read_table(read, 1)
    except BrokenTable as error:
        problems.append(f"primary: {error}")
    where = disk_size // SECTOR - 1 if primary is None else primary.alternate_lba
    try:
        backup = read_table(read, where)
    except BrokenTable as error:
        problems.append(f"backup: {error}")
    return Tables(primary, backup, primary or backup, tuple(problems))


MBR_ENTRIES = range(446, 510, 16)


def layout_problems(table: Table, disk_size: int) -> list[str]:
    """Partitions that overlap, or leave the area that the table itself allows."""
    problems = []
    ordered = sorted(table.partitions, key=lambda each: each.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            problems.append(f"partitions {before.number} and {after.number} overlap")
    for each in ordered:
        if each.size <= 0:
            problems.append(f"partition {each.number} has no size")
        if each.start < table.first_usable * SECTOR or each.end > min((table.last_usable + 1) * SECTOR, disk_size):
            problems.append(f"partition {each.number} lies outside of the usable blocks")
    return problems


def rewrite(read: Read, write: Write, table: Table, entries: bytes) -> None:
    """Put other entries into a table and make its checksums right."""
    block = bytearray(read(table.lba * SECTOR, SECTOR))
    size = struct.unpack_from("<I", block, 12)[0]
    struct.pack_into("<I", block, 88, zlib.crc32(entries))
    struct.pack_into("<I", block, 16, 0)
    struct.pack_into("<I", block, 16, zlib.crc32(block[:size]))
    write(table.entries_lba * SECTOR, entries)
    write(table.lba * SECTOR, bytes(block))


def exchange(entries: bytes, entry_size: int, a: int, b: int) -> bytes:
    """The entries with the places on the disk (first and last block) of partitions `a` and `b` exchanged."""
    changed = bytearray(entries)
    places = [slice((each - 1) * entry_size + 32, (each - 1) * entry_size + 48) for each in (a, b)]
    changed[places[0]], changed[places[1]] = entries[places[1]], entries[places[0]]
    return bytes(changed)
