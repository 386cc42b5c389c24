"""One boot from the firmware on: verity root, state on the disk, the daemon, an answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from image.container import image_path
from image.vm import VM

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def machine() -> Iterator[VM]:
    with VM(image_path("test")) as machine:
        machine.power_on()
        seconds = machine.wait_ready()
        print(f"\nready after {seconds:.0f} s under {machine.accelerator}")
        yield machine


def test_the_appliance_answers_from_its_disk(machine: VM) -> None:
    assert machine.run("systemctl", "is-system-running", "--wait", timeout_s=300, check=False).strip() == "running"
    assert machine.run("systemctl", "--failed", "--no-legend", "--plain") == ""
    answer = machine.run("ai-assistant", "ask", "how much memory is free?", timeout_s=300)
    assert "memory" in answer.lower()


def test_the_root_is_verified_and_read_only(machine: VM) -> None:
    root = machine.run("findmnt", "--noheadings", "--output", "SOURCE,FSTYPE,OPTIONS", "/").split()
    assert root[:2] == ["/dev/mapper/root", "erofs"]
    assert "ro" in root[2].split(",")
    assert "verity" in machine.run("sh", "-c", "cat /sys/block/dm-*/dm/uuid").lower()
    assert "roothash=" in machine.run("cat", "/proc/cmdline")


def test_state_is_on_its_own_partition_and_etc_is_writable(machine: VM) -> None:
    source, kind = machine.run("findmnt", "--noheadings", "--output", "SOURCE,FSTYPE", "/var").split()
    assert kind == "ext4"
    assert source.startswith("/dev/vda")
    assert "overlay" in machine.run("findmnt", "--noheadings", "--output", "FSTYPE", "/etc")
    machine.run("sh", "-c", "echo changed >/etc/a-change && test -e /var/lib/ai-assistant-etc/upper/a-change")


def test_the_other_slot_is_there(machine: VM) -> None:
    labels = machine.run("lsblk", "--noheadings", "--output", "PARTLABEL", "/dev/vda").split()
    assert labels.count("_empty") == 2, labels
    assert {"esp", "var"} <= set(labels)
    sizes = machine.run("lsblk", "--noheadings", "--bytes", "--raw", "--output", "PARTTYPENAME,SIZE", "/dev/vda")
    assert sizes.count(str(300 * 2**20)) == 2, sizes
    assert sizes.count(str(8 * 2**20)) == 2, sizes


def test_there_is_a_tpm_and_the_boot_was_measured(machine: VM) -> None:
    machine.run("test", "-c", "/dev/tpmrm0")
    assert machine.run("cat", "/sys/class/tpm/tpm0/pcr-sha256/11").strip("0\n")


def test_the_journal_has_no_warnings_of_ours(machine: VM) -> None:
    assert (
        machine.run(
            "journalctl",
            "--boot",
            "--priority=warning",
            "--output=cat",
            "--no-pager",
            "--unit=ai-assistant*",
            "--grep=.",
            check=False,
        )
        == ""
    )
