"""Small disk images like ours: a GUID partition table, a boot partition, a root and its verity tree."""

from __future__ import annotations

import hashlib
import random
import struct
import uuid
import zlib
from functools import cache
from pathlib import Path

from ai_assistant.provisioning import gpt

MIB = 1 << 20
BLOCK = 4096
SALT = bytes(range(32))
# Sizes in MiB, in the order on the disk.
SIZES = {gpt.ESP: 2, gpt.ROOT: 20, gpt.ROOT_VERITY: 1}
LABELS = {gpt.ESP: "esp", gpt.ROOT: "root_1.2.3", gpt.ROOT_VERITY: "verity_1.2.3"}
READ_ONLY = 1 << 60


@cache
def verity_tree(data: bytes, salt: bytes = SALT) -> tuple[bytes, bytes]:
    """The verity partition of some blocks, and their root hash."""
    levels: list[bytes] = []
    level = data
    while len(level) > BLOCK or not levels:
        hashes = [hashlib.sha256(salt + level[i : i + BLOCK]).digest() for i in range(0, len(level), BLOCK)]
        level = b"".join(hashes)
        level += bytes(-len(level) % BLOCK)
        levels.append(level)
    superblock = struct.pack(
        "<8sII16s32sIIQH6x256s",
        b"verity\0\0", 1, 1, bytes(16), b"sha256", BLOCK, BLOCK, len(data) // BLOCK, len(salt), salt,
    )  # fmt: skip
    return superblock.ljust(BLOCK, b"\0") + b"".join(reversed(levels)), hashlib.sha256(salt + levels[-1]).digest()


def table(
    parts: list[tuple[uuid.UUID, uuid.UUID, str, int, int, int]], size: int, sector: int = 512
) -> tuple[bytes, bytes]:
    """A disk's first MiB, and what stands at its end. A part is type, id, label, flags, start, size."""
    entries = b"".join(
        kind.bytes_le
        + own.bytes_le
        + struct.pack("<QQQ", start // sector, (start + length) // sector - 1, flags)
        + label.encode("utf-16-le").ljust(72, b"\0")
        for kind, own, label, flags, start, length in parts
    ).ljust(128 * 128, b"\0")
    last = size // sector - 1

    def header(own: int, other: int, first: int) -> bytes:
        fields = struct.pack(
            "<QQQQ16sQIII", own, other, 40, last - 40, uuid.UUID(int=7).bytes, first, 128, 128, zlib.crc32(entries)
        )
        made = b"EFI PART" + struct.pack("<IIII", 0x10000, 92, 0, 0) + fields
        return made[:16] + struct.pack("<I", zlib.crc32(made)) + made[20:]

    count = len(entries) // sector
    head = bytes(sector) + header(1, last, 2).ljust(sector, b"\0") + entries
    return head.ljust(MIB, b"\0"), entries + header(last, 1, last - count).ljust(sector, b"\0")


@cache
def root_data(size: int = SIZES[gpt.ROOT] * MIB, seed: int = 1) -> bytes:
    """A root that looks like erofs: noise, a hole, noise, and emptiness behind."""
    noise = random.Random(seed).randbytes
    return (noise(1024) + b"\xe2\xe1\xf5\xe0" + noise(1_500_000) + bytes(600_000) + noise(90_000)).ljust(size, b"\0")


def write_image(path: Path, *, esp: bytes = b"", seed: int = 1) -> Path:
    """An image; `esp` is its boot partition, a mere boot sector when it is not given."""
    data = root_data(seed=seed)
    tree, root_hash = verity_tree(data)
    own = {
        gpt.ESP: uuid.UUID(int=0xE5),
        gpt.ROOT: uuid.UUID(bytes=root_hash[:16]),
        gpt.ROOT_VERITY: uuid.UUID(bytes=root_hash[16:]),
    }
    contents = {gpt.ESP: esp or bytes(510) + b"\x55\xaa", gpt.ROOT: data, gpt.ROOT_VERITY: tree}
    start, parts = MIB, []
    with path.open("wb") as file:
        for kind, content in contents.items():
            length = -(-max(len(content), SIZES[kind] * MIB) // MIB) * MIB
            parts.append((kind, own[kind], LABELS[kind], 0 if kind == gpt.ESP else READ_ONLY, start, length))
            file.seek(start)
            file.write(content)
            start += length
        size = start + MIB
        head, tail = table(parts, size)
        file.seek(0)
        file.write(head)
        file.seek(size - len(tail))
        file.write(tail)
    return path
