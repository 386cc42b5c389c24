"""Main memory: how much, of what kind where udev could ask the firmware, and its bandwidth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ai_assistant.hal.detect import sysfs
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, Json, Source, Throughput

MAX_MODULES = 64


def detect(machine: Sysfs) -> list[Device]:
    attributes: dict[str, Json] = {}
    for line in sysfs.lines(machine.path("proc/meminfo"), 64 * 1024):
        match = re.fullmatch(r"(MemTotal|SwapTotal):\s+(\d{1,15}) kB", line.strip())
        if match:
            attributes["bytes" if match[1] == "MemTotal" else "swap_bytes"] = int(match[2]) * 1024
    nodes = sysfs.cpus(sysfs.text(machine.path("sys/devices/system/node/online")))
    if nodes:
        attributes["numa_nodes"] = len(nodes)
    modules: list[Json] = []
    nominal: list[Throughput] = []
    for device in machine.devices("dmi"):
        modules, nominal = _modules(machine.udev(device))
        if modules:
            attributes["modules"] = modules
    kinds = Counter(str(one["type"]) for one in modules if isinstance(one, Mapping) and one.get("type"))
    return [
        Device(
            id="memory",
            kind=DeviceKind.MEMORY,
            name=f"{kinds.most_common(1)[0][0]} memory" if kinds else "Memory",
            attributes=attributes,
            throughput=tuple(nominal),
        )
    ]


def _modules(found: Mapping[str, str]) -> tuple[list[Json], list[Throughput]]:
    """What udev's dmi_memory_id took from SMBIOS: sizes in bytes, speeds in MT/s, widths in bits."""
    modules: list[Json] = []
    gb_s = 0.0
    phrases: Counter[str] = Counter()
    for n in range(MAX_MODULES):
        prefix = f"MEMORY_DEVICE_{n}_"
        size = sysfs.integer(found.get(f"{prefix}SIZE", ""))
        if found.get(f"{prefix}PRESENT") == "0" or size is None or size <= 0:
            continue
        one: dict[str, Json] = {"bytes": size}
        kind = found.get(f"{prefix}TYPE", "")
        if kind:
            one["type"] = kind
        speed = sysfs.integer(found.get(f"{prefix}CONFIGURED_SPEED_MTS", "") or found.get(f"{prefix}SPEED_MTS", ""))
        width = sysfs.integer(found.get(f"{prefix}DATA_WIDTH", "") or found.get(f"{prefix}TOTAL_WIDTH", ""))
        if speed is not None and 0 < speed < 1_000_000:
            one["mt_s"] = speed
            if width is not None and 0 < width <= 1024:
                one["bits"] = width
                gb_s += speed * width / 8000
                phrases[f"{kind or 'memory'}-{speed}, {width} bit"] += 1
        modules.append(one)
    if not gb_s:
        return modules, []
    reference = "SMBIOS: " + " + ".join(f"{count} × {phrase}" for phrase, count in phrases.items())
    return modules, [Throughput(round(gb_s, 1), "GB/s", "", Source.DATASHEET, reference)]
