"""Reading what the kernel says about hardware, without ever believing it or failing because of it.

Everything here answers "unknown" (empty text, None, an empty list) where a file is missing, is not readable, is binary,
never ends, went away since it was listed, or is a loop of links: detection reports what is left.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import pyudev
except ImportError:  # a plain virtual environment: sysfs is read without udev's database
    pyudev = None

MAX_BYTES = 256 * 1024
MAX_TEXT = 4096
MAX_ENTRIES = 4096
MAX_CPUS = 8192


class Sysfs:
    """The hardware of a machine, below `root`: its /sys, /proc, /dev and /lib.

    With root "/" devices are listed by udev (pyudev), where that is installed, otherwise from the folders of sysfs.
    """

    def __init__(self, root: Path = Path("/"), *, firmware: tuple[Path, ...] | None = None) -> None:
        self.root = Path(root)
        self._own_firmware = firmware
        self._real = os.path.realpath(self.root)
        self._udev = None
        if pyudev is not None and self._real == "/":
            with contextlib.suppress(Exception):  # no libudev: as without pyudev
                self._udev = pyudev.Context()

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*(part.lstrip("/") for part in parts))

    def devices(self, subsystem: str) -> list[Path]:
        """The folders of a subsystem's devices, sorted by name, each once."""
        found: dict[str, Path] = {}
        for path in [*self._listed(subsystem), *self._linked(subsystem)]:
            found.setdefault(str(path), path)
        return sorted(found.values(), key=lambda path: natural(path.name))[:MAX_ENTRIES]

    def _listed(self, subsystem: str) -> Iterator[Path]:
        if self._udev is None:
            return
        try:
            for device in self._udev.list_devices(subsystem=subsystem):
                yield Path(device.sys_path)
        except (OSError, ValueError, RuntimeError):
            return

    def _linked(self, subsystem: str) -> Iterator[Path]:
        for folder in (self.path("sys/bus", subsystem, "devices"), self.path("sys/class", subsystem)):
            for name in names(folder):
                if (real := self.real(folder / name)) is not None:
                    yield real

    def real(self, path: Path) -> Path | None:
        """Where a link of sysfs leads; None when that is nothing, or outside of this machine's /sys."""
        try:
            target = Path(os.path.realpath(path))
            inside = target.is_relative_to(os.path.join(self._real, "sys"))  # noqa: PTH118
            if not inside or not target.is_dir():
                return None
            return self.root / target.relative_to(self._real)
        except (OSError, ValueError, RuntimeError):
            return None

    def udev(self, device: Path) -> Mapping[str, str]:
        """What udev's rules and its hardware database found out about a device; empty where there is no udev."""
        if self._udev is None:
            return {}
        try:
            found = pyudev.Devices.from_sys_path(self._udev, str(device))
            return {clean(key): clean(value) for key, value in found.properties.items()}
        except (OSError, ValueError, RuntimeError, KeyError, pyudev.DeviceNotFoundError):
            return {}

    def node(self, device: Path, folder: str = "") -> str:
        """The device node as a path that programs use, "/dev/…"; empty when the device has none."""
        name = uevent(device).get("DEVNAME", "")
        if not name and (device / "dev").exists():
            name = f"{folder}/{device.name}"
        name = name.removeprefix("/dev/").lstrip("/")
        return f"/dev/{name}" if name and ".." not in name.split("/") else ""

    def has_firmware(self, name: str) -> bool:
        """Whether a firmware file is installed, compressed or not; for a name that ends in "/", any file in it."""
        for folder in self._firmware_folders():
            if name.endswith("/"):
                if names(folder / name):
                    return True
            elif any((folder / f"{name}{end}").is_file() for end in ("", ".zst", ".xz")):
                return True
        return False

    def _firmware_folders(self) -> list[Path]:
        if self._own_firmware is not None:
            return list(self._own_firmware)
        folders = ["lib/firmware/updates", "lib/firmware", "usr/lib/firmware"]
        if extra := text(self.path("sys/module/firmware_class/parameters/path")):
            folders.insert(0, extra)
        return [self.path(folder) for folder in folders]

    def has_module(self, module: str) -> bool:
        """Whether a driver is loaded or built in."""
        return any(self.path("sys/module", name).is_dir() for name in {module, module.replace("-", "_")})

    def kernel(self) -> str:
        """The kernel's release, as in "6.12.41+deb13-amd64"; empty when it is not known."""
        release = text(self.path("proc/sys/kernel/osrelease"))
        return release if re.fullmatch(r"[\w.+~-]{1,128}", release) else ""


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts accel2 before accel10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+|[0-9]+", name)
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def raw(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file's beginning, at most `limit` bytes. Pipes and devices that have nothing to say do not hold it up."""
    data = b""
    try:
        # Not blocking: somebody's named pipe must not stop detection.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        return b""
    try:
        while len(data) < limit and (part := os.read(handle, limit - len(data))):
            data += part
    except OSError:
        pass  # what came until then counts
    finally:
        os.close(handle)
    return data


def clean(value: str) -> str:
    """Text without anything that a terminal or the bus could not take."""
    visible = "".join(c if c.isprintable() else " " for c in value[:MAX_TEXT])
    # What surrogateescape made of wrong bytes cannot be encoded again.
    return visible.encode("utf-8", "replace").decode().strip()


def text(path: Path) -> str:
    return clean(raw(path, MAX_TEXT).decode("utf-8", "replace"))


def lines(path: Path, limit: int = MAX_BYTES) -> list[str]:
    return raw(path, limit).decode("utf-8", "replace").splitlines()


def number(path: Path) -> int | None:
    return integer(text(path))


def integer(value: str) -> int | None:
    """A whole number that fits 64 bits, decimal or 0x…, None for anything else."""
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]{1,16}|[0-9]{1,19})", value):
        return None
    found = int(value, 16) if "x" in value else int(value)
    return found if -(1 << 63) <= found < 1 << 63 else None


def names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
    except (OSError, ValueError):
        return []
    return sorted(found, key=natural)


def link(path: Path) -> str:
    """The last part of where a link leads, as of `driver` or `subsystem`; empty when there is none."""
    try:
        return clean(path.readlink().name)
    except (OSError, ValueError):
        return ""


def uevent(device: Path) -> dict[str, str]:
    found = {}
    for line in lines(device / "uevent", 16 * 1024):
        key, equals, value = line.partition("=")
        if equals:
            found[clean(key)] = clean(value)
    return found


def driver(device: Path) -> str:
    return link(device / "driver") or uevent(device).get("DRIVER", "")


def cpus(value: str) -> list[int]:
    """The kernel's list of processors, "0-3,8", as numbers; what is wrong in it is left out."""
    found: set[int] = set()
    for part in value.split(",")[:MAX_CPUS]:
        first, dash, last = part.strip().partition("-")
        start, end = integer(first), integer(last if dash else first)
        if start is not None and end is not None and 0 <= start <= end < MAX_CPUS:
            found.update(range(start, end + 1))
    return sorted(found)
