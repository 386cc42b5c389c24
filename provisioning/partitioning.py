"""The boot disk, and a first-boot partitioning that a power cut cannot spoil.

systemd-repart formats new partitions first and writes the table last, but both copies of the table in one go: a
cut in those milliseconds may leave neither whole, and the machine without a disk to boot from. So it works on a
stand-in here: a device-mapper device that is the disk, except for its first MiB – boot sector and primary table –
which is a copy in memory. When repart is done, everything it wrote, the backup table at the disk's end included, is
flushed; only then does the primary table follow. Until that moment the old primary table is whole, from then on the
new backup is: firmware and kernel (`gpt` on its command line) take whichever is good.
"""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.provisioning import gpt
from ai_assistant.provisioning.errors import DiskFailed, DiskTooSmall, NoSuchDisk

SYSFS = Path("/sys")
HEAD_BYTES = 1 << 20
# Room for either sector size; what is not table in it is written back as it was.
_TABLE_BYTES = 64 << 10
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as the kernel sees it; offsets and sizes in bytes."""

    device: Path
    label: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Disk:
    """`removable` is what the kernel says of its medium: true for sticks, false for disks in a USB case."""

    device: Path
    size: int
    removable: bool
    partitions: tuple[Partition, ...]
    sector_bytes: int = 512

    def labelled(self, label: str) -> Partition | None:
        return next((each for each in self.partitions if each.label == label), None)

    @property
    def free_bytes(self) -> int:
        """Behind the last partition, without the backup table."""
        return self.size - max((each.start + each.size for each in self.partitions), default=HEAD_BYTES) - _TABLE_BYTES


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Run to the end; never raises for an exit status."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [str(word) for word in command],
        # What a person typed, or a file system says of itself, need not be UTF-8.
        **{"capture_output": True, "encoding": "utf-8", "errors": "replace", "check": False, **options},
    )


def boot_disk(sysfs: Path = SYSFS, root_device: int | None = None, devices: Path = Path("/dev")) -> Disk:
    """The disk that / is on, through dm-verity.

    Raises:
        NoSuchDisk: / is on no disk (a container, a network).
    """
    number = Path("/").stat().st_dev if root_device is None else root_device
    node = (sysfs / f"dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    while node.exists() and any((node / "slaves").glob("*")):
        # Verity sits on two partitions; either leads to the disk.
        node = min((node / "slaves").iterdir()).resolve()
    if (node / "partition").exists():
        node = node.parent
    if not (node / "size").exists():
        raise NoSuchDisk("the root file system is on no disk", hint="this machine did not boot from an image of ours")
    return read_disk(node, devices)


def read_disk(node: Path, devices: Path = Path("/dev")) -> Disk:
    """A disk from its folder in sysfs; the labels are its table's."""
    device = devices / node.name.replace("!", "/")
    labels = _labels(device)
    partitions = []
    for each in sorted(node.glob(f"{node.name}*/partition")):
        folder = each.parent
        partitions.append(
            Partition(
                device=devices / folder.name.replace("!", "/"),
                label=labels.get(int(each.read_text()), ""),
                start=int((folder / "start").read_text()) * 512,
                size=int((folder / "size").read_text()) * 512,
            )
        )
    return Disk(
        device=device,
        size=int((node / "size").read_text()) * 512,
        removable=(node / "removable").read_text().strip() == "1",
        partitions=tuple(partitions),
        sector_bytes=int((node / "queue/logical_block_size").read_text()),
    )


def _table(device: Path) -> gpt.Table:
    with device.open("rb") as disk:

        def read(offset: int, size: int) -> bytes:
            disk.seek(offset)
            return disk.read(size)

        return gpt.read(read)


def _labels(device: Path) -> dict[int, str]:
    # Not from the kernel: it knows no label of a partition that was added while it ran.
    try:
        return {each.number: each.label for each in _table(device).partitions}
    except (OSError, gpt.NoTable):
        return {}


def needed_bytes(definitions: Sequence[Path]) -> int:
    """What partitions that systemd-repart would add need at least: those of the other slot and /var.

    The slots are told by their label, `_empty`; the image brought the partitions without one.
    """
    # Only the first boot gets here, and every boot waits for this module.
    import configparser

    total = 0
    for path in sorted(file for folder in definitions for file in folder.glob("*.conf")):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(path)
        section = parser["Partition"]
        if section.get("Label") in ("_empty", "var"):
            match = re.fullmatch(r"(\d+)([KMGT]?)", section["SizeMinBytes"])
            assert match, path
            total += int(match[1]) * _UNITS[match[2]] + HEAD_BYTES
    return total


