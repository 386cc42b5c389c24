"""GPUs: PCI display controllers, with or without a driver, and those of systems on a chip."""

from __future__ import annotations

import re
from pathlib import Path

from ai_assistant.hal.detect import peripheral, sysfs
from ai_assistant.hal.detect.ids import Table
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, Json

DISPLAY = 0x03
# Drivers that draw into memory of the processor: nothing is behind them.
NOT_HARDWARE = {"vgem", "vkms", "simple-framebuffer", "simpledrm", "efi-framebuffer"}


def detect(machine: Sysfs, table: Table) -> list[Device]:
    found = []
    for device in machine.devices("pci"):
        # A virtual function belongs to a virtual machine; its card is found by itself.
        if peripheral.pci_class(device) >> 8 == DISPLAY and not (device / "physfn").exists():
            found.append(_pci(machine, table, device))
    return found + _platform(machine, table)


def _pci(machine: Sysfs, table: Table, device: Path) -> Device:
    ids = peripheral.pci_id(device)
    nodes = peripheral.nodes(machine, device).get("drm", ())
    attributes = {**peripheral.link_attributes(device), **_memory(device), **_compute(nodes)}
    opened = _opened(nodes)
    if not opened and sysfs.driver(device) == "nvidia":
        opened = _nvidia(machine, device)
        attributes["compute"] = bool(opened)
    boot = sysfs.number(device / "boot_vga")
    if boot is not None:
        attributes["primary"] = boot == 1
    return peripheral.build(
        machine,
        table,
        device,
        DeviceKind.GPU,
        bus="pci",
        ids=ids,
        known=table.pci(*ids),
        opened=opened,
        attributes=attributes,
    )


def _platform(machine: Sysfs, table: Table) -> list[Device]:
    """GPUs of a device tree: by what it says they are, or by their render node. Display-only controllers are none."""
    found = []
    for device in machine.devices("platform"):
        names = peripheral.compatible(device)
        known = table.compatible(names)
        nodes = peripheral.nodes(machine, device).get("drm", ())
        is_gpu = known is not None and known.kind is DeviceKind.GPU
        renders = any("renderD" in node for node in nodes) and sysfs.driver(device) not in NOT_HARDWARE
        if is_gpu or (renders and known is None and sysfs.driver(device)):
            attributes: dict[str, Json] = {**_compute(nodes)}
            if names:
                attributes["compatible"] = names
            found.append(
                peripheral.build(
                    machine,
                    table,
                    device,
                    DeviceKind.GPU,
                    bus="platform",
                    known=known,
                    opened=_opened(nodes),
                    attributes=attributes,
                )
            )
    return found


def _opened(nodes: tuple[str, ...]) -> tuple[str, ...]:
    """Render nodes; a card that has none has its card node alone."""
    return tuple(node for node in nodes if "renderD" in node) or nodes


def _compute(nodes: tuple[str, ...]) -> dict[str, Json]:
    """Whether it can compute: a mere display adapter has a card and no render node."""
    return {"compute": any("renderD" in node for node in nodes)} if nodes else {}


def _memory(device: Path) -> dict[str, Json]:
    """Memory in bytes, where the driver (amdgpu) tells: its own, and what it may borrow from the host."""
    found: dict[str, Json] = {}
    for key, name in (("memory_bytes", "mem_info_vram_total"), ("shared_memory_bytes", "mem_info_gtt_total")):
        size = sysfs.number(device / name)
        if size is not None and size > 0:
            found[key] = size
    return found


def _nvidia(machine: Sysfs, device: Path) -> tuple[str, ...]:
    """NVIDIA's own driver has nodes that sysfs does not know; it tells their number in /proc."""
    for line in sysfs.lines(machine.path("proc/driver/nvidia/gpus", device.name, "information"), 16 * 1024):
        if match := re.fullmatch(r"Device Minor:\s*(\d{1,3})\s*", line):
            return (f"/dev/nvidia{match[1]}", "/dev/nvidiactl")
    return ()
