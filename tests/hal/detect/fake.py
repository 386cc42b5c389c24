"""A machine's sysfs in a temporary folder, with links as the kernel makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class FakeMachine:
    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("sys/bus", "sys/class", "sys/devices", "sys/module", "proc/sys/kernel", "dev", "lib/firmware"):
            (root / folder).mkdir(parents=True)
        self.write("proc/sys/kernel/osrelease", "6.12.41+deb13-amd64\n")
        self.write("proc/meminfo", "MemTotal:       16000000 kB\nMemFree: 1 kB\n")

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def link(self, name: str, target: str) -> None:
        """A relative link, both below the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.root / target).mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(self.root / target, path.parent))

    def device(self, path: str, subsystem: str, *, bus: bool = True, driver: str = "", **files: str) -> Path:
        """A device in sys/devices, listed by its bus or class; `files` become its attributes."""
        where = f"sys/devices/{path}"
        folder = self.root / where
        folder.mkdir(parents=True, exist_ok=True)
        name = folder.name
        place = f"sys/bus/{subsystem}" if bus else f"sys/class/{subsystem}"
        self.link(f"{place}/devices/{name}" if bus else f"{place}/{name}", where)
        self.link(f"{where}/subsystem", place)
        if driver:
            self.link(f"{where}/driver", f"sys/bus/{subsystem}/drivers/{driver}")
            self.module(driver)
        for key, value in files.items():
            self.write(f"{where}/{key}", f"{value}\n")
        return folder

    def pci(self, address: str, ids: str, kind: str, *, driver: str = "", **files: str) -> Path:
        vendor, product = ids.split(":")
        known: dict[str, Any] = {"vendor": f"0x{vendor}", "device": f"0x{product}", "class": kind, **files}
        return self.device(f"pci0000:00/{address}", "pci", driver=driver, **known)

    def node(self, parent: Path, subsystem: str, name: str, node: str) -> None:
        """A device node with its entry in sysfs, below its device."""
        path = parent.relative_to(self.root / "sys/devices")
        self.device(f"{path}/{subsystem}/{name}", subsystem, bus=False, dev="226:0", uevent=f"DEVNAME={node}")
        self.write(f"dev/{node}", "")

    def module(self, name: str) -> None:
        (self.root / "sys/module" / name.replace("-", "_")).mkdir(parents=True, exist_ok=True)

    def aliases(self, *lines: str) -> None:
        text = "".join(f"alias {line}\n" for line in lines)
        self.write("lib/modules/6.12.41+deb13-amd64/modules.alias", text)
