"""A machine's /sys, /proc and /dev in a folder; its disks are sparse files."""

from __future__ import annotations

from pathlib import Path

from ai_assistant.provisioning import gpt
from ai_assistant.provisioning.disks import Machine


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        for each in ("sys/class/block", "sys/dev/block", "proc/1", "proc/self", "dev/mapper", "dev/disk/by-id"):
            (root / each).mkdir(parents=True)
        self._mounts: list[str] = []
        self._minor = 0
        self.command_line("quiet")

    @property
    def machine(self) -> Machine:
        return Machine(self.root)

    def command_line(self, text: str) -> None:
        (self.root / "proc/cmdline").write_text(text + "\n")

    def device(self, name: str, size: int, place: str, **attributes: str) -> Path:
        """A block device; `place` is its folder below /sys/devices, attributes are its files there."""
        folder = self.root / "sys/devices" / place / name
        folder.mkdir(parents=True)
        self._minor += 1
        number = f"250:{self._minor}"
        for each, text in {
            "size": str(size // 512),
            "dev": number,
            "ro": "0",
            "removable": "0",
            "queue__logical_block_size": "512",
            **attributes,
        }.items():
            file = folder / each.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        (folder / "holders").mkdir(exist_ok=True)
        (folder / "slaves").mkdir(exist_ok=True)
        (self.root / "sys/class/block" / name).symlink_to(folder)
        (self.root / "sys/dev/block" / number).symlink_to(folder)
        node = self.root / "dev" / name
        node.touch()
        return node

    def disk(self, name: str, size: int = 64 << 20, *, place: str = "pci0/ata1/block", **attributes: str) -> Path:
        node = self.device(name, size, place, **attributes)
        with node.open("r+b") as file:
            file.truncate(size)
        return node

    def partition(self, disk: str, number: int, size: int = 1 << 20) -> str:
        name = f"{disk}{'p' if disk[-1].isdigit() else ''}{number}"
        place = (self.root / "sys/class/block" / disk).resolve().relative_to(self.root / "sys/devices")
        self.device(name, size, str(place), partition=str(number))
        return name

    def volume(self, name: str, label: str, *parts: str, size: int = 1 << 20) -> str:
        """A volume that stands on others; of device-mapper's when it has a label."""
        self.device(name, size, "virtual/block", **({"dm__name": label} if label else {}))
        if label:
            (self.root / "dev/mapper" / label).symlink_to(f"../{name}")
        for each in parts:
            (self.root / "sys/class/block" / each).resolve().joinpath("holders", name).touch()
            (self.root / "sys/class/block" / name).resolve().joinpath("slaves", each).touch()
        return name

    def loop(self, name: str, backing: Path | str) -> str:
        self.device(name, 1 << 20, "virtual/block", loop__backing_file=str(backing))
        return name

    def mount(self, name: str, point: str, *, number: str = "", process: str = "self") -> None:
        number = number or (self.root / "sys/class/block" / name / "dev").read_text().strip()
        line = f"36 35 {number} / {point} rw,noatime shared:1 - ext4 /dev/{name} rw\n"
        with (self.root / "proc" / process / "mountinfo").open("a") as file:
            file.write(line)

    def swap(self, name: str) -> None:
        (self.root / "proc/swaps").write_text(f"Filename\tType\tSize\tUsed\tPriority\n/dev/{name} partition 9 0 -2\n")

    def link(self, name: str, to: str) -> Path:
        path = self.root / "dev/disk/by-id" / name
        path.symlink_to(f"../../{to}")
        return path

    def appliance(self, image: Path, disk: str = "sda") -> gpt.Table:
        """Run from an image on a USB stick: the disk, its partitions, and the verity volume below /."""
        content = image.read_bytes()
        found = gpt.read(lambda offset, size: content[offset : offset + size])
        usb = "pci0/usb2/2-1/2-1:1.0/host0/block"
        (self.root / "sys/devices/pci0/usb2/2-1").mkdir(parents=True, exist_ok=True)
        for file, text in {"idVendor": "0781", "serial": "4C530001"}.items():
            (self.root / "sys/devices/pci0/usb2/2-1" / file).write_text(text + "\n")
        node = self.disk(disk, len(content), place=usb, removable="1", device__vendor="SanDisk", device__model="Ultra")
        node.write_bytes(content)
        names = []
        for each in found.partitions:
            names.append(self.partition(disk, each.number, each.size))
            (self.root / "dev" / names[-1]).write_bytes(content[each.start : each.end])
        volume = self.volume("dm-0", "root", *names[1:3])
        self.mount(volume, "/")
        root, tree = found.of_type(gpt.ROOT)[0], found.of_type(gpt.ROOT_VERITY)[0]
        self.command_line(f"quiet roothash={root.uuid.hex}{tree.uuid.hex} panic=30")
        return found
