"""ids.toml as values: what is known about devices by their ids, and about their drivers.

The file is ours and is checked whole when it is read: a mistake in it is a defect, and a test reads it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from ai_assistant.hal.device import DeviceKind, Source, Throughput


@dataclass(frozen=True, slots=True)
class Driver:
    """A kernel driver, or a library that drives a device from outside of the kernel.

    Args:
        node: the folder of a device in sysfs that holds its nodes: "drm", "accel", "apex" …
        module: its kernel module; empty: no kernel driver is needed.
        since: the first mainline kernel that has it, or empty: it never was in one.
        firmware: any one of these lets it work; a name with "/" at its end stands for a folder.
        package: the Debian package with that firmware, or empty: Debian has none.
        source: where the driver comes from when the kernel does not have it; a phrase after "install".
        group: who may open the nodes.
        exclusive: one program at a time can open a node.
    """

    name: str
    node: str
    module: str
    since: str = ""
    firmware: tuple[str, ...] = ()
    package: str = ""
    source: str = ""
    group: str = "render"
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about a device by its id.

    Args:
        kind: empty where its class says it.
        driver: the name of a `Driver`.
        firmware: what this very device needs, in place of the driver's.
        revisions: what it needs instead by its PCI revision, as in "0x11", where the driver chooses by that.
        package: of that firmware, where it is not the driver's.
    """

    name: str
    kind: DeviceKind | None
    driver: str
    firmware: tuple[str, ...] = ()
    revisions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    package: str = ""
    figures: tuple[Throughput, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Args:
    devices: by bus and id: ("pci", "8086:7d1d"), ("usb", "1a6e:089a"), ("of", "rockchip,rk3588-rknn-core").
    cores: names of ARM cores by "implementer:part", as in "0x41:0xd0b".
    chips: names of systems on a chip by their device tree's `compatible`.
    """

    vendors: Mapping[str, str]
    drivers: Mapping[str, Driver]
    devices: Mapping[tuple[str, str], Known]
    cores: Mapping[str, str]
    chips: Mapping[str, str]

    def pci(self, vendor: str, product: str) -> Known | None:
        return self.devices.get(("pci", f"{vendor}:{product}"))

    def usb(self, vendor: str, product: str) -> Known | None:
        return self.devices.get(("usb", f"{vendor}:{product}"))

    def compatible(self, names: list[str]) -> Known | None:
        return next((self.devices["of", name] for name in names if ("of", name) in self.devices), None)


@cache
def table() -> Table:
    data = tomllib.loads(resources.files(__package__).joinpath("ids.toml").read_text("utf-8"))
    return parse(data)


def parse(data: Mapping[str, Any]) -> Table:
    """Raises ValueError, naming the row that is wrong."""
    drivers = {}
    for name, row in data["driver"].items():
        row = {"node": "", "module": name, **row, "firmware": tuple(row.get("firmware", ()))}
        drivers[name] = _build(Driver, {"name": name, **row}, name)
    devices: dict[tuple[str, str], Known] = {}
    for row in data["device"]:
        row = dict(row)
        bus, ids = row.pop("bus"), row.pop("ids")
        if row["driver"] not in drivers:
            raise ValueError(f"{row['name']}: there is no driver {row['driver']}")
        row["kind"] = DeviceKind(row["kind"]) if "kind" in row else None
        row["firmware"] = tuple(row.get("firmware", ()))
        row["revisions"] = {key: tuple(names) for key, names in row.get("revisions", {}).items()}
        row["figures"] = tuple(
            Throughput.from_dict({"source": Source.DATASHEET, **figure}) for figure in row.get("figures", ())
        )
        known = _build(Known, row, row["name"])
        for one in ids:
            if (bus, one) in devices:
                raise ValueError(f"{one} is there twice")
            devices[bus, one] = known
    return Table(data["vendor"], drivers, devices, data["core"], data["chip"])


def _build(kind: type[Any], row: Mapping[str, Any], name: str) -> Any:
    try:
        return kind(**row)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
