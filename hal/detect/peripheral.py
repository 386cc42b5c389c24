"""A device on a bus – PCI, USB, or a platform's – as a `Device`: what GPUs and NPUs have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ai_assistant.hal.detect import sysfs
from ai_assistant.hal.detect.ids import Known, Table
from ai_assistant.hal.detect.state import judge
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, Json, Throughput, object_name

NODE_FOLDERS = ("accel", "drm", "apex", "hailo_chardev", "habanalabs")
MAX_PARTS = 64


def pci_id(device: Path) -> tuple[str, str]:
    """Vendor and product as four hexadecimal digits each; empty where sysfs has none."""
    return _hex4(device / "vendor"), _hex4(device / "device")


def pci_class(device: Path) -> int:
    """Base class and subclass, as in 0x0300; 0 when it is not known."""
    return (sysfs.number(device / "class") or 0) >> 8 & 0xFFFF


def usb_id(device: Path) -> tuple[str, str]:
    vendor, product = (sysfs.text(device / name).lower() for name in ("idVendor", "idProduct"))
    right = re.fullmatch("[0-9a-f]{4}", vendor) and re.fullmatch("[0-9a-f]{4}", product)
    return (vendor, product) if right else ("", "")


def compatible(device: Path) -> list[str]:
    """What a device tree says that a device is, the most exact first."""
    found = sysfs.raw(device / "of_node" / "compatible", sysfs.MAX_TEXT).decode("utf-8", "replace").split("\0")
    event = sysfs.uevent(device)
    found += [event.get(f"OF_COMPATIBLE_{n}", "") for n in range(8)]
    return [sysfs.clean(name) for name in dict.fromkeys(found) if name]


def _hex4(path: Path) -> str:
    value = sysfs.integer(sysfs.text(path))
    return f"{value:04x}" if value is not None and 0 < value <= 0xFFFF else ""


def nodes(machine: Sysfs, device: Path) -> dict[str, tuple[str, ...]]:
    """What programs can open, by folder: {"drm": ("/dev/dri/card0", "/dev/dri/renderD128")}."""
    found: dict[str, tuple[str, ...]] = {}
    # A virtio device has its nodes one level below its PCI device.
    places = [device, *(device / name for name in sysfs.names(device)[:MAX_PARTS] if name.startswith("virtio"))]
    for folder in NODE_FOLDERS:
        there = [place / folder / name for place in places for name in sysfs.names(place / folder)[:MAX_PARTS]]
        base = {"drm": "dri", "accel": "accel"}.get(folder, "")
        paths = [machine.node(one, base) for one in there]
        if any(paths):
            found[folder] = tuple(path for path in paths if path)
    return found


def driven(device: Path) -> Path:
    """What the driver that does the work is bound to: for virtio, the device behind the transport."""
    if sysfs.driver(device) in ("virtio-pci", "virtio-mmio"):
        return next((device / name for name in sysfs.names(device) if re.fullmatch(r"virtio\d+", name)), device)
    return device


def build(
    machine: Sysfs,
    table: Table,
    device: Path,
    kind: DeviceKind,
    *,
    bus: str,
    ids: tuple[str, str] = ("", ""),
    known: Known | None = None,
    opened: Sequence[str] = (),
    attributes: Mapping[str, Json] | None = None,
) -> Device:
    """Args:
    device: its folder in sysfs.
    opened: the nodes that programs need.
    """
    at_work = driven(device)
    bound = sysfs.driver(at_work)
    state = judge(machine, at_work, bound, opened, known, table)
    vendor, product = ids
    found = machine.udev(device)
    vendor_name = table.vendors.get(vendor) or found.get("ID_VENDOR_FROM_DATABASE", "")
    address = sysfs.clean(device.name)
    return Device(
        id=object_name(kind, bus, address),
        kind=kind,
        name=_name(known, found, vendor_name, ids, kind),
        vendor=vendor_name or (known.name.split()[0] if known else ""),
        bus=bus,
        address=address,
        vendor_id=vendor,
        product_id=product,
        driver=bound,
        state=state.state,
        hint=state.hint,
        nodes=tuple(opened),
        attributes=dict(attributes or {}),
        throughput=figures(known),
    )


def figures(known: Known | None) -> tuple[Throughput, ...]:
    return known.figures if known else ()


def _name(known: Known | None, found: Mapping[str, str], vendor: str, ids: tuple[str, str], kind: DeviceKind) -> str:
    if known:
        return known.name
    if model := found.get("ID_MODEL_FROM_DATABASE"):
        return model
    which = f"{kind.upper()} {ids[0]}:{ids[1]}" if any(ids) else kind.upper()
    return f"{vendor} {which}".strip()


def link_attributes(device: Path) -> dict[str, Json]:
    """How a PCI device is connected: what it could, not what it does at this moment, which changes."""
    found: dict[str, Json] = {}
    if speed := re.match(r"([0-9.]{1,8}) GT/s", sysfs.text(device / "max_link_speed")):
        found["pcie_gt_s"] = float(speed[1]) if speed[1].count(".") < 2 and speed[1] != "." else 0.0
    width = sysfs.number(device / "max_link_width")
    if width is not None and 0 < width <= 32:
        found["pcie_lanes"] = width
    node = sysfs.number(device / "numa_node")
    if node is not None and node >= 0:
        found["numa_node"] = node
    return found