def partition(
    disk: Disk,
    definitions: Sequence[Path],
    options: Sequence[str] = (),
    before_commit: Callable[[Path], None] = lambda device: None,
) -> None:
    """Add what `definitions` say, durably and in an order that survives a power cut. The kernel knows the result.

    `before_commit` gets a device that is the new /var, complete but not in any table yet.

    Raises:
        DiskTooSmall: not enough space behind the last partition.
        DiskFailed: the disk refused, or `before_commit` did; nothing was changed then. The text is the tool's.
    """
    if (needed := needed_bytes(definitions)) > disk.free_bytes:
        raise DiskTooSmall(
            f"{disk.device} is too small: {needed / 2**20:,.0f} MiB more are needed behind the image, "
            f"and {max(disk.free_bytes, 0) / 2**20:,.0f} MiB are free",
            hint="use a larger disk",
        )
    with _stand_in(disk) as (device, head):
        chosen = [f"--definitions={each}" for each in definitions]
        done = run(
            ["systemd-repart", "--dry-run=no", "--empty=refuse", "--no-pager", "--pretty=no", *chosen, *options, device]
        )
        if done.returncode != 0:
            raise DiskFailed(f"partitioning {disk.device}: {last_line(done.stderr)}")
        former = _own_identity(device)
        new = next(each for each in _table(device).partitions if each.label == "var")
        place = [f"--offset={new.start}", f"--sizelimit={new.size}"]
        with _loop(device, place, disk.sector_bytes) as var:
            before_commit(var)
    _commit(disk, head)
    tell = run(["partx", "--update", disk.device])
    if tell.returncode != 0:
        raise DiskFailed(f"the kernel does not take the new table of {disk.device}: {last_line(tell.stderr)}")
    run(["udevadm", "settle", "--timeout=30"])
    # The boot loader has told the former id, and until the next boot it is looked for.
    for each in former:
        link = Path("/dev/disk/by-partuuid") / str(each.uuid)
        if not link.is_symlink():
            link.symlink_to(next(part.device for part in disk.partitions if part.start == each.start))


def _own_identity(device: Path) -> tuple[gpt.Partition, ...]:
    """A new id for the disk and its boot partition, which until now are those of everybody who has this image.

    The boot loader says by that id which partition it came from. With the same one on a stick beside the disk, the root
    of either could be taken. The root's own ids stay: they are halves of its verity hash.

    Returns:
        The boot partitions as they were.
    """
    sfdisk = ("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel")
    _must([*sfdisk, "--disk-id", device, str(uuid.uuid4())])
    former = _table(device).of_type(gpt.ESP)
    for each in former:
        _must([*sfdisk, "--part-uuid", device, str(each.number), str(uuid.uuid4())])
    return former


def repair_table(disk: Disk) -> bool:
    """Whether the primary table was torn and is now written again from the backup, which the kernel went by.

    Raises:
        OSError: the disk cannot be read.
    """
    try:
        _table(disk.device)
        return False
    except gpt.NoTable:
        pass
    command: list[str | Path] = ["sfdisk", "--no-reread", "--no-tell-kernel", "--relocate", "gpt-bak-std", disk.device]
    return run(command).returncode == 0


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _must(command: Sequence[str | Path]) -> str:
    done = run(command)
    if done.returncode != 0:
        raise DiskFailed(f"{command[0]}: {last_line(done.stderr)}")
    return done.stdout.strip()


@contextmanager
def _loop(backing: Path, options: Sequence[str], sector_bytes: int) -> Iterator[Path]:
    """A loop device over `backing`, flushed at the end."""
    sectors = f"--sector-size={sector_bytes}"
    device = Path(_must(["losetup", "--find", "--show", sectors, *options, backing]))
    try:
        yield device
        _must(["blockdev", "--flushbufs", device])
    finally:
        run(["udevadm", "settle", "--timeout=30"])
        run(["losetup", "--detach", device])


@contextmanager
def _stand_in(disk: Disk) -> Iterator[tuple[Path, Path]]:
    """The device to partition, and the file that holds its first MiB. Everything else is the disk itself."""
    name = f"ai-assistant-disk-{os.urandom(4).hex()}"
    head = Path("/run") / f"{name}.head"
    with disk.device.open("rb") as device:
        head.write_bytes(device.read(HEAD_BYTES))
    sectors, first = disk.size // 512, HEAD_BYTES // 512
    # Through a loop device, because device-mapper cannot claim a disk whose partitions are mounted.
    with (
        _loop(head, [], disk.sector_bytes) as small,
        _loop(disk.device, ["--direct-io=on"], disk.sector_bytes) as large,
    ):
        table = f"0 {first} linear {small} 0\n{first} {sectors - first} linear {large} {first}\n"
        done = run(["dmsetup", "create", name], input=table)
        if done.returncode != 0:
            raise DiskFailed(f"dmsetup: {last_line(done.stderr)}")
        try:
            yield Path("/dev/mapper") / name, head
            _must(["blockdev", "--flushbufs", Path("/dev/mapper") / name])
        finally:
            run(["udevadm", "settle", "--timeout=30"])
            run(["dmsetup", "remove", "--retry", name])
    _flush(disk.device)


def _flush(device: Path) -> None:
    descriptor = os.open(device, os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise DiskFailed(f"{device}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _commit(disk: Disk, head: Path) -> None:
    """The primary table, after everything else is on the disk."""
    table = head.read_bytes()[:_TABLE_BYTES]
    descriptor = os.open(disk.device, os.O_RDWR)
    try:
        os.pwrite(descriptor, table, 0)
        os.fsync(descriptor)
    except OSError as error:
        raise DiskFailed(f"{disk.device}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    head.unlink()
