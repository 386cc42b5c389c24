"""Mini-PCs as umockdev shows them to detection: written down from public sources, not recorded on the machines.

A machine is a TOML file beside this one (README.md says what may be in it). Every block of it names where its facts can
be read. From it come the text that umockdev-run loads, and the files beside /sys that detection reads.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

BLOCKS = {
    "": {"name", "form", "note", "os", "device", "file", "cpu", "firmware", "module", "log", "expect", "broken"},
    "os": {"release", "groups", "source"},
    "device": {"path", "subsystem", "driver", "node", "attributes", "properties", "source"},
    "node": {"name", "dev", "group", "mode"},
    "file": {"path", "text", "source"},
    "cpu": {"threads", "online", "class", "shared", "source"},
    "class": {"cpus", "info", "max_khz", "siblings", "caches", "source"},
    "shared": {"cache", "cpus", "source"},
    "firmware": {"names", "source"},
    "module": {"names", "source"},
    "log": {"lines", "source"},
    "expect": {"kind", "address", "name", "vendor", "id", "driver", "state", "nodes", "hint", "attributes"},
    "broken": {"name", "what", "os", "change", "device", "remove", "firmware", "module", "log", "expect", "source"},
    "change": {"path", "driver", "attributes", "drop"},
}
SOURCED = {"os", "device", "file", "cpu", "firmware", "module", "log", "broken"}


@dataclass(frozen=True, slots=True)
class Node:
    """A file in /dev: its name below it, "major:minor", and who may open it."""

    name: str
    dev: str
    group: str = "root"
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class Device:
    """One device of sysfs. `driver` is empty where none is bound."""

    path: str
    subsystem: str
    driver: str
    node: Node | None
    attributes: Mapping[str, str]
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Machine:
    """One state of one machine.

    Args:
        variant: "works", or the name of what is broken.
        release: of the kernel.
        groups: of the user who detects.
        files: by absolute path, what lies there besides the devices.
        firmware: names of files below /lib/firmware.
        modules: drivers that are loaded.
        log: lines of the kernel.
        expect: what detection has to find, by kind and address.
    """

    name: str
    variant: str
    release: str
    groups: tuple[str, ...]
    devices: tuple[Device, ...]
    files: Mapping[str, str]
    firmware: tuple[str, ...]
    modules: tuple[str, ...]
    log: tuple[str, ...]
    expect: Mapping[tuple[str, str], Mapping[str, Any]]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(device.node for device in self.devices if device.node)

    def umockdev(self) -> str:
        """The devices in the form that `umockdev-run --device` reads."""
        return "\n".join(_paragraph(device) for device in self.devices)


def files() -> list[Path]:
    return sorted(FOLDER.glob("*.toml"))


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError: a block has a key that nobody reads."""
    data = tomllib.loads(path.read_text("utf-8"))
    _check(path.name, "", data)
    return data


def machines(path: Path) -> dict[str, Machine]:
    """The machine that works, and the same with something broken, by variant."""
    data = read(path)
    found = {"works": _machine(data, "works")}
    for broken in data["broken"]:
        found[broken["name"]] = _machine(_break(data, broken), broken["name"])
    return found


def _check(where: str, kind: str, block: Mapping[str, Any]) -> None:
    if unknown := set(block) - BLOCKS[kind]:
        raise ValueError(f"{where}: {kind or 'the machine'} has no {', '.join(sorted(unknown))}")
    for key, value in block.items():
        if key in BLOCKS:
            for part in value if isinstance(value, list) else [value]:
                _check(where, key, part)


def sources(data: Mapping[str, Any], where: str = "") -> list[tuple[str, list[str]]]:
    """Each block that states facts, with where they are from; an empty list where it does not say."""
    found = []
    for key, value in data.items():
        for n, part in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(part, Mapping):
                continue
            place = f"{where}{key}[{n}]"
            if key in SOURCED and not (key == "os" and where):
                given = part.get("source", [])
                found.append((place, [given] if isinstance(given, str) else list(given)))
            if key in ("cpu", "broken"):
                found += sources(part, f"{place}.")
    return found


