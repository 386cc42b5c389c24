"""Check a dm-verity partition pair without device-mapper: every block of the data up to the root hash.

The kernel does the same as it reads; here it is done beforehand and on machines that have no device-mapper or
cryptsetup. Format: the kernel's Documentation/admin-guide/device-mapper/verity.rst and cryptsetup's superblock.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator

from ai_assistant.provisioning.gpt import Read

_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s")
# Blocks that are read and hashed at a time: a level of hashes of this many blocks is 32 KiB.
_BATCH = 1024


class Damaged(Exception):
    """The partitions are not those of the root hash; the text says where and continues a sentence."""


def check(
    data: Read, tree: Read, root_hash: bytes, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Check all of `data`, and return how many bytes that is. `progress` gets bytes done and in all.

    Raises:
        Damaged: at the first block that is not what the tree says, or when the tree is not the root hash's.
    """
    superblock = tree(0, 512)
    if len(superblock) < 512 or superblock[:8] != b"verity\0\0":
        raise Damaged("has no verity superblock")
    _, version, kind, _, algorithm, data_block, hash_block, blocks, salt_size, salt = _SUPERBLOCK.unpack_from(
        superblock
    )
    name = algorithm.rstrip(b"\0").decode("ascii", "replace")
    if (version, kind, name, data_block, hash_block) != (1, 1, "sha256", 4096, 4096) or salt_size > 256 or not blocks:
        raise Damaged(
            f"has a verity superblock that is not ours: {name}, blocks of {data_block} and {hash_block} bytes"
        )
    salted = hashlib.sha256(salt[:salt_size])
    per_block = hash_block // salted.digest_size

    def digest(block: bytes) -> bytes:
        made = salted.copy()
        made.update(block)
        return made.digest()

    counts = [blocks]
    while counts[-1] > 1 or len(counts) == 1:
        counts.append(-(-counts[-1] // per_block))
    # The tree is stored from its top, one block, down to the hashes of the data.
    starts, position = {}, hash_block
    for level in range(len(counts) - 1, 0, -1):
        starts[level] = position
        position += counts[level] * hash_block

    top = tree(starts[len(counts) - 1], hash_block)
    if len(top) < hash_block or digest(top) != root_hash:
        raise Damaged("has a verity tree that is not its own")
    for level in range(len(counts) - 2, -1, -1):
        source, start = (tree, starts[level]) if level else (data, 0)
        expected = _hashes(tree, starts[level + 1], counts[level], salted.digest_size)
        for first, chunk in _blocks(source, start, counts[level], data_block):
            made = _digests(chunk, data_block, digest)
            wanted = next(expected)
            if made != wanted:
                size = salted.digest_size
                wrong = (
                    next(i for i in range(0, len(wanted), size) if made[i : i + size] != wanted[i : i + size]) // size
                )
                what = "data" if level == 0 else "verity tree"
                raise Damaged(f"is damaged: its {what} at byte {start + (first + wrong) * data_block:,}")
            if level == 0:
                progress((first + len(chunk) // data_block) * data_block, blocks * data_block)
    return int(blocks * data_block)


def _blocks(source: Read, start: int, count: int, size: int) -> Iterator[tuple[int, bytes]]:
    for first in range(0, count, _BATCH):
        wanted = min(_BATCH, count - first) * size
        chunk = source(start + first * size, wanted)
        if len(chunk) != wanted:
            raise Damaged(f"ends at byte {start + first * size + len(chunk):,}, and should not")
        yield first, chunk


def _hashes(tree: Read, start: int, count: int, size: int) -> Iterator[bytes]:
    """The expected hashes, for as many blocks at a time as `_blocks` gives."""
    for first in range(0, count, _BATCH):
        wanted = min(_BATCH, count - first) * size
        yield tree(start + first * size, wanted).ljust(wanted, b"\0")


_ZEROS = bytes(_BATCH * 4096)


def _digests(chunk: bytes, size: int, digest: Callable[[bytes], bytes]) -> bytes:
    # Most of a slot is empty, and one hash serves all of that.
    empty = digest(_ZEROS[:size])
    if chunk == _ZEROS[: len(chunk)]:
        return empty * (len(chunk) // size)
    zero = _ZEROS[:size]
    parts = (chunk[i : i + size] for i in range(0, len(chunk), size))
    return b"".join(empty if part == zero else digest(part) for part in parts)
