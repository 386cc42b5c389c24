"""Writing an image: what is on the disk afterwards, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.errors import AIAssistantError, NoSpace
from ai_assistant.provisioning import images
from ai_assistant.provisioning.disks import Disk, Machine
from ai_assistant.provisioning.errors import (
    DiskFailed,
    DiskInUse,
    DiskTooSmall,
    InvalidImage,
    NotADisk,
    VerificationFailed,
)
from ai_assistant.provisioning.flash import flash, refuse
from ai_assistant.provisioning.writing import HEAD, Target
from tests.provisioning.world import World
from tests.support.disk_image import MIB, SIZES, write_image

DISK = 32 * MIB
OLD = random.Random(7).randbytes(MIB) * (DISK // MIB)


@pytest.fixture
def used(tmp_path: Path) -> Disk:
    """A disk full of what was there before."""
    path = tmp_path / "disk.raw"
    path.write_bytes(OLD)
    return Machine(tmp_path / "nothing").disk(path)


class Recorded(Target):
    """Remembers the order of what is written."""

    log: list[tuple[str, int, int]]

    def __init__(self, disk: Disk, *, exclusive: bool = True) -> None:
        super().__init__(disk, exclusive=exclusive)
        type(self).log = []

    def write(self, data: bytes | memoryview, offset: int) -> None:
        self.log.append(("write", offset, len(data)))
        super().write(data, offset)

    def zero(self, offset: int, size: int) -> None:
        self.log.append(("zero", offset, size))
        super().zero(offset, size)

    def sync(self) -> None:
        self.log.append(("sync", 0, 0))
        super().sync()


def written(image: Path, disk: Disk) -> None:
    content, size = disk.path.read_bytes(), image.stat().st_size
    assert content[:size] == image.read_bytes()
    assert content[-HEAD:] == bytes(HEAD), "an old table at the end would be found by firmware"
    assert len(content) == DISK


def test_the_image_and_nothing_else_is_there(image: Path, used: Disk) -> None:
    seen: list[tuple[str, int, int]] = []
    flash(images.inspect(image), used, progress=lambda *step: seen.append(step))
    written(image, used)
    size = image.stat().st_size
    for phase in ("writing", "verifying"):
        steps = [(done, total) for name, done, total in seen if name == phase]
        assert (size - HEAD, size - HEAD) in steps
        assert steps[-1] == (HEAD, HEAD)
    flash(images.inspect(image), used, check=False)
    written(image, used)


def test_zeros_of_the_image_are_zeros_on_the_disk_even_where_holes_cannot_be_made(image: Path, used: Disk) -> None:
    class Plain(Target):
        """A device that keeps its old content and knows no short way to zeros."""

        def begin(self) -> None:
            self._regular = False
            super().begin()

    flash(images.inspect(image), used, target_class=Plain)
    content, size = used.path.read_bytes(), image.stat().st_size
    assert content[:size] == image.read_bytes()
    assert content[size:-HEAD] == OLD[size:-HEAD], "what is behind the image is not touched"
    assert content[-HEAD:] == bytes(HEAD)


def test_the_table_goes_first_and_comes_last(image: Path, used: Disk) -> None:
    flash(images.inspect(image), used, target_class=Recorded)
    log = Recorded.log
    assert log[:3] == [("write", 0, HEAD), ("write", DISK - HEAD, HEAD), ("sync", 0, 0)]
    assert log[-2:] == [("write", 0, HEAD), ("sync", 0, 0)]
    assert all(offset >= HEAD for _, offset, size in log[3:-2] if size)
    assert log[-3][0] == "sync", "everything else is on the disk before"


def failing(error: BaseException, at: int, method: str = "write") -> type[Target]:
    """A disk that fails when the byte `at` is reached."""

    class Failing(Target):
        pass

    def failed(self: Target, *given: object) -> object:
        offset = next(each for each in given if isinstance(each, int))
        if offset >= at and offset < DISK - HEAD:
            raise error
        return getattr(Target, method)(self, *given)

    setattr(Failing, method, failed)
    return Failing


@pytest.mark.parametrize(
    ("method", "number", "kind", "said"),
    [
        ("write", errno.EIO, DiskFailed, "failed: Input/output error"),
        ("write", errno.ENODEV, DiskFailed, "was removed"),
        ("write", errno.ENOSPC, NoSpace, "is full"),
        ("zero", errno.EIO, DiskFailed, "failed: Input/output error"),
        ("read", errno.EIO, DiskFailed, "failed: Input/output error"),
        ("read", errno.ENXIO, DiskFailed, "was removed"),
    ],
)
def test_a_failure_half_way_is_named_and_leaves_nothing_bootable(
    image: Path, used: Disk, method: str, number: int, kind: type[AIAssistantError], said: str
) -> None:
    broken = failing(OSError(number, os.strerror(number)), 4 * MIB, method)
    with pytest.raises(kind, match=said) as caught:
        flash(images.inspect(image), used, target_class=broken)
    assert f"{used.path} is now unusable until it is flashed again" in caught.value.message
    assert caught.value.hint
    assert used.path.read_bytes()[:HEAD] == bytes(HEAD)
    flash(images.inspect(image), used)
    written(image, used)


def test_a_disk_that_is_gone_was_removed_whatever_the_error(image: Path, used: Disk) -> None:
    class Pulled(Target):
        def write(self, data: bytes | memoryview, offset: int) -> None:
            if offset > HEAD and offset < DISK - HEAD:
                used.path.unlink(missing_ok=True)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().write(data, offset)

    with pytest.raises(DiskFailed, match="was removed"):
        flash(images.inspect(image), used, target_class=Pulled)


def test_ctrl_c_half_way(image: Path, used: Disk) -> None:
    with pytest.raises(KeyboardInterrupt, match="unusable until it is flashed again"):
        flash(images.inspect(image), used, target_class=failing(KeyboardInterrupt(), 4 * MIB))
    assert used.path.read_bytes()[:HEAD] == bytes(HEAD)


@pytest.mark.parametrize("position", [HEAD, 5 * MIB + 12_345, 700])
def test_what_is_read_back_differently_is_named_to_the_byte(image: Path, used: Disk, position: int) -> None:
    class Forgetful(Target):
        def read(self, offset: int, size: int) -> bytes:
            content = bytearray(super().read(offset, size))
            if offset <= position < offset + size:
                content[position - offset] ^= 0x10
            return bytes(content)

    with pytest.raises(VerificationFailed, match=f"the first difference is at byte {position:,}") as caught:
        flash(images.inspect(image), used, target_class=Forgetful)
    assert "unusable" in caught.value.message


def test_a_disk_that_ends_early_is_noticed(image: Path, used: Disk) -> None:
    """Sticks that claim to be larger than they are; the rest here reads as nothing at all."""

    class Short(Target):
        def read(self, offset: int, size: int) -> bytes:
            return super().read(offset, size)[: max(3 * MIB - offset, 0)]

    with pytest.raises(VerificationFailed, match=f"byte {3 * MIB:,}"):
        flash(images.inspect(image), used, target_class=Short)


def test_an_image_that_changes_meanwhile_is_noticed(image: Path, used: Disk) -> None:
    whole = images.inspect(image)

    class Slow(Target):
        def sync(self) -> None:
            super().sync()
            with image.open("r+b") as file:
                file.truncate(6 * MIB)

    with pytest.raises(InvalidImage, match="became shorter"):
        flash(whole, used, target_class=Slow)


def test_refusals(world: World, image: Path, tmp_path: Path) -> None:
    found = images.inspect(image)
    machine = world.machine
    world.disk("sda")
    world.mount("sda", str(tmp_path))
    small, wide = world.disk("sdb", 4 * MIB), world.disk("sdc", queue__logical_block_size="4096")
    with pytest.raises(DiskInUse, match="which would be erased"):
        refuse(found, machine.disk(world.root / "dev/sda"), machine, force=True)
    with pytest.raises(DiskInUse, match="is the image itself"):
        refuse(found, machine.disk(image), machine, force=True)
    with pytest.raises(DiskTooSmall):
        refuse(found, machine.disk(small), machine, force=True)
    with pytest.raises(NotADisk, match="sectors of 4096 bytes"):
        refuse(found, machine.disk(wide), machine)
    (tmp_path / "file").write_bytes(bytes(DISK))
    refuse(found, machine.disk(tmp_path / "file"), machine)


def spoiled(image: Path, what: str) -> Path:
    content = bytearray(image.read_bytes())
    match what:
        case "truncated":
            del content[9 * MIB :]
        case "last byte missing":
            del content[-1:]
        case "longer":
            content += bytes(512)
        case "random":
            content[:] = random.Random(3).randbytes(MIB)
        case "empty":
            content.clear()
        case "zst":
            content[:4] = b"\x28\xb5\x2f\xfd"
        case "table":
            content[600] ^= 1
        case "second table":
            content[-512:] = bytes(512)
        case "esp":
            content[MIB : 2 * MIB] = bytes(MIB)
        case "root":
            content[MIB * 3 : MIB * 4] = bytes(MIB)
        case "verity":
            content[MIB * 23 : MIB * 24] = bytes(MIB)
    image.write_bytes(content)
    return image


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("truncated", "is truncated: 9,437,184 bytes of"),
        ("last byte missing", "is truncated"),
        ("longer", "512 bytes more"),
        ("random", "no image of AI Assistant OS"),
        ("empty", "no image of AI Assistant OS"),
        ("zst", "is compressed"),
        ("table", "damaged partition table"),
        ("second table", "second partition table is missing"),
        ("esp", "ESP partition is empty"),
        ("root", "root partition is empty"),
        ("verity", "root's verity partition is empty"),
    ],
)
def test_what_is_no_image_is_said(image: Path, what: str, said: str) -> None:
    with pytest.raises(InvalidImage, match=said) as caught:
        images.inspect(spoiled(image, what))
    assert caught.value.hint


def test_a_flipped_bit_is_found_before_anything_is_erased(image: Path) -> None:
    found = images.inspect(image)
    images.check(found)
    with image.open("r+b") as file:
        file.seek(3 * MIB + 40_000)
        file.write(b"\xff\xfe\xfd")
    with pytest.raises(InvalidImage, match="its root is damaged: its data at byte 36,864"):
        images.check(images.inspect(image))


def test_a_checksum_is_compared(image: Path) -> None:
    found = images.inspect(image)
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    images.check_sum(found, digest.upper() + "\n")
    with pytest.raises(InvalidImage, match=digest):
        images.check_sum(found, "0" * 64)


@pytest.mark.parametrize("path", ["/nowhere", ".", "a\0b"])
def test_an_image_that_is_no_file(path: str) -> None:
    with pytest.raises(InvalidImage):
        images.inspect(Path(path))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A real block device full of old bytes."""
    backing = tmp_path / "backing"
    backing.write_bytes(OLD)
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=True)
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["umount", "-q", device], check=False)
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.tools
def test_a_real_block_device(image: Path, loop: Path) -> None:
    disk = Machine().disk(loop)
    assert (disk.transport, disk.size_bytes, disk.uses) == ("loop", DISK, ())
    refuse(images.inspect(image), disk, Machine())
    flash(images.inspect(image), disk)
    written(image, disk)