def _break(data: Mapping[str, Any], broken: Mapping[str, Any]) -> dict[str, Any]:
    changed = deepcopy(dict(data))
    changed["os"] = {**changed["os"], **broken.get("os", {})}
    gone = broken.get("remove", [])
    if missing := [path for path in gone if not any(one["path"] == path for one in changed["device"])]:
        raise ValueError(f"{broken['name']}: there is no device {missing[0]} to remove")
    kept = [one for one in changed["device"] if not any(_below(one["path"], path) for path in gone)]
    for change in broken.get("change", []):
        device = next(one for one in kept if one["path"] == change["path"])
        device["driver"] = change.get("driver", device.get("driver", ""))
        attributes = {**device.get("attributes", {}), **change.get("attributes", {})}
        device["attributes"] = {key: value for key, value in attributes.items() if key not in change.get("drop", ())}
    changed["device"] = kept + list(broken.get("device", []))
    for key in ("firmware", "module", "log"):
        if key in broken:
            changed[key] = broken[key]
    expected = {(one["kind"], one["address"]): one for one in changed["expect"]}
    for one in broken["expect"]:
        before = expected.get((one["kind"], one["address"]), {})
        expected[one["kind"], one["address"]] = {**before, **one}
    changed["expect"] = list(expected.values())
    return changed


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _machine(data: Mapping[str, Any], variant: str) -> Machine:
    found = {one["path"]: one["text"] for one in data.get("file", [])}
    found["/proc/sys/kernel/osrelease"] = f"{data['os']['release']}\n"
    found |= _cpus(data["cpu"])
    return Machine(
        name=data["name"],
        variant=variant,
        release=data["os"]["release"],
        groups=tuple(data["os"].get("groups", ())),
        devices=tuple(_device(one) for one in data["device"]),
        files=found,
        firmware=tuple(name for one in data.get("firmware", []) for name in one["names"]),
        modules=tuple(name for one in data.get("module", []) for name in one["names"]),
        log=tuple(line for one in data.get("log", []) for line in one["lines"]),
        expect={(one["kind"], one["address"]): one for one in data["expect"]},
    )


def _device(data: Mapping[str, Any]) -> Device:
    node = data.get("node")
    return Device(
        path=data["path"],
        subsystem=data["subsystem"],
        driver=data.get("driver", ""),
        node=Node(**{**node, "mode": int(node["mode"], 8)}) if node else None,
        attributes=data.get("attributes", {}),
        properties=data.get("properties", {}),
    )


def _paragraph(device: Device) -> str:
    lines = [f"P: {device.path}"]
    properties = {"SUBSYSTEM": device.subsystem, **device.properties}
    attributes = dict(device.attributes)
    if device.driver:
        properties["DRIVER"] = device.driver
        # From the device up to /sys, then down to the driver.
        up = "../" * device.path.count("/")
        lines.append(f"L: driver={up}bus/{device.subsystem}/drivers/{device.driver}")
    if device.node:
        properties["DEVNAME"] = f"/dev/{device.node.name}"
        attributes["dev"] = device.node.dev
        # With contents it becomes a plain file, whose owner and mode count, instead of a terminal.
        lines.append(f"N: {device.node.name}=00")
    lines += [f"E: {key}={value}" for key, value in properties.items()]
    lines += [f"A: {key}={_escaped(value)}\\n" for key, value in attributes.items()]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n")


def _cpus(data: Mapping[str, Any]) -> dict[str, str]:
    """/proc/cpuinfo and what lies in /sys/devices/system/cpu, out of classes of processors that are alike."""
    found = {"/sys/devices/system/cpu/online": f"{data['online']}\n"}
    info: dict[int, str] = {}
    caches: dict[int, list[tuple[str, str]]] = {}
    for one in data["class"]:
        for cpu in numbers(one["cpus"]):
            info[cpu] = one["info"].strip("\n").replace("{n}", str(cpu)) + "\n\n"
            folder = f"/sys/devices/system/cpu/cpu{cpu}"
            found[f"{folder}/topology/physical_package_id"] = "0\n"
            siblings = f"{cpu}"
            if step := one.get("siblings"):
                siblings = f"{cpu % step},{cpu % step + step}"
            if "siblings" in one:
                found[f"{folder}/topology/thread_siblings_list"] = f"{siblings}\n"
            if "max_khz" in one:
                found[f"{folder}/cpufreq/cpuinfo_max_freq"] = f"{one['max_khz']}\n"
            caches[cpu] = [(cache, siblings) for cache in one.get("caches", [])]
    for one in data.get("shared", []):
        for cpu in numbers(one["cpus"]):
            caches[cpu].append((one["cache"], one["cpus"]))
    for cpu, own in caches.items():
        for n, (cache, shared) in enumerate(own):
            level, kind, size = cache.split()
            folder = f"/sys/devices/system/cpu/cpu{cpu}/cache/index{n}"
            values = {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}
            found |= {f"{folder}/{key}": f"{value}\n" for key, value in values.items()}
    found["/proc/cpuinfo"] = "".join(info[cpu] for cpu in sorted(info))
    return found


def numbers(value: str) -> Sequence[int]:
    """The kernel's list of processors, as in "0-3,8"."""
    found: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{value!r} is no list of processors")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
