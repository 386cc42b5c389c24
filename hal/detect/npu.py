"""NPUs and other accelerators: on PCI by class or id, on USB by id, and of systems on a chip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ai_assistant.hal.detect import peripheral, sysfs
from ai_assistant.hal.detect.ids import Table
from ai_assistant.hal.detect.state import usable
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, DriverState, Json

PROCESSING_ACCELERATOR = 0x1200


def detect(machine: Sysfs, table: Table) -> list[Device]:
    return [*_pci(machine, table), *_usb(machine, table), *_platform(machine, table)]


def _pci(machine: Sysfs, table: Table) -> list[Device]:
    found = []
    for device in machine.devices("pci"):
        if (device / "physfn").exists():
            continue
        ids = peripheral.pci_id(device)
        known = table.pci(*ids)
        nodes = peripheral.nodes(machine, device)
        # Whoever has a node of the subsystem is one, also a card that no table has heard of.
        if not (
            (known and known.kind is DeviceKind.NPU)
            or peripheral.pci_class(device) == PROCESSING_ACCELERATOR
            or "accel" in nodes
        ):
            continue
        attributes = peripheral.link_attributes(device)
        for key, name in (("firmware_version", "fw_version"), ("variant", "vbnv")):
            if value := sysfs.text(device / name):
                attributes[key] = value
        found.append(
            peripheral.build(
                machine,
                table,
                device,
                DeviceKind.NPU,
                bus="pci",
                ids=ids,
                known=known,
                # habanalabs has a second node, for watching it; the first is the one to compute with.
                opened=next((nodes[folder] for folder in peripheral.NODE_FOLDERS if folder in nodes), ())[:1],
                attributes=attributes,
            )
        )
    return found


def _usb(machine: Sysfs, table: Table) -> list[Device]:
    found = []
    for device in machine.devices("usb"):
        ids = peripheral.usb_id(device)
        known = table.usb(*ids)
        if known is None or known.kind is not DeviceKind.NPU:
            continue
        node = _usb_node(machine, device)
        opened = (node,) if node else ()
        one = peripheral.build(
            machine,
            table,
            device,
            DeviceKind.NPU,
            bus="usb",
            ids=ids,
            known=known,
            opened=opened,
            attributes=_usb_attributes(device, known.driver),
        )
        held = _claimed(device)
        driver = table.drivers[known.driver]
        # No kernel driver: what counts is whether its node can be opened and its interface is free.
        state = usable(machine, opened, driver)
        if held and state.state is DriverState.WORKING:
            changes = DriverState.HELD_BY_ANOTHER, f"another program uses it ({held}): end it, or wait"
        elif not opened:
            changes = (
                DriverState.NO_PERMISSION,
                f"it has no node in /dev/bus/usb: hand it to this container ({device.name})",
            )
        else:
            changes = state.state, state.hint
        found.append(replace(one, state=changes[0], hint=changes[1]))
    return found


def _usb_node(machine: Sysfs, device: Path) -> str:
    if node := machine.node(device):
        return node
    bus, number = sysfs.number(device / "busnum"), sysfs.number(device / "devnum")
    if bus is None or number is None or not (0 < bus < 1000 and 0 < number < 1000):
        return ""
    return f"/dev/bus/usb/{bus:03d}/{number:03d}"


def _usb_attributes(device: Path, library: str) -> dict[str, Json]:
    found: dict[str, Json] = {"library": library}
    speed = sysfs.number(device / "speed")
    if speed is not None and speed > 0:
        found["usb_mbit_s"] = speed
    return found


def _claimed(device: Path) -> str:
    """The interface that a program has claimed: the kernel binds it to `usbfs` as long."""
    for name in sysfs.names(device):
        if name.startswith(f"{device.name}:") and sysfs.driver(device / name) == "usbfs":
            return name
    return ""


def _platform(machine: Sysfs, table: Table) -> list[Device]:
    """NPUs of a device tree. Their cores are devices of their own, and one to whoever computes."""
    cores: dict[str, list[Path]] = {}
    for device in machine.devices("platform"):
        known = table.compatible(peripheral.compatible(device))
        if known is not None and known.kind is DeviceKind.NPU:
            cores.setdefault(known.name, []).append(device)
    shared = _platform_nodes(machine)
    found = []
    for parts in cores.values():
        first = parts[0]
        names = peripheral.compatible(first)
        own = tuple(node for part in parts for node in peripheral.nodes(machine, part).get("accel", ()))
        nodes = own or (shared if sysfs.driver(first) else ())
        found.append(
            peripheral.build(
                machine,
                table,
                first,
                DeviceKind.NPU,
                bus="platform",
                known=table.compatible(names),
                opened=nodes[:1],
                attributes={"cores": len(parts), "compatible": names},
            )
        )
    return found


def _platform_nodes(machine: Sysfs) -> tuple[str, ...]:
    """Nodes of accelerators that are no PCI device: rocket hangs the one of all its cores on a device of its own."""
    nodes = []
    for one in machine.devices("accel"):
        if not any(part.startswith("pci") for part in one.relative_to(machine.root).parts):
            nodes.append(machine.node(one, "accel"))
    return tuple(node for node in nodes if node)
