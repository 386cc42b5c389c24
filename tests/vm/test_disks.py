"""Disks that are too small, hold something else, break half-way, or are two; a first boot without clock or network."""

from __future__ import annotations

from pathlib import Path

import pytest

from image.vm import VM, Disk, ExtraDisk, Failing
from image.vm.process import tool
from tests.vm.conftest import Installed, storage, verify_boot

pytestmark = pytest.mark.vm_long

MIB = 2**20


def test_a_disk_that_is_too_small_gives_a_machine_that_says_so(image: Path) -> None:
    with VM(image, secure_boot=True, disk_size=image.stat().st_size + 100 * MIB) as machine:
        machine.power_on()
        machine.wait_for_console("is too small")
        machine.wait_ready()
        said = storage(machine)
        assert said["encryption"] == "volatile"
        assert "too small" in said["reason"]
        assert "too small" in machine.run("ai-assistant", "status")
        machine.run("ai-assistant", "ask", "how much memory is free?", timeout_s=300)


def test_a_disk_with_somebody_elses_partition_behind_the_image(image: Path) -> None:
    """It takes the room for the other slot; it is not touched, and the machine comes up without its disk."""
    with VM(image, secure_boot=True, disk_gib=0.6) as machine:
        raw = machine.disk.make_raw()
        tool("sfdisk", "--append", "--quiet", raw, stdin=b'size=400MiB, type=linux, name="photos"\n')
        photos = machine.disk.partition("photos")
        machine.disk.write(photos.start, b"a photograph" * 1000)
        machine.power_on()
        machine.wait_ready()
        said = storage(machine)
        assert said["encryption"] == "volatile", said
        assert said["reason"]
        machine.power_off()
        assert machine.disk.partition("photos") == photos
        assert machine.disk.read(photos.start, 12) == b"a photograph"


@pytest.mark.parametrize("writes", [3, 30, 90])
def test_a_disk_that_fails_during_the_first_boot(image: Path, writes: int) -> None:
    """The machine comes up and names it; with a disk that works again, the next boot finishes what was begun."""
    with VM(image, secure_boot=True, failing=Failing(writes)) as machine:
        machine.power_on()
        machine.wait_for_console("The machine runs without its disk", "Recovery key of this device")
        machine.hard_kill()
        machine.change(failing=None)
        machine.power_on()
        machine.wait_ready()
        assert storage(machine)["encryption"] == "tpm2"
        machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False)
        code, words = verify_boot(machine)
        assert code == 0, words


def test_a_torn_partition_table_is_repaired(installed: Installed) -> None:
    with installed.copy() as machine:
        machine.disk.break_table()
        machine.power_on()
        machine.wait_ready()
        machine.run("test", "-e", "/var/lib/kept")
        machine.power_off()
        assert machine.disk.table().lba == 1


def test_a_clock_in_1970_and_no_network(image: Path) -> None:
    with VM(image, secure_boot=True, clock="1970-01-01T00:00:30", network=False) as machine:
        machine.power_on()
        machine.wait_ready()
        assert machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False).strip() == "running"
        assert storage(machine)["encryption"] == "tpm2"
        machine.run("ai-assistant", "ask", "how much memory is free?", timeout_s=300)
        code, words = verify_boot(machine)
        assert code == 0, words
        machine.cold_boot()
        assert storage(machine)["opened_by"] == "tpm2"


def test_a_stick_beside_an_installed_disk_is_a_live_system(image: Path, installed: Installed) -> None:
    """It keeps nothing, and does not touch the disk."""
    with installed.copy() as machine:
        stick = Disk.overlay(machine.base, image, image.stat().st_size + 512 * MIB, "stick")
        before = machine.disk.read(0, MIB)
        machine.change(extra_disks=(ExtraDisk(stick, usb=True, first=True),))
        machine.power_on()
        machine.wait_ready()
        said = storage(machine)
        assert (said["encryption"], said["first_boot"]) == ("volatile", False), said
        assert "live" in machine.run("ai-assistant", "status")
        assert machine.execute("test", "-e", "/var/lib/kept").code == 1
        machine.power_off()
        assert machine.disk.read(0, MIB) == before
        machine.change(extra_disks=())
        machine.power_on()
        machine.wait_ready()
        machine.run("test", "-e", "/var/lib/kept")


def test_a_stick_installs_itself_on_a_disk(image: Path) -> None:
    """The whole way of a new owner: start from the stick, install, take it out, start from the disk."""
    with VM(image, secure_boot=True) as machine:
        stick = Disk.overlay(machine.base, image, image.stat().st_size + 512 * MIB, "stick")
        machine.disk = Disk.empty(machine.base, image.stat().st_size + 4096 * MIB, "disk")
        machine.change(extra_disks=(ExtraDisk(stick, usb=True, first=True),))
        machine.power_on()
        machine.wait_ready()
        machine.run("ai-assistant", "install", "/dev/vda", "--yes", timeout_s=1800)
        machine.power_off()
        machine.change(extra_disks=())
        machine.power_on()
        machine.wait_ready()
        said = storage(machine)
        assert (said["encryption"], said["device"]) == ("tpm2", "/dev/vda6"), said
        code, words = verify_boot(machine)
        assert code == 0, words
