"""What hardware a machine has, and what is missing where it cannot be used.

`detect` looks once; `monitor.Monitor` follows what comes and goes; `measure.measure` finds out how fast memory and
processor are, once per machine. Each kind of device has a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ai_assistant.hal.detect import cpu, gpu, ids, measure, memory, npu, sensors, tpm
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import MAX_ID, Device

__all__ = ["detect"]


def detect(
    root: Path = Path("/"), *, state: Path | None = None, firmware: Sequence[Path] | None = None
) -> tuple[Device, ...]:
    """All devices, in a fixed order: processors, memory, GPUs, NPUs, TPMs, sensors. Takes milliseconds, never raises.

    Args:
        root: below it lie the machine's sys, proc, dev and lib.
        state: where `measure.measure` put its results; they are added to the processor and the memory.
        firmware: folders to look for firmware in, instead of the machine's own.
    """
    machine = Sysfs(root, firmware=None if firmware is None else tuple(firmware))
    table = ids.table()
    found = [
        *cpu.detect(machine, table),
        *memory.detect(machine),
        *gpu.detect(machine, table),
        *npu.detect(machine, table),
        *tpm.detect(machine),
        *sensors.detect(machine),
    ]
    if state is not None:
        found = measure.add(found, measure.load(state))
    return tuple(_unlike(found))


def _unlike(devices: Sequence[Device]) -> list[Device]:
    """Two thermal zones may have one name: the second gets a number, so that every id is there once."""
    seen: set[str] = set()
    found = []
    for device in devices:
        name, n = device.id, 1
        while name in seen:
            n += 1
            name = f"{device.id[: MAX_ID - 5]}_{n}"
        seen.add(name)
        found.append(device if name == device.id else replace(device, id=name))
    return found
