"""Partition tables for tests, made from the specification."""

from __future__ import annotations

import struct
import uuid
import zlib

from image.vm.gpt import ENTRY, HEADER, SECTOR, SIGNATURE, TYPES

DISK_BLOCKS = 4096
ENTRY_BLOCKS = 32
KINDS = {name: kind for kind, name in TYPES.items()}


def gpt_blocks(
    kinds: list[str], disk_blocks: int = DISK_BLOCKS, places: list[tuple[int, int]] | None = None
) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """(offset, bytes) of protective MBR and primary table, and of the backup at the disk's end. Each partition has
    100 blocks, or the first and last block that `places` gives."""
    places = places or [(100 * number, 100 * number + 99) for number in range(1, len(kinds) + 1)]
    entries = b"".join(
        ENTRY.pack(KINDS[kind].bytes_le, uuid.UUID(int=number + 1).bytes_le, first, last, 0, kind.encode("utf-16-le"))
        for number, (kind, (first, last)) in enumerate(zip(kinds, places, strict=True))
    ).ljust(ENTRY_BLOCKS * SECTOR, b"\0")
    mbr = bytearray(SECTOR)
    mbr[446:462] = struct.pack("<B3sB3sII", 0, bytes(3), 0xEE, bytes(3), 1, disk_blocks - 1)
    mbr[510:] = b"\x55\xaa"
    last = disk_blocks - 1
    primary = bytes(mbr) + _header(1, last, 2, disk_blocks, entries) + entries
    backup = entries + _header(last, 1, last - ENTRY_BLOCKS, disk_blocks, entries)
    return (0, primary), ((last - ENTRY_BLOCKS) * SECTOR, backup)


def _header(own: int, other: int, entries_at: int, disk_blocks: int, entries: bytes) -> bytes:
    def pack(checksum: int) -> bytes:
        return HEADER.pack(
            SIGNATURE, 0x10000, HEADER.size, checksum, 0, own, other, ENTRY_BLOCKS + 2, disk_blocks - ENTRY_BLOCKS - 2,
            uuid.UUID(int=99).bytes_le, entries_at, len(entries) // ENTRY.size, ENTRY.size, zlib.crc32(entries),
        )  # fmt: skip

    return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")
