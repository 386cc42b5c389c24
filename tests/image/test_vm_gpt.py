"""Partition tables by the firmware's rules."""

from __future__ import annotations

import pytest

from image.vm.gpt import SECTOR, BrokenTable, Table, exchange, layout_problems, read_table, read_tables, rewrite
from tests.image.gpt_writer import DISK_BLOCKS, gpt_blocks

SIZE = DISK_BLOCKS * SECTOR


class FakeDisk:
    """Both tables on a disk in memory."""

    def __init__(self, kinds: list[str], places: list[tuple[int, int]] | None = None) -> None:
        self.data = bytearray(SIZE)
        for start, blocks in gpt_blocks(kinds, places=places):
            self.write(start, blocks)

    def read(self, start: int, size: int) -> bytes:
        return bytes(self.data[start : start + size])

    def write(self, start: int, data: bytes) -> None:
        self.data[start : start + len(data)] = data

    def flip(self, start: int) -> None:
        self.data[start] ^= 1

    def used(self) -> Table:
        used = read_tables(self.read, SIZE).used
        assert used is not None
        return used


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk(["esp", "root", "root-verity", "var"])


def test_a_table_is_read(disk: FakeDisk) -> None:
    tables = read_tables(disk.read, SIZE)
    assert tables.problems == ()
    assert tables.used is tables.primary
    assert [each.kind for each in disk.used().partitions] == ["esp", "root", "root-verity", "var"]
    root = disk.used().find("root")
    assert (root.number, root.start, root.size) == (2, 200 * SECTOR, 100 * SECTOR)
    assert disk.used().find(4).label == "var"
    with pytest.raises(BrokenTable, match="no partition swap"):
        disk.used().find("swap")


@pytest.mark.parametrize("where", [SECTOR, SECTOR + 60, 2 * SECTOR + 40])
def test_a_broken_primary_is_replaced_by_the_backup_at_the_end(disk: FakeDisk, where: int) -> None:
    disk.flip(where)
    tables = read_tables(disk.read, SIZE)
    assert tables.primary is None
    assert tables.used is tables.backup is not None
    assert tables.problems[0].startswith("primary:")


def test_a_backup_that_is_not_at_the_end_does_not_help(disk: FakeDisk) -> None:
    disk.flip(SECTOR)
    disk.data += bytes(100 * SECTOR)
    assert read_tables(disk.read, len(disk.data)).used is None


def test_without_its_protective_mbr_there_is_no_table(disk: FakeDisk) -> None:
    disk.flip(450)
    assert read_tables(disk.read, SIZE).problems == ("no protective MBR",)


@pytest.mark.parametrize(("at", "value"), [(12, 600), (80, 4000), (84, 8), (24, 5)])
def test_a_hostile_header_is_refused(disk: FakeDisk, at: int, value: int) -> None:
    """Also with a right checksum: no size of its choice is read, no copy is taken for another."""
    disk.write(SECTOR + at, value.to_bytes(4, "little"))
    table = read_table(disk.read, DISK_BLOCKS - 1)
    # Its checksum made right by the code that writes tables.
    if at != 12:
        rewrite(disk.read, disk.write, Table(1, *(getattr(table, each) for each in FIELDS)), table.entries)
    with pytest.raises(BrokenTable, match="block 1"):
        read_table(disk.read, 1)


FIELDS = (
    "alternate_lba",
    "entries_lba",
    "entry_size",
    "entries",
    "first_usable",
    "last_usable",
    "disk_uuid",
    "partitions",
)


def test_partitions_that_overlap_or_lie_outside_are_named() -> None:
    disk = FakeDisk(["esp", "root", "var"], [(100, 199), (150, 250), (300, DISK_BLOCKS - 1)])
    problems = layout_problems(disk.used(), SIZE)
    assert problems == ["partitions 1 and 2 overlap", "partition 3 lies outside of the usable blocks"]


def test_two_partitions_change_places(disk: FakeDisk) -> None:
    root, var = disk.used().find("root"), disk.used().find("var")
    table = disk.used()
    rewrite(disk.read, disk.write, table, exchange(table.entries, table.entry_size, root.number, var.number))
    assert read_tables(disk.read, SIZE).problems == ()
    now = disk.used().find("root")
    assert (now.start, now.uuid) == (var.start, root.uuid)
    assert disk.used().find("var").start == root.start
