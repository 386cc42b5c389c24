"""The processor: one device per socket, with what matters to computing – instructions, caches, classes of cores."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ai_assistant.hal.detect import sysfs
from ai_assistant.hal.detect.ids import Table
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, Json, object_name

# What kernels of inference libraries choose by; /proc/cpuinfo has a hundred more.
ISA = (
    "ssse3", "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert",
    "avx_ifma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vbmi2",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "avx10", "asimd",
    "fphp", "asimdhp", "asimddp", "asimdfhm", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme", "sme2",
    "neon", "vfpv4", "crc32", "aes", "sha_ni", "sha2", "v", "zvfh",
)  # fmt: skip
VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "Hygon", "0x41": "Arm", "0x51": "Qualcomm"}
# Cores whose top clocks or capacities differ by less are of one class: a favoured core is a few percent faster.
SAME_CLASS = 0.85


def detect(machine: Sysfs, table: Table) -> list[Device]:
    blocks = _cpuinfo(machine)
    online = _online(machine, blocks)
    sockets: dict[int, list[int]] = {}
    for cpu in online:
        socket = sysfs.number(_folder(machine, cpu) / "topology/physical_package_id")
        sockets.setdefault(socket if socket is not None and 0 <= socket < 1024 else 0, []).append(cpu)
    found = []
    for socket, cpus in sorted(sockets.items()):
        own = [blocks[cpu] for cpu in cpus if cpu in blocks] or list(blocks.values())[:1]
        classes = _classes(machine, cpus)
        attributes: dict[str, Json] = {
            "architecture": _architecture(own),
            "cores": _cores(machine, cpus),
            "threads": len(cpus),
            "isa": _isa(own),
            "caches": _caches(machine, cpus),
            "core_classes": classes,
        }
        for key, name in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping")):
            if own and (value := sysfs.integer(own[0].get(name, ""))) is not None:
                attributes[key] = value
        highest = [top for cpu in cpus if (top := _max_khz(machine, cpu))]
        if highest:
            attributes["max_khz"] = max(highest)
        if any("hypervisor" in block.get("flags", "").split() for block in own):
            attributes["virtual"] = True
        found.append(
            Device(
                id=object_name("cpu", str(socket)),
                kind=DeviceKind.CPU,
                name=_name(machine, table, own),
                vendor=_vendor(own),
                bus="cpu",
                address=str(socket),
                attributes=attributes,
            )
        )
    return found


def _folder(machine: Sysfs, cpu: int) -> Path:
    return machine.path("sys/devices/system/cpu", f"cpu{cpu}")


def _cpuinfo(machine: Sysfs) -> dict[int, dict[str, str]]:
    """/proc/cpuinfo by processor; a part that has no number (ARM's last one) counts for none."""
    found: dict[int, dict[str, str]] = {}
    block: dict[str, str] = {}
    for line in [*sysfs.lines(machine.path("proc/cpuinfo"), 8 << 20), ""]:
        key, colon, value = line.partition(":")
        if colon:
            block.setdefault(sysfs.clean(key), sysfs.clean(value))
        elif not line.strip():
            number = sysfs.integer(block.get("processor", ""))
            if number is not None and 0 <= number < sysfs.MAX_CPUS:
                found[number] = block
            block = {}
    return found


def _online(machine: Sysfs, blocks: Mapping[int, object]) -> list[int]:
    listed = sysfs.cpus(sysfs.text(machine.path("sys/devices/system/cpu/online")))
    there = [
        int(name[3:])
        for name in sysfs.names(machine.path("sys/devices/system/cpu"))
        if name[:3] == "cpu" and name[3:].isascii() and name[3:].isdigit() and len(name) < 9
    ]
    # A machine always has a processor, whatever could not be read.
    return listed or sorted(blocks) or sorted(cpu for cpu in there if cpu < sysfs.MAX_CPUS) or [0]


def _architecture(blocks: Sequence[Mapping[str, str]]) -> str:
    if blocks and "CPU implementer" in blocks[0]:
        return "aarch64" if blocks[0].get("CPU architecture") == "8" else "arm"
    if blocks and "isa" in blocks[0]:
        return "riscv64"
    if blocks and "flags" in blocks[0]:
        return "x86_64" if "lm" in blocks[0]["flags"].split() else "x86"
    return platform.machine()


def _isa(blocks: Sequence[Mapping[str, str]]) -> list[str]:
    """What every processor of the socket can: a program may be moved to any of them."""
    able: set[str] | None = None
    for block in blocks:
        words = set(f"{block.get('flags', '')} {block.get('Features', '')}".split())
        words |= set(block.get("isa", "").split("_")[1:])
        able = words if able is None else able & words
    return [name for name in ISA if name in (able or ())]


def _cores(machine: Sysfs, cpus: Iterable[int]) -> int:
    """Physical cores: threads that share one have the same list of siblings."""
    siblings = set()
    for cpu in cpus:
        folder = _folder(machine, cpu) / "topology"
        shared = sysfs.text(folder / "core_cpus_list") or sysfs.text(folder / "thread_siblings_list")
        siblings.add(shared or str(cpu))
    return len(siblings)


def _caches(machine: Sysfs, cpus: Sequence[int]) -> list[Json]:
    """Each kind once: level, type, bytes of one, and how many the socket has."""
    seen: set[tuple[int, str, str]] = set()
    counts: Counter[tuple[int, str, int]] = Counter()
    for cpu in cpus:
        folder = _folder(machine, cpu) / "cache"
        for name in sysfs.names(folder)[:16]:
            level = sysfs.number(folder / name / "level")
            kind = sysfs.text(folder / name / "type").lower()
            size = _size(sysfs.text(folder / name / "size"))
            if level is None or not 0 < level < 10 or not size or kind not in ("data", "instruction", "unified"):
                continue
            shared = sysfs.text(folder / name / "shared_cpu_list") or str(cpu)
            if (level, kind, shared) not in seen:
                seen.add((level, kind, shared))
                counts[level, kind, size] += 1
    return [
        {"level": level, "type": kind, "bytes": size, "count": count}
        for (level, kind, size), count in sorted(counts.items())
    ]


def _size(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    size = sysfs.integer(text[:-1] if unit > 1 else text)
    return size * unit if size is not None and 0 < size <= 1 << 40 else 0


def _max_khz(machine: Sysfs, cpu: int) -> int:
    top = sysfs.number(_folder(machine, cpu) / "cpufreq/cpuinfo_max_freq")
    return top if top is not None and 0 < top < 1 << 31 else 0


def _classes(machine: Sysfs, cpus: Sequence[int]) -> list[Json]:
    """Classes of cores, the strongest first; one where all are alike."""
    wanted = set(cpus)
    groups: list[tuple[str, list[int]]] = []
    for name, folder in (("performance", "cpu_core"), ("efficient", "cpu_atom"), ("low-power", "cpu_lowpower")):
        own = [cpu for cpu in sysfs.cpus(sysfs.text(machine.path("sys/devices", folder, "cpus"))) if cpu in wanted]
        if own:
            groups.append((name, own))
    if not groups:
        strengths = {cpu: sysfs.number(_folder(machine, cpu) / "cpu_capacity") or 0 for cpu in cpus}
        if len(set(strengths.values())) < 2:
            strengths = {cpu: _max_khz(machine, cpu) for cpu in cpus}
        groups = _by_strength(strengths)
    found: list[Json] = []
    for name, own in groups:
        one: dict[str, Json] = {"name": name, "cpus": own, "cores": _cores(machine, own)}
        if top := max(_max_khz(machine, cpu) for cpu in own):
            one["max_khz"] = top
        found.append(one)
    return found


def _by_strength(strengths: Mapping[int, int]) -> list[tuple[str, list[int]]]:
    groups: list[list[int]] = []
    for cpu in sorted(strengths, key=lambda cpu: (-strengths[cpu], cpu)):
        if groups and strengths[cpu] >= SAME_CLASS * strengths[groups[-1][0]]:
            groups[-1].append(cpu)
        else:
            groups.append([cpu])
    named = ["performance", *[f"middle{n}" if n else "middle" for n in range(len(groups))]]
    if len(groups) > 1:
        named[len(groups) - 1] = "efficient"
    return [(name, sorted(own)) for name, own in zip(named, groups, strict=False)]


def _name(machine: Sysfs, table: Table, blocks: Sequence[Mapping[str, str]]) -> str:
    for block in blocks[:1]:
        if name := block.get("model name") or block.get("Model Name"):
            return " ".join(name.split())
    for name in (
        sysfs.raw(machine.path("proc/device-tree/compatible"), sysfs.MAX_TEXT).decode("utf-8", "replace").split("\0")
    ):
        if name in table.chips:
            return table.chips[name]
    cores = dict.fromkeys(f"{b.get('CPU implementer', '')}:{b.get('CPU part', '')}" for b in blocks)
    known = [table.cores[core] for core in cores if core in table.cores]
    return " + ".join(known) or "CPU"


def _vendor(blocks: Sequence[Mapping[str, str]]) -> str:
    if not blocks:
        return ""
    vendor = blocks[0].get("vendor_id") or blocks[0].get("CPU implementer", "")
    return VENDORS.get(vendor, vendor)
