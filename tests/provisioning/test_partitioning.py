"""The boot disk from sysfs, and what the first boot needs of it."""

from __future__ import annotations

import os
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from ai_assistant.errors import AIAssistantError
from ai_assistant.provisioning import gpt, partitioning
from ai_assistant.provisioning.errors import DiskTooSmall, NoSuchDisk
from ai_assistant.provisioning.partitioning import Disk, Partition, boot_disk, needed_bytes, partition
from tests.support.disk_image import table

CHECKOUT = Path(__file__).resolve().parents[2]
SECTOR = 512


def make_disk(sysfs: Path, name: str, partitions: list[tuple[str, str, int, int]], removable: bool = False) -> Path:
    """A disk in a sysfs of our own: (kernel name, label, first sector, sectors) of each partition."""
    disk = sysfs / "devices/pci0000:00/block" / name
    disk.mkdir(parents=True)
    (disk / "size").write_text(f"{16 * 2**30 // SECTOR}\n")
    (disk / "removable").write_text(f"{int(removable)}\n")
    (disk / "slaves").mkdir()
    (disk / "queue").mkdir()
    (disk / "queue/logical_block_size").write_text("512\n")
    for number, (kernel_name, _, start, size) in enumerate(partitions, 1):
        folder = disk / kernel_name
        folder.mkdir()
        (folder / "partition").write_text(f"{number}\n")
        (folder / "start").write_text(f"{start}\n")
        (folder / "size").write_text(f"{size}\n")
    parts = [(gpt.ROOT, uuid.uuid4(), label, 0, start * SECTOR, size * SECTOR) for _, label, start, size in partitions]
    (sysfs / "dev").mkdir(exist_ok=True)
    (sysfs / "dev" / name).write_bytes(table(parts, 16 * 2**30)[0])
    return disk


def make_verity(sysfs: Path, on: list[Path], number: tuple[int, int]) -> None:
    node = sysfs / "devices/virtual/block/dm-0"
    (node / "slaves").mkdir(parents=True)
    for each in on:
        (node / "slaves" / each.name).symlink_to(each)
    link = sysfs / f"dev/block/{number[0]}:{number[1]}"
    link.parent.mkdir(parents=True)
    link.symlink_to(node)


@pytest.mark.parametrize("name", ["vda", "nvme0n1", "sda", "mmcblk0"])
def test_the_boot_disk_is_found_through_verity(tmp_path: Path, name: str) -> None:
    join = "p" if name[-1].isdigit() else ""
    names = [f"{name}{join}{number}" for number in (1, 2, 3)]
    disk = make_disk(tmp_path, name, [(names[0], "esp", 2048, 1000), (names[1], "root_0.1.0", 4096, 1000),
                                      (names[2], "verity_0.1.0", 8192, 100)])  # fmt: skip
    make_verity(tmp_path, [disk / names[1], disk / names[2]], (254, 7))
    found = boot_disk(tmp_path, os.makedev(254, 7), tmp_path / "dev")
    assert found.device == tmp_path / "dev" / name
    assert found.size == 16 * 2**30
    assert not found.removable
    root = found.labelled("root_0.1.0")
    assert root == Partition(tmp_path / "dev" / names[1], "root_0.1.0", 4096 * SECTOR, 1000 * SECTOR)
    assert found.labelled("var") is None
    assert found.free_bytes == 16 * 2**30 - (8192 + 100) * SECTOR - 65536


def test_a_stick_is_removable(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, "sda", [("sda1", "", 2048, 1000)], removable=True)
    make_verity(tmp_path, [disk / "sda1"], (254, 0))
    assert boot_disk(tmp_path, os.makedev(254, 0), tmp_path / "dev").removable


def test_no_disk_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(NoSuchDisk, match="on no disk"):
        boot_disk(tmp_path, os.makedev(0, 42))


@pytest.mark.parametrize(("tree", "needed"), [
    ("image/base", 4 * 2**30 + 64 * 2**20 + 512 * 2**20),
    ("image/test/tree", 300 * 2**20 + 8 * 2**20 + 256 * 2**20),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "encrypted"])
def test_what_the_images_need(tree: str, needed: int, kind: str) -> None:
    definitions = CHECKOUT / tree / "usr/lib/ai-assistant/repart"
    # Each partition may lose a MiB to alignment.
    assert needed_bytes([definitions / "slots", definitions / kind]) == needed + 3 * 2**20


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the disk was touched")

    monkeypatch.setattr(partitioning, "run", touched)
    disk = Disk(tmp_path / "disk", 6 * 2**30, False, (Partition(tmp_path / "disk1", "root", 2**20, 5 * 2**30),))
    definitions = CHECKOUT / "image/base/usr/lib/ai-assistant/repart"
    with pytest.raises(DiskTooSmall, match=r"4,6\d\d MiB more are needed behind the image, and 1,02\d MiB are free"):
        partition(disk, [definitions / "slots", definitions / "plain"])


def test_the_slots_of_the_image_are_the_slots_of_the_first_boot() -> None:
    """A definition that does not match what the image brought would make a second set of partitions."""
    for built, first_boot in (("image/repart", "image/base"), ("image/test/repart", "image/test/tree")):
        for name in ("10-esp.conf", "20-root-a.conf", "21-root-a-verity.conf"):
            texts = [
                (CHECKOUT / folder / name).read_text()
                for folder in (built, f"{first_boot}/usr/lib/ai-assistant/repart/slots")
            ]
            keys = [sorted(line for line in text.splitlines() if line.startswith(("Type=", "Size"))) for text in texts]
            assert keys[0] == keys[1], name


def test_errors_of_the_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(2 << 20))
    disk = Disk(tmp_path / "disk", 2**40, False, ())
    monkeypatch.setattr(partitioning, "Path", lambda *parts: tmp_path.joinpath(*(p.strip("/") for p in parts)))
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "losetup").write_text("#!/bin/sh\necho 'losetup: no free loop device' >&2\nexit 1\n")
    (tmp_path / "losetup").chmod(0o755)
    with pytest.raises(AIAssistantError, match="losetup: losetup: no free loop device"):
        partition(disk, [])


@pytest.mark.tools
def test_a_disk_gets_ids_of_its_own(tmp_path: Path) -> None:
    """Those of the disk and its boot partition; root keeps its own, which are halves of its verity hash."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    script = f"label: gpt\nsize=8MiB, type={gpt.ESP}, name=esp\nsize=8MiB, type={gpt.ROOT}, name=root_0.1.0\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=script, text=True, check=True)
    before = partitioning._table(disk)
    partitioning._own_identity(disk)
    after = partitioning._table(disk)
    assert after.uuid != before.uuid
    assert after.partitions[0].uuid != before.partitions[0].uuid
    assert after.partitions[1] == before.partitions[1]
    assert replace(after.partitions[0], uuid=before.partitions[0].uuid) == before.partitions[0]
    with disk.open("rb") as file:
        assert gpt.has_backup(lambda offset, size: os.pread(file.fileno(), size, offset), after)
