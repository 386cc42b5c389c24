"""Find disks, say what they are, and what speaks against writing to them.

All knowledge is the kernel's, from /sys and /proc: it is the same with or without udev, and a test has a tree
of its own in its place.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import NotAuthorized
from ai_assistant.provisioning.errors import DiskFailed, DiskInUse, DiskTooSmall, NoSuchDisk, NotADisk

# What lies there makes a disk the system's.
SYSTEM = ("/", "/usr", "/boot", "/boot/efi", "/efi", "/var", "/etc")
# Whole block devices that are no disks, and the hardware partitions of a memory card.
_VIRTUAL = re.compile(r"(dm-|md|loop|ram|zram|sr|fd|nbd|mtdblock|bcache)\d|mmcblk\d+(boot\d|rpmb)")
_SECTOR = 512  # the kernel's unit in /sys, whatever the device's own sectors are


@dataclass(frozen=True, slots=True)
class Disk:
    """`uses` says what holds it, one phrase each; `system` lists the folders of the running system on it."""

    path: Path
    name: str
    size_bytes: int
    sector_bytes: int = 512
    model: str = ""
    serial: str = ""
    transport: str = ""
    removable: bool = False
    read_only: bool = False
    uses: tuple[str, ...] = ()
    system: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """As in: 62.0 GB SanDisk Ultra (usb, serial 4C53)."""
        about = ", ".join(each for each in (self.transport, self.serial and f"serial {self.serial}") if each)
        return " ".join(
            each for each in (f"{self.size_bytes / 1e9:.1f} GB", self.model, about and f"({about})") if each
        )

    def reasons(self, least_bytes: int = 0) -> list[str]:
        """Why it cannot be written to; empty when it can."""
        found = [f"this system runs from it: {', '.join(self.system)}"] if self.system else []
        found += [] if self.system else list(self.uses)
        if self.read_only:
            found.append("it is write-protected")
        if self.size_bytes < least_bytes:
            found.append(f"it is too small: {self.size_bytes / 1e9:.1f} GB, and {least_bytes / 1e9:.1f} GB are needed")
        return found

    def refuse(self, least_bytes: int = 0, *, force: bool = False, hint: str = "") -> None:
        """Raise for the first reason; `force` overrides that it is in use.

        Raises:
            DiskFailed, DiskInUse, DiskTooSmall
        """
        if self.read_only:
            raise DiskFailed(f"{self.path} is write-protected", hint="a memory card or stick may have a switch for it")
        if self.size_bytes < least_bytes:
            raise DiskTooSmall(
                f"{self.path} is too small: it has {self.size_bytes:,} bytes, and {least_bytes:,} are needed",
                hint="use a larger disk",
            )
        if force:
            return
        uses = "; ".join(self.uses)
        if self.system:
            raise DiskInUse(
                f"{self.path} is the disk that this system runs from ({', '.join(self.system)}): {uses}",
                hint="give another disk; lsblk shows them all",
            )
        if self.uses:
            raise DiskInUse(f"{self.path} is in use: {uses}", hint=hint or "unmount it first, as in: umount /dev/sdX1")


@dataclass(frozen=True, slots=True)
class _Mount:
    device: str  # the kernel's name, as in sdb1; empty when nothing of /sys is behind it
    point: str


class Machine:
    """The kernel's view of the block devices below `root`, which only tests set."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.sys = root / "sys"
        self.proc = root / "proc"
        self.dev = root / "dev"

    def disk(self, path: Path | str) -> Disk:
        """What stands at a path: a whole disk, or a regular file that serves as one.

        Raises:
            NoSuchDisk, NotADisk, NotAuthorized
        """
        path = Path(path)
        try:
            found = path.resolve(strict=True)
            status = found.stat()
        except PermissionError as error:
            raise NotAuthorized(f"{path} may not be looked at: {error.strerror}", hint="run it as root") from error
        except (OSError, RuntimeError, ValueError) as error:
            hint = "a stick that was just plugged in needs a moment; lsblk shows what is there"
            raise NoSuchDisk(f"there is no {path}", hint=hint) from error
        name = self._name(found)
        if name is None and stat.S_ISREG(status.st_mode):
            return self._file(path, found, status.st_size)
        if name is None:
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no block device"
            raise NotADisk(f"{path} is {kind}, not a disk", hint="a disk is like /dev/sdb or /dev/nvme0n1")
        if (self._block(name) / "partition").exists():
            disk = self.node(self.disk_of(name))
            raise NotADisk(f"{path} is a partition of {disk}, not a disk", hint=f"give the whole disk: {disk}")
        if re.match(r"(dm-|md)\d", name):
            raise NotADisk(f"{path} is a volume, not a disk", hint="give a whole disk, like /dev/sdb or /dev/nvme0n1")
        return self._disk(name)

    def disks(self) -> list[Disk]:
        """Every disk of the machine, in the order of their names, whether or not it can be written to."""
        base = self.sys / "class/block"
        names = sorted(each.name for each in base.iterdir()) if base.is_dir() else []
        whole = [each for each in names if not _VIRTUAL.match(each) and not (self._block(each) / "partition").exists()]
        return [disk for disk in map(self._disk, whole) if disk.size_bytes]

    # How devices hang together.

    def node(self, name: str) -> Path:
        """The device node of a kernel's name."""
        return self.dev / name.replace("!", "/")

    def disk_of(self, name: str) -> str:
        """The disk of a partition; any other device is its own."""
        place = self._block(name)
        return place.parent.name if (place / "partition").exists() else name

    def partitions(self, disk: str) -> dict[int, str]:
        """A disk's partitions by number."""
        found = {}
        for each in sorted(self._block(disk).glob("*/partition")):
            found[int(each.read_text())] = each.parent.name
        return found

    def slaves(self, name: str) -> list[str]:
        """What a volume is made of, one level below."""
        place = self._block(name) / "slaves"
        return sorted(each.name for each in place.iterdir()) if place.is_dir() else []

    def below(self, name: str) -> set[str]:
        """The disks that a device finally stands on: through volumes, and files that serve as disks."""
        disk = self.disk_of(name)
        parts = self.slaves(name) or self.slaves(disk)
        backing = _text(self._block(disk) / "loop/backing_file")
        if backing:
            parts = [each for each in [self._name(Path(backing)) or self.holding(Path(backing))] if each]
        return set().union(*map(self.below, parts)) if parts else {disk}

    def holding(self, path: Path) -> str:
        """The device whose file system a file lies on; empty when it is none of /sys."""
        best = _Mount("", "")
        for each in self._mounts():
            inside = path == Path(each.point) or Path(each.point) in path.parents
            if inside and len(each.point) >= len(best.point):
                best = each
        return best.device

    def mounted_at(self, point: str) -> str:
        """The device that is mounted there, the topmost; empty when it is none of /sys."""
        return next((each.device for each in reversed(list(self._mounts())) if each.point == point), "")

    # The parts of a description.

    def _disk(self, name: str) -> Disk:
        place = self._block(name)
        device = place / "device"
        usb = next((each for each in place.parents if (each / "idVendor").exists()), None)
        vendor, model = _text(device / "vendor"), _text(device / "model") or _text(device / "name")
        if vendor.startswith("0x"):  # a virtual device's vendor is a number
            vendor = ""
        serial = _text(place / "serial") or _text(device / "serial") or (_text(usb / "serial") if usb else "")
        sectors = int(_text(place / "size") or 0)
        return Disk(
            path=self.node(name),
            name=name,
            size_bytes=sectors * _SECTOR,
            sector_bytes=int(_text(place / "queue/logical_block_size") or 512),
            model=" ".join(f"{'' if vendor == 'ATA' else vendor} {model}".split()),
            serial=serial or _serial_page(device / "vpd_pg80"),
            transport=_transport(name, place, usb is not None),
            removable=_text(place / "removable") == "1",
            read_only=_text(place / "ro") == "1",
            uses=tuple(dict.fromkeys(self._uses(name))),
            system=tuple(dict.fromkeys(self._system(name))),
        )

    def _file(self, path: Path, found: Path, size: int) -> Disk:
        uses = []
        for each in sorted((self.sys / "class/block").glob("loop*/loop/backing_file")):
            if _text(each) == str(found):
                uses.append(f"it is attached to {self.node(each.parent.parent.name)}")
        return Disk(path=path, name=path.name, size_bytes=size, transport="file", uses=tuple(uses))

    def _uses(self, name: str, owner: str = "") -> Iterator[str]:
        # A partition or volume first says what is mounted, then who stands on it.
        node = f"{owner or self.node(name)}"
        for mount in self._mounts():
            if mount.device == name:
                yield f"{node} is mounted on {mount.point}"
        if name in self._swaps():
            yield f"{node} is swap space"
        for each in sorted((self.sys / "class/block").glob("loop*/loop/backing_file")):
            if self._name(Path(_text(each))) == name:
                loop = each.parent.parent.name
                yield from list(self._uses(loop)) or [f"{node} is attached to {self.node(loop)}"]
        holders = self._block(name) / "holders"
        for holder in sorted(each.name for each in holders.iterdir()) if holders.is_dir() else ():
            label = _text(self._block(holder) / "dm/name")
            volume = f"/dev/mapper/{label}" if label else str(self.node(holder))
            above = list(self._uses(holder, volume))
            yield from above or [f"{node} is part of {volume}"]
        for part in self.partitions(name).values():
            yield from self._uses(part)

    def _system(self, name: str) -> Iterator[str]:
        for mount in self._mounts():
            if mount.point in SYSTEM and mount.device and name in self.below(mount.device):
                yield mount.point

    def _mounts(self) -> Iterator[_Mount]:
        # Those of the first process too: what runs in a mount namespace of its own does not see the machine's.
        seen = set()
        for process in ("1", "self"):
            for line in _text(self.proc / process / "mountinfo").splitlines():
                fields, _, source = line.partition(" - ")
                number, point = fields.split()[2], _unescaped(fields.split()[4])
                # Btrfs and the like show a number of their own, but name the device.
                name = self._by_number(number) or self._name(Path(_unescaped(source.split()[1])))
                if (name, point) not in seen:
                    seen.add((name, point))
                    yield _Mount(name or "", point)

    def _swaps(self) -> set[str]:
        rows = _text(self.proc / "swaps").splitlines()[1:]
        return {name for row in rows if row.split() and (name := self._name(Path(_unescaped(row.split()[0]))))}

    def _by_number(self, number: str) -> str | None:
        place = self.sys / "dev/block" / number
        return place.resolve().name if place.exists() else None

    def _name(self, path: Path) -> str | None:
        """The kernel's name of a device node, through links such as /dev/disk/by-id."""
        if not path.is_absolute():
            return None
        if path.parts[:2] == ("/", "dev") and self.dev != Path("/dev"):
            path = self.dev / path.relative_to("/dev")  # what a fake kernel says is about the fake machine
        try:
            found = path.resolve()
            status = found.stat()
        except (OSError, RuntimeError):
            return None
        if stat.S_ISBLK(status.st_mode):
            return self._by_number(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
        if not found.is_relative_to(self.dev.resolve()):
            return None
        name = str(found.relative_to(self.dev.resolve())).replace("/", "!")
        return name if self._block(name).exists() and name != "." else None

    def _block(self, name: str) -> Path:
        return (self.sys / "class/block" / name).resolve()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _serial_page(path: Path) -> str:
    """A SCSI disk's "unit serial number" page: four bytes of header, then text."""
    try:
        text = path.read_bytes()[4:].decode("ascii", "replace").strip("\0 ")
    except OSError:
        return ""
    return text if text.isprintable() else ""


def _transport(name: str, place: Path, usb: bool) -> str:
    if usb:
        return "usb"
    parts = set(place.parts)
    for start, transport in (("nvme", "nvme"), ("mmcblk", "mmc"), ("loop", "loop")):
        if name.startswith(start):
            return transport
    if any(part.startswith("ata") and part[3:].isdigit() for part in parts):
        return "sata"
    return "virtio" if any(part.startswith("virtio") for part in parts) else ""
