"""How long the appliance takes from the boot loader to serving, beside a plain Debian with the same kernel.

    tests/overlay bench boot [--pairs N] [--json]

Both are booted in turn in the virtual machine (image/vm), from the same kind of disk, with OVMF, a TPM and no
Secure Boot. Counted is the guest's own clock: boot loader and kernel loading (what systemd-boot writes into
LoaderTime…; nothing where the firmware has no clock, as here) plus the time until ai-assistantd.service is ready and
its API answers, or until multi-user.target in the plain image. Second boots, so that the first boot's partitioning is
not in it. The slowest units of ours on the way there are printed too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ai_assistant.daemon.api.server import ANSWERS
from bench import harness
from image.container import CHECKOUT, image_path
from image.vm import VM

PLAIN = CHECKOUT / "build/plain.raw"
MICROSECOND = 1e-6


def build_plain() -> Path:
    """A minimal Debian trixie of the same mkosi, kernel, module list and boot loader; ext4, no verity, no product."""
    done = subprocess.run(["bench/plain-image"], cwd=CHECKOUT, check=False)
    if done.returncode != 0:
        sys.exit("bench: the plain image could not be built; see build/plain.log")
    return PLAIN


def property_us(machine: VM, *query: str) -> int:
    return int(machine.run("systemctl", "show", "--value", f"--property={query[0]}", *query[1:]).strip())


def seconds(machine: VM, unit: str) -> float:
    """From the start of the boot loader to `unit` being up, and serving if it is ours."""
    loader = property_us(machine, "LoaderTimestampMonotonic")
    up = property_us(machine, "ActiveEnterTimestampMonotonic", unit)
    if unit.startswith("ai-"):
        up = max(up, answers_us(machine, unit))
    return (loader + up) * MICROSECOND


def answers_us(machine: VM, unit: str) -> int:
    """When the daemon said that its API answers; on the same clock."""
    for line in machine.run("journalctl", "-b", "-u", unit, "-o", "json", "--no-pager").splitlines():
        entry = json.loads(line)
        if entry.get("MESSAGE") == ANSWERS:
            return int(entry["__MONOTONIC_TIMESTAMP"])
    raise RuntimeError(f"{unit} never said that its API answers")


def start(machine: VM) -> None:
    machine.power_on()
    machine.wait_ready()
    machine.run("systemctl", "is-system-running", "--wait", timeout_s=300, check=False)


def boot(image: Path, unit: str, machines: dict[Path, VM]) -> float:
    """One more boot of the machine of this image, which keeps its disk."""
    machine = machines.get(image)
    if machine is None:
        machine = machines[image] = VM(image, disk_gib=2)
        start(machine)
        machine.power_off()
    start(machine)
    took = seconds(machine, unit)
    if unit.startswith("ai-"):
        harness.note(slow_units(machine))
    machine.power_off()
    return took


def slow_units(machine: VM) -> str:
    chain = machine.run("systemd-analyze", "critical-chain", "--no-pager", "ai-assistantd.service", check=False)
    return "\n".join(line for line in chain.splitlines() if "ai-assistant" in line or "var.mount" in line)


def main() -> int:
    options = harness.arguments((__doc__ or "").splitlines()[0]).parse_args()
    image, plain = image_path("test"), build_plain()
    machines: dict[Path, VM] = {}

    def timed(which: Path, unit: str) -> float:
        took = boot(which, unit, machines)
        harness.note(f"{which.name}: {took:.1f} s")
        return took

    try:
        ours, other = harness.pairs(
            lambda _: timed(image, "ai-assistantd.service"), lambda _: timed(plain, "multi-user.target"), options.pairs
        )
    finally:
        for machine in machines.values():
            machine.stop()
    rows = [harness.at_most("boot loader to serving, plain Debian to multi-user (s)", ours, other, 1.3)]
    for profile in ("developer", "production"):
        uki = image_path(profile).with_suffix(".efi")
        rows.append(harness.limit(f"unified kernel image, {profile}", uki.stat().st_size / 1e6, 80, "MB"))
    return harness.report(rows, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
