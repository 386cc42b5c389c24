"""Comparing two builds: synthetic disks that differ in one known byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from image.rebuild import __main__ as command
from image.rebuild import show
from image.rebuild.compare import compare, compare_builds, table
from image.rebuild.disk import outside, partitions
from image.rebuild.errors import RebuildError
from image.vm.gpt import SECTOR
from tests.image.gpt_writer import DISK_BLOCKS, gpt_blocks

NAME = "ai-assistant_9.9_x86-64"
KINDS = ["esp", "root", "root-verity"]


def disk(path: Path) -> None:
    content = bytearray(b"\x55" * (DISK_BLOCKS * SECTOR))
    for offset, block in gpt_blocks(KINDS):
        content[offset : offset + len(block)] = block
    path.write_bytes(content)


@pytest.fixture
def builds(tmp_path: Path) -> tuple[Path, Path]:
    sides = tmp_path / "a", tmp_path / "b"
    for side in sides:
        side.mkdir()
        disk(side / f"{NAME}.raw")
        for suffix in ("efi", "manifest", "initrd.manifest"):
            (side / f"{NAME}.{suffix}").write_bytes(suffix.encode() * 1000)
    return sides


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_alike(builds: tuple[Path, Path]) -> None:
    found = compare_builds(NAME, *builds)
    assert found.identical
    assert [pair.what for pair in found.parts] == [
        "1 esp esp",
        "2 root root",
        "3 root-verity root-verity",
        "outside of partitions",
    ]
    assert "DIFFERS" not in table(found)
    assert found.as_json()["identical"] is True


@pytest.mark.parametrize(
    ("offset", "part"),
    [
        (100 * SECTOR, "1 esp esp"),
        (200 * SECTOR + 77, "2 root root"),
        (400 * SECTOR - 1, "3 root-verity root-verity"),
        (400 * SECTOR, "outside of partitions"),
        (DISK_BLOCKS * SECTOR - 1, "outside of partitions"),
    ],
)
def test_one_byte_is_found_in_its_partition(builds: tuple[Path, Path], offset: int, part: str) -> None:
    flip(builds[1] / f"{NAME}.raw", offset)
    found = compare_builds(NAME, *builds)
    assert [(pair.what, pair.first_difference) for pair in found.artefacts if not pair.identical] == [("raw", offset)]
    assert [(pair.what, pair.first_difference) for pair in found.parts if not pair.identical] == [(part, offset)]
    assert f"DIFFERS, first at byte {offset}" in table(found)


@pytest.mark.parametrize("suffix", ["efi", "manifest", "initrd.manifest"])
def test_every_artefact_counts(builds: tuple[Path, Path], suffix: str) -> None:
    flip(builds[0] / f"{NAME}.{suffix}", 5)
    found = compare_builds(NAME, *builds)
    assert not found.identical
    assert [(pair.what, pair.first_difference) for pair in found.artefacts if not pair.identical] == [(suffix, 5)]


def test_a_longer_file_differs_where_the_other_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"same")
    (tmp_path / "b").write_bytes(b"same and more")
    (tmp_path / "empty").write_bytes(b"")
    assert compare("x", tmp_path / "a", tmp_path / "b").first_difference == 4
    assert compare("x", tmp_path / "empty", tmp_path / "b").first_difference == 0
    assert compare("x", tmp_path / "b", tmp_path / "b").identical


def test_a_difference_beyond_the_first_block(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(3 << 20))
    flip(tmp_path / "b", (2 << 20) + 9)
    assert compare("x", tmp_path / "a", tmp_path / "b").first_difference == (2 << 20) + 9
    assert compare("x", tmp_path / "a", tmp_path / "b", [(0, 2 << 20)]).identical


def test_partitions_elsewhere_are_said(builds: tuple[Path, Path]) -> None:
    path = builds[1] / f"{NAME}.raw"
    content = bytearray(path.read_bytes())
    for offset, block in gpt_blocks(KINDS, places=[(100, 199), (300, 399), (200, 299)]):
        content[offset : offset + len(block)] = block
    path.write_bytes(content)
    found = compare_builds(NAME, *builds)
    assert [pair.what for pair in found.parts] == ["partition table (partitions lie elsewhere)"]
    assert not found.identical


def test_a_missing_artefact_and_a_damaged_disk_are_named(builds: tuple[Path, Path]) -> None:
    flip(builds[0] / f"{NAME}.raw", SECTOR + 60)
    with pytest.raises(RebuildError, match=r"no good partition table: .*checksum"):
        compare_builds(NAME, *builds)
    (builds[0] / f"{NAME}.raw").write_bytes(b"")
    with pytest.raises(RebuildError, match="no good partition table"):
        partitions(builds[0] / f"{NAME}.raw")
    (builds[1] / f"{NAME}.efi").unlink()
    with pytest.raises(RebuildError, match=r"\.efi is missing"):
        compare_builds(NAME, *builds)


def test_parts_and_gaps_cover_the_whole_disk(builds: tuple[Path, Path]) -> None:
    found = partitions(builds[0] / f"{NAME}.raw")
    gaps = outside(found, DISK_BLOCKS * SECTOR)
    assert sum(each.size for each in found) + sum(size for _, size in gaps) == DISK_BLOCKS * SECTOR


def test_files_that_differ_are_listed_with_what_differs(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for side in (a, b):
        (side / "folder").mkdir(parents=True)
        for name in ("same", "content", "mode", "time", "folder/inside"):
            (side / name).write_text(name)
            os.utime(side / name, (1, 1))
        os.utime(side / "folder", (1, 1))
    (b / "content").write_text("other")
    os.utime(b / "content", (1, 1))
    (b / "mode").chmod(0o600)
    os.utime(b / "time", (2, 2))
    (a / "link").symlink_to("here")
    os.utime(a / "link", (1, 1), follow_symlinks=False)
    assert list(show.trees(a, b)) == [
        ("content", "content"),
        ("link", "only in A"),
        ("mode", "mode -rw-r--r-- / -rw-------"),
        ("time", "time 1 / 2"),
    ]


def test_too_little_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(RebuildError, match="GiB are needed"):
        command.room(tmp_path, 10_000)
    command.room(tmp_path, -1)


def test_inputs_change_with_commit_and_keys(tmp_path: Path) -> None:
    for name in ("secure-boot.crt", "pcr.pub", "release.pub"):
        (tmp_path / name).write_text(name)
    first = command.inputs("commit", tmp_path)
    assert command.inputs("commit", tmp_path) == first
    assert command.inputs("other", tmp_path) != first
    (tmp_path / "pcr.pub").write_text("another")
    assert command.inputs("commit", tmp_path) != first
    (tmp_path / "release.pub").unlink()
    with pytest.raises(RebuildError, match=r"no public key .*release\.pub"):
        command.inputs("commit", tmp_path)
