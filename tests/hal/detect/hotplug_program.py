"""Run under umockdev-wrapper by test_udev.py: follows a device that comes, changes and goes, and prints what it saw."""

from __future__ import annotations

import asyncio
import json

from ai_assistant.hal.detect import detect
from ai_assistant.hal.detect.monitor import Monitor
from tests.hal.detect.testbed import Testbed

CARD = """P: /devices/pci0000:00/0000:00:0b.0
E: SUBSYSTEM=pci
E: PCI_ID=8086:7D1D
A: class=0x120000
A: vendor=0x8086
A: device=0x7d1d
{driver}
"""
NODE = """P: /devices/pci0000:00/0000:00:0b.0/accel/accel0
N: accel/accel0
E: DEVNAME=/dev/accel/accel0
E: SUBSYSTEM=accel
A: dev=261:0

"""
PATH = "/sys/devices/pci0000:00/0000:00:0b.0"


async def main() -> None:
    bed = Testbed()
    bed.add("P: /devices/virtual/thermal/thermal_zone0\nE: SUBSYSTEM=thermal\nA: type=acpitz\nA: temp=1\n")
    # Firmware of the machine that the test runs on plays no part.
    with Monitor(lambda: detect(firmware=())) as monitor:
        print(json.dumps({"known": [device.id for device in monitor.devices]}), flush=True)
        assert monitor.read() == ()
        changes = monitor.changes()

        async def see(what: str) -> None:
            change = await asyncio.wait_for(anext(changes), 30)
            row = {"after": what, "action": change.action, "id": change.device.id, "state": change.device.state}
            print(json.dumps(row), flush=True)

        bed.add(CARD.format(driver=""))
        bed.event(PATH, "add")
        await see("plugged in")
        bed.remove(PATH)
        bed.add(CARD.format(driver="L: driver=../../../bus/pci/drivers/intel_vpu"))
        bed.event(PATH, "bind")
        await see("driver bound")
        bed.add(NODE)
        bed.event(f"{PATH}/accel/accel0", "add")
        await see("node made")
        # Events about nothing of ours change nothing; a burst is one look.
        for _ in range(5):
            bed.event("/sys/devices/virtual/thermal/thermal_zone0", "change")
        await asyncio.sleep(0.05)
        assert monitor.read() == ()
        bed.event(f"{PATH}/accel/accel0", "remove")
        bed.remove(f"{PATH}/accel/accel0")
        bed.remove(PATH)
        bed.event("/sys/devices/virtual/thermal/thermal_zone0", "change")
        await see("pulled out")
        await changes.aclose()


if __name__ == "__main__":
    asyncio.run(main())
