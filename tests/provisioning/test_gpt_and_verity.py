"""Partition tables and verity trees: read as the specifications say, and as the real tools make them."""

from __future__ import annotations

import random
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ai_assistant.provisioning import gpt, verity
from tests.support.disk_image import BLOCK, MIB, READ_ONLY, SALT, root_data, table, verity_tree

PARTS = [
    (gpt.ESP, uuid.UUID(int=1), "esp", 0, MIB, 2 * MIB),
    (gpt.ROOT, uuid.UUID(int=2), "root_1.2.3", READ_ONLY, 3 * MIB, 4 * MIB),
]
SIZE = 8 * MIB


def reader(content: bytes) -> gpt.Read:
    return lambda offset, size: content[offset : offset + size]


def disk(sector: int = 512) -> bytearray:
    head, tail = table(PARTS, SIZE, sector)
    return bytearray(head + bytes(SIZE - len(head) - len(tail)) + tail)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_table_is_read(sector: int) -> None:
    content = bytes(disk(sector))
    found = gpt.read(reader(content))
    assert (found.sector_bytes, found.end) == (sector, SIZE)
    assert [(p.type, p.uuid, p.label, p.attributes, p.start, p.size) for p in found.partitions] == PARTS
    assert [each.number for each in found.partitions] == [1, 2]
    assert gpt.has_backup(reader(content), found)


def test_any_wrong_byte_of_header_or_entries_is_noticed() -> None:
    for position in [512 + i for i in range(92)] + [1024, 1024 + 33, 1024 + 16383]:
        content = disk()
        content[position] ^= 1
        with pytest.raises(gpt.NoTable):
            gpt.read(reader(bytes(content)), (512,))


@pytest.mark.parametrize("length", [0, 511, 600, 1024, 5000])
def test_a_short_disk_has_no_table(length: int) -> None:
    with pytest.raises(gpt.NoTable):
        gpt.read(reader(bytes(disk()[:length])))


def test_a_missing_second_table_is_noticed() -> None:
    content = disk()
    found = gpt.read(reader(bytes(content)))
    assert not gpt.has_backup(reader(bytes(content[:-512])), found)
    content[-512] ^= 1
    assert not gpt.has_backup(reader(bytes(content)), found)


def test_verity_accepts_what_is_whole() -> None:
    seen: list[tuple[int, int]] = []
    data = root_data()
    tree, root_hash = verity_tree(data)
    assert verity.check(reader(data), reader(tree), root_hash, lambda *step: seen.append(step)) == len(data)
    assert seen[-1] == (len(data), len(data))


def broken(what: str) -> tuple[bytes, bytes]:
    data, tree = bytearray(root_data()), bytearray(verity_tree(root_data())[0])
    match what:
        case "data":
            data[1_234_567] ^= 1
        case "empty data":
            data[-1] ^= 1
        case "leaf":
            tree[BLOCK * 3 + 5] ^= 1
        case "top":
            tree[BLOCK + 5] ^= 1
        case "salt":
            tree[88] ^= 1
        case "magic":
            tree[0] ^= 1
        case "algorithm":
            tree[32] ^= 1
        case "blocks":
            tree[72] ^= 1
        case "short data":
            del data[-BLOCK:]
        case "short tree":
            del tree[-BLOCK:]
        case "no tree":
            tree.clear()
    return bytes(data), bytes(tree)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("data", "its data at byte 1,232,896"),
        ("empty data", "its data at byte"),
        ("leaf", "its verity tree at byte 12,288|its data"),
        ("top", "not its own"),
        ("salt", "not its own"),
        ("magic", "no verity superblock"),
        ("algorithm", "not ours"),
        ("blocks", "damaged|ends at|not its own"),
        ("short data", "ends at byte"),
        ("short tree", "ends at byte|damaged"),
        ("no tree", "no verity superblock"),
    ],
)
def test_verity_names_what_is_damaged(what: str, said: str) -> None:
    data, tree = broken(what)
    with pytest.raises(verity.Damaged, match=said):
        verity.check(reader(data), reader(tree), verity_tree(root_data())[1])


def test_verity_of_another_root_is_refused() -> None:
    data = root_data(seed=2)
    with pytest.raises(verity.Damaged, match="not its own"):
        verity.check(reader(data), reader(verity_tree(data)[0]), verity_tree(root_data())[1])


@pytest.mark.tools
def test_sfdisk_makes_what_we_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    script = f"label: gpt\nstart=2048, size=2048, type={gpt.ROOT}, uuid={uuid.UUID(int=9)}, name=größe, attrs=GUID:60"
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True)
    found = gpt.read(reader(path.read_bytes()))
    (part,) = found.partitions
    assert (part.type, part.uuid, part.label, part.attributes) == (gpt.ROOT, uuid.UUID(int=9), "größe", READ_ONLY)
    assert (part.start, part.size, found.end) == (MIB, MIB, 16 * MIB)


def veritysetup(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["veritysetup", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.tools
@pytest.mark.parametrize("blocks", [2, 127, 128, 129, 1024, 1025, 16384, 16400])
def test_veritysetup_agrees(tmp_path: Path, blocks: int) -> None:
    """One, two and three levels, and the edges between them."""
    data, tree = tmp_path / "data", tmp_path / "tree"
    with data.open("wb") as file:
        file.write(random.Random(blocks).randbytes(min(blocks, 50) * BLOCK))
        file.truncate(blocks * BLOCK)
    made = veritysetup("format", data, tree, f"--salt={SALT.hex()}").stdout
    root_hash = next(line.split()[-1] for line in made.splitlines() if line.startswith("Root hash"))

    def check() -> int:
        return verity.check(reader(data.read_bytes()), reader(tree.read_bytes()), bytes.fromhex(root_hash))

    assert check() == blocks * BLOCK
    generator: Callable[[int], int] = random.Random(blocks).randrange
    for file_path, least in ((data, 0), (tree, BLOCK)):
        whole = file_path.read_bytes()
        for _ in range(3):
            position = least + generator(len(whole) - least)
            file_path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            refused = veritysetup("verify", data, tree, root_hash).returncode != 0
            try:
                check()
            except verity.Damaged:
                assert refused
            else:
                assert not refused, f"{file_path.name} at {position}"
        file_path.write_bytes(whole)