@pytest.mark.tools
def test_a_mounted_device_is_refused_twice(image: Path, loop: Path, tmp_path: Path) -> None:
    """By what /proc says, and by the kernel when nobody looked there."""
    subprocess.run(["mkfs.ext4", "-q", "-F", loop], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", loop, tmp_path / "mnt"], check=True)
    before = loop.read_bytes()
    disk = Machine().disk(loop)
    with pytest.raises(DiskInUse, match=f"is mounted on {tmp_path}/mnt"):
        refuse(images.inspect(image), disk, Machine())
    refuse(images.inspect(image), disk, Machine(), force=True)
    with pytest.raises(DiskInUse, match="says the kernel"):
        flash(images.inspect(image), disk)
    assert loop.read_bytes() == before


@pytest.mark.tools
def test_a_file_on_a_full_file_system(image: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", tmp_path / "full"], check=True)
    try:
        path = tmp_path / "full/disk.raw"
        with path.open("wb") as file:
            file.truncate(DISK)
        with pytest.raises(NoSpace, match=r"the file system of .* is full; .* unusable"):
            flash(images.inspect(image), Machine().disk(path))
    finally:
        subprocess.run(["umount", tmp_path / "full"], check=True)


def test_the_images_of_these_tests_are_small(image: Path) -> None:
    assert image.stat().st_size == (sum(SIZES.values()) + 2) * MIB
    assert images.inspect(write_image(image, seed=5)).label == "root_1.2.3"
