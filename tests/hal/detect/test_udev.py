"""Detection through the real libudev, over umockdev's /sys, and hot-plug."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.errors import NotSupported
from ai_assistant.hal.detect.monitor import Action, Change, Monitor, compare
from ai_assistant.hal.device import Device, DeviceKind

CHECKOUT = Path(__file__).parents[3]
DESCRIPTION = """P: /devices/pci0000:00/0000:00:0b.0
E: SUBSYSTEM=pci
E: PCI_ID=8086:7D1D
E: DRIVER=intel_vpu
A: class=0x120000
A: vendor=0x8086
A: device=0x7d1d
L: driver=../../../bus/pci/drivers/intel_vpu

P: /devices/pci0000:00/0000:00:0b.0/accel/accel0
N: accel/accel0
E: DEVNAME=/dev/accel/accel0
E: SUBSYSTEM=accel
A: dev=261:0

P: /devices/pci0000:00/0000:00:02.0
E: SUBSYSTEM=pci
E: PCI_ID=8086:A7A0
E: ID_MODEL_FROM_DATABASE=Raptor Lake-P [Iris Xe Graphics]
A: class=0x030000
A: vendor=0x8086
A: device=0xa7a0

P: /devices/virtual/dmi/id
E: SUBSYSTEM=dmi
E: MEMORY_DEVICE_0_SIZE=17179869184
E: MEMORY_DEVICE_0_TYPE=DDR5
E: MEMORY_DEVICE_0_SPEED_MTS=5600
E: MEMORY_DEVICE_0_DATA_WIDTH=64

"""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def of(kind: str, devices: Iterable[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (device for device in devices if device["kind"] == kind)
    return found


@pytest.mark.bus
def test_devices_are_listed_and_named_by_udev(tmp_path: Path) -> None:
    description = tmp_path / "machine.umockdev"
    description.write_text(DESCRIPTION)
    detection = (sys.executable, "-m", "ai_assistant.hal.detect", "--json", "--firmware", str(tmp_path))
    found = json.loads(run("umockdev-run", "--device", str(description), "--", *detection))
    npu, gpu, memory = (of(kind, found) for kind in ("npu", "gpu", "memory"))
    assert (npu["driver"], npu["nodes"], npu["state"]) == ("intel_vpu", ["/dev/accel/accel0"], "working")
    # In no table of ours: udev's hardware database knows its name.
    assert gpu["name"] == "Raptor Lake-P [Iris Xe Graphics]"
    assert gpu["state"] == "no-driver"
    assert memory["name"] == "DDR5 memory"
    assert memory["throughput"][0]["value"] == 44.8


@pytest.mark.bus
def test_a_device_is_followed_as_it_comes_changes_and_goes() -> None:
    program = ("-m", "tests.hal.detect.hotplug_program")
    rows = [json.loads(line) for line in run("umockdev-wrapper", sys.executable, *program).splitlines()]
    assert "sensor_thermal_acpitz" in rows[0]["known"]
    assert [(row["after"], row["action"], row["state"]) for row in rows[1:]] == [
        ("plugged in", "added", "no-driver"),
        ("driver bound", "changed", "firmware-missing"),
        ("node made", "changed", "working"),
        ("pulled out", "removed", "working"),
    ]
    assert {row["id"] for row in rows[1:]} == {"npu_pci_0000_00_0b_0"}


def test_what_differs_between_two_looks() -> None:
    first, second = (Device(name, DeviceKind.NPU, name) for name in ("a", "b"))
    changed = Device("a", DeviceKind.NPU, "a", driver="intel_vpu")
    assert compare([first], [first]) == ()
    assert compare([first], [second]) == (Change(Action.REMOVED, first), Change(Action.ADDED, second))
    assert compare([first], [changed]) == (Change(Action.CHANGED, changed),)
    assert compare([], []) == ()


def test_without_udev_following_has_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyudev", None)
    with pytest.raises(NotSupported) as caught:
        Monitor(lambda: ())
    assert "udev" in caught.value.hint
