"""Installing the running system on another disk."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.errors import NotSupported
from ai_assistant.provisioning import gpt, images, install, verity
from ai_assistant.provisioning.disks import Disk, Machine
from ai_assistant.provisioning.errors import DiskFailed, DiskInUse, DiskTooSmall, VerificationFailed
from ai_assistant.provisioning.writing import HEAD, Target
from tests.provisioning.world import World
from tests.support.disk_image import MIB, root_data, table, verity_tree, write_image

CHECKOUT = Path(__file__).resolve().parents[2]
ROOT_HASH = verity_tree(root_data())[1].hex()
OTHER_HASH = verity_tree(root_data(seed=2))[1].hex()
LARGE = 700 * MIB
RUNNING = "ai-assistant_1.2.3.efi"


def unified_kernel(root_hash: str, seed: int) -> bytes:
    """Enough of a unified kernel image: noise with a command line in it."""
    line = f"console=tty0 roothash={root_hash} quiet\0" if root_hash else "console=tty0\0"
    noise = random.Random(seed).randbytes
    return b"MZ" + noise(200_000) + line.encode() + noise(100_000)


KERNEL = unified_kernel(ROOT_HASH, 1)
FILES = {
    "EFI/BOOT/BOOTX64.EFI": b"MZ loader",
    "EFI/systemd/systemd-bootx64.efi": b"MZ loader",
    "EFI/Linux/ai-assistant_1.2.3+2-1.efi": KERNEL,
    "EFI/Linux/ai-assistant_1.2.3+2-1.efi.extra.d/ours.addon.efi": b"MZ signed addon",
    "EFI/Linux/recovery.efi": unified_kernel("", 3),
    "loader/loader.conf": b"timeout 0\n",
    "loader/keys/auto/db.auth": b"signed",
    "loader/ai-assistant/measurements-1.2.3.json": json.dumps({"root_hash": ROOT_HASH}).encode(),
    "loader/ai-assistant/measurements-1.2.3.json.sig": b"MEUC",
}
NOT_COPIED = {
    "EFI/Linux/ai-assistant_1.2.4+3.efi": unified_kernel(OTHER_HASH, 2),
    "EFI/Linux/ai-assistant_1.2.4+3.efi.extra.d/more.addon.efi": b"MZ addon",
    "EFI/Linux/ai-assistant_1.2.3+2-1.efi.extra.d/wifi.cred": b"of this machine",
    "loader/random-seed": bytes(range(32)),
    "loader/credentials/login.cred": b"of this machine",
    "loader/ai-assistant/measurements-1.2.4.json": json.dumps({"root_hash": OTHER_HASH}).encode(),
    "loader/ai-assistant/measurements-1.2.4.json.sig": b"MEUC",
    "loader/ai-assistant/measurements-0.json": b"{",
}


def boot_partition(folder: Path, files: dict[str, bytes]) -> bytes:
    """A FAT file system with these files."""
    tree = folder / "tree"
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    path = folder / "esp"
    with path.open("wb") as file:
        file.truncate(40 * MIB)
    subprocess.run(["mkfs.vfat", "-F", "32", path], check=True, capture_output=True)
    subprocess.run(["mcopy", "-s", "-i", path, *sorted(tree.iterdir()), "::/"], check=True)
    return path.read_bytes()


def files_of(content: bytes, folder: Path) -> dict[str, bytes]:
    path, tree = folder / "found.esp", folder / "found"
    path.write_bytes(content)
    tree.mkdir()
    subprocess.run(["fsck.vfat", "-n", path], check=True, capture_output=True)
    subprocess.run(["mcopy", "-s", "-n", "-i", path, "::/", tree], check=True)
    return {str(each.relative_to(tree)): each.read_bytes() for each in tree.rglob("*") if each.is_file()}


@pytest.fixture
def appliance(world: World, image: Path) -> World:
    """Runs from a stick, sda; its boot partition is a mere boot sector."""
    world.appliance(image)
    return world


@pytest.fixture
def stick(world: World, tmp_path: Path) -> World:
    """Runs from a stick, sda, with a real boot partition that also has what must not be copied."""
    (tmp_path / "esp").mkdir()
    world.appliance(write_image(tmp_path / "stick.raw", esp=boot_partition(tmp_path / "esp", FILES | NOT_COPIED)))
    return world


def test_the_running_system_is_found_below_verity(appliance: World) -> None:
    found = install.running(appliance.machine)
    assert (found.disk.name, found.root_hash, found.label) == ("sda", ROOT_HASH, "root_1.2.3")
    assert [each.name for each in found.nodes] == ["sda1", "sda2", "sda3"]
    assert found.disk.transport == "usb"
    assert found.least_bytes == (1 + 2 + 2 * 21 + 512 + 6) * MIB


@pytest.mark.parametrize(
    "line", ["quiet", "roothash=12", f"roothash={ROOT_HASH} roothash={OTHER_HASH}", f"roothash={OTHER_HASH}"]
)
def test_a_command_line_that_is_not_of_this_disk(appliance: World, line: str) -> None:
    appliance.command_line(line)
    with pytest.raises(NotSupported):
        install.running(appliance.machine)


def test_a_system_that_is_no_appliance(world: World) -> None:
    world.disk("sda")
    world.mount(world.partition("sda", 1), "/")
    with pytest.raises(NotSupported, match="does not run from a disk of AI Assistant OS") as caught:
        install.running(world.machine)
    assert "flashed USB stick" in caught.value.hint


def test_a_running_disk_that_lost_its_table(appliance: World) -> None:
    (appliance.root / "dev/sda").write_bytes(bytes(MIB))
    with pytest.raises(DiskFailed, match="sda, which this system runs from, cannot be read"):
        install.running(appliance.machine)


def test_a_disk_that_is_large_enough_has_room_for_the_first_boot() -> None:
    """What is installed must find the space that its first boot asks for."""
    definitions = CHECKOUT / "image/base/usr/lib/ai-assistant/repart"
    files = [*(definitions / "slots").glob("*.conf"), *(definitions / "plain").glob("*.conf")]
    made = sorted(files, key=lambda path: path.name)
    sizes = [re.findall(r"^SizeMinBytes=(\d+)([MG])$", each.read_text(), re.MULTILINE)[0] for each in made]
    parts = [int(number) * {"M": MIB, "G": 1024 * MIB}[unit] for number, unit in sizes]
    assert parts[-1] == install.VAR_BYTES
    boot, root, tree = (gpt.Partition(1, gpt.ESP, uuid.UUID(int=0), "", 0, 0, size) for size in parts[:3])
    nowhere = Path("/nowhere")
    source = install.Running(Disk(nowhere, "sda", 0), "", (boot, root, tree), (nowhere, nowhere, nowhere))
    assert source.least_bytes >= sum(parts) + (len(parts) + 1) * MIB


def test_refusals(appliance: World) -> None:
    source = install.running(appliance.machine)
    least = source.least_bytes
    appliance.disk("sdb", LARGE)
    appliance.mount(appliance.partition("sdb", 1), "/media/disk")
    appliance.disk("sdc", least - 512)
    appliance.disk("nvme0n1", least)
    cases: dict[str, tuple[type[Exception], str]] = {
        "sda": (DiskInUse, "this system runs from"),
        "sdb": (DiskInUse, "sdb1 is mounted on /media/disk"),
        "sdc": (DiskTooSmall, f"{least:,} are needed"),
    }
    for name, (kind, said) in cases.items():
        with pytest.raises(kind, match=said):
            install.refuse(source, appliance.machine.disk(appliance.root / "dev" / name))
    install.refuse(source, appliance.machine.disk(appliance.root / "dev/nvme0n1"))


def read_table(path: Path) -> gpt.Table:
    with path.open("rb") as file:
        found = gpt.read(lambda offset, size: os.pread(file.fileno(), size, offset))
        assert gpt.has_backup(lambda offset, size: os.pread(file.fileno(), size, offset), found)
    return found


def installed(path: Path, folder: Path, size: int = LARGE) -> gpt.Table:
    """Check a disk that `stick` was installed on."""
    found = read_table(path)
    boot, root, tree = found.partitions
    assert found.end == size
    assert [(each.number, each.type) for each in found.partitions] == [
        (1, gpt.ESP), (2, gpt.ROOT), (3, gpt.ROOT_VERITY),
    ]  # fmt: skip
    assert root.uuid.hex + tree.uuid.hex == ROOT_HASH
    assert [each.label for each in (boot, root, tree)] == ["esp", "root_1.2.3", "verity_1.2.3"]
    assert [each.attributes for each in (boot, root, tree)] == [0, 1 << 60, 1 << 60]
    assert all(each.start % MIB == 0 for each in found.partitions)
    with path.open("rb") as file:
        checked = verity.check(
            images.reader(file.fileno(), root), images.reader(file.fileno(), tree), bytes.fromhex(ROOT_HASH)
        )
        assert checked == root.size
        content = os.pread(file.fileno(), boot.size, boot.start)
    expected = {name.replace("+2-1", ""): content for name, content in FILES.items()}
    assert files_of(content, folder) == expected
    # Nor may deleted files stand in free clusters.
    for name, secret in NOT_COPIED.items():
        assert len(secret) < 8 or secret not in content or name.endswith(".sig"), name
    return found


@pytest.mark.tools
def test_installed_on_another_disk(stick: World, tmp_path: Path) -> None:
    path = stick.disk("nvme0n1", LARGE, place="pci0/nvme/nvme0")
    with path.open("r+b") as file:  # what was there before
        for offset in (0, 8 * MIB, 50 * MIB, LARGE - MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(MIB))
    seen: list[str] = []
    source, disk = install.running(stick.machine), stick.machine.disk(path)
    install.install(source, disk, progress=lambda phase, done, total: seen.append(phase))
    first = installed(path, tmp_path)
    assert list(dict.fromkeys(seen)) == ["writing", "verifying", "checking"]
    before = read_table(stick.root / "dev/sda")
    assert first.uuid != before.uuid
    assert first.partitions[0].uuid != before.partitions[0].uuid
    (tmp_path / "again").mkdir()
    install.install(source, disk)
    second = installed(path, tmp_path / "again")
    assert second.uuid != first.uuid


@pytest.mark.tools
def test_a_disk_of_large_sectors(stick: World, tmp_path: Path) -> None:
    path = stick.disk("nvme0n1", LARGE, place="pci0/nvme/nvme0", queue__logical_block_size="4096")
    install.install(install.running(stick.machine), stick.machine.disk(path))
    assert read_table(path).sector_bytes == 4096
    installed(path, tmp_path)


@pytest.mark.tools
def test_installed_from_the_other_slot(stick: World, tmp_path: Path) -> None:
    """From a disk that runs its second slot: only that slot is copied, and becomes the first."""
    path = stick.root / "dev/sda"
    boot, root, tree = read_table(path).partitions
    content = path.read_bytes()
    slot = content[root.start : tree.end]
    other = (gpt.ROOT, uuid.UUID(int=1), "root_1.2.2", 0, root.start, root.size)
    moved = [
        (each.type, each.uuid, each.label, each.attributes, each.start + root.size, each.size) for each in (root, tree)
    ]
    size = tree.end + root.size + MIB
    head, tail = table([(boot.type, boot.uuid, boot.label, 0, boot.start, boot.size), other, *moved], size)
    whole = head + content[MIB : boot.end] + bytes(root.size) + slot
    path.write_bytes(whole.ljust(size - len(tail), b"\0") + tail)
    stick.partition("sda", 4, tree.size)
    for number, start, length in ((2, 0, 0), (3, 0, root.size), (4, root.size, tree.size)):
        (stick.root / f"dev/sda{number}").write_bytes(slot[start : start + length])
    target = stick.disk("sdb", LARGE)
    install.install(install.running(stick.machine), stick.machine.disk(target))
    installed(target, tmp_path)


def broken_target(error: BaseException, at: int) -> type[Target]:
    class Broken(Target):
        def write(self, data: bytes | memoryview, offset: int) -> None:
            if at <= offset < LARGE - MIB:
                raise error
            super().write(data, offset)

    return Broken


@pytest.mark.tools
def test_failures_leave_nothing_bootable_and_can_be_repeated(stick: World, tmp_path: Path) -> None:
    path = stick.disk("sdb", LARGE)
    source, disk = install.running(stick.machine), stick.machine.disk(path)

    class Wrong(Target):
        def read(self, offset: int, size: int) -> bytes:
            content = bytearray(super().read(offset, size))
            if offset <= 45 * MIB < offset + size:
                content[45 * MIB - offset] ^= 1
            return bytes(content)

    failures: list[tuple[type[Target], type[BaseException], str]] = [
        (broken_target(OSError(errno.EIO, "Input/output error"), 42 * MIB), DiskFailed, "failed"),
        (broken_target(OSError(errno.ENODEV, "No such device"), 42 * MIB), DiskFailed, "was removed"),
        (broken_target(KeyboardInterrupt(), 42 * MIB), KeyboardInterrupt, "interrupted"),
        (Wrong, VerificationFailed, f"{45 * MIB:,}|does not hold"),
    ]
    for target_class, kind, said in failures:
        with pytest.raises(kind, match=said) as caught:
            install.install(source, disk, target_class=target_class)
        assert "is now unusable until it is installed or flashed again" in str(caught.value)
        with path.open("rb") as file:
            assert file.read(HEAD) == bytes(HEAD)
            file.seek(LARGE - HEAD)
            assert file.read() == bytes(HEAD)
    install.install(source, disk)
    installed(path, tmp_path)


@pytest.mark.tools
@pytest.mark.parametrize(("node", "position"), [("sda2", 1_000_000), ("sda3", 5 * 4096)])
def test_a_damaged_stick_is_noticed(stick: World, node: str, position: int) -> None:
    """Its blocks are copied faithfully, and then found not to be those of the root hash."""
    with (stick.root / "dev" / node).open("r+b") as file:
        file.seek(position)
        file.write(b"damage")
    disk = stick.machine.disk(stick.disk("sdb", LARGE))
    with pytest.raises(VerificationFailed, match=r"the system on .*sda is damaged: its") as caught:
        install.install(install.running(stick.machine), disk)
    assert "flash that disk or stick again" in caught.value.hint


@pytest.mark.tools
@pytest.mark.parametrize("missing", ["EFI/BOOT/BOOTX64.EFI", "EFI/Linux/ai-assistant_1.2.3+2-1.efi"])
def test_nothing_is_erased_for_a_stick_that_could_not_have_booted(world: World, tmp_path: Path, missing: str) -> None:
    files = {name: content for name, content in (FILES | NOT_COPIED).items() if name != missing}
    (tmp_path / "esp").mkdir()
    world.appliance(write_image(tmp_path / "stick.raw", esp=boot_partition(tmp_path / "esp", files)))
    path = world.disk("sdb", LARGE)
    path.write_bytes(b"precious")
    os.truncate(path, LARGE)
    with pytest.raises(NotSupported, match="does not hold what this system was started with"):
        install.install(install.running(world.machine), world.machine.disk(path))
    assert path.read_bytes()[:8] == b"precious"


@pytest.mark.tools
def test_a_boot_partition_that_cannot_be_read_erases_nothing(appliance: World) -> None:
    path = appliance.disk("sdb", LARGE)
    path.write_bytes(b"precious")
    os.truncate(path, LARGE)
    with pytest.raises(DiskFailed, match=r"reading .*sda1 failed"):
        install.install(install.running(appliance.machine), appliance.machine.disk(path))
    assert path.read_bytes()[:8] == b"precious"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.write(random.Random(8).randbytes(8 * MIB))
        file.truncate(LARGE)
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=True)
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.tools
def test_a_real_block_device(stick: World, loop: Path, tmp_path: Path) -> None:
    disk: Disk = Machine().disk(loop)
    install.install(install.running(stick.machine), disk)
    installed(loop, tmp_path)
    verified = subprocess.run(["sfdisk", "--verify", loop], capture_output=True, text=True, check=True)
    assert "No errors detected" in verified.stdout
