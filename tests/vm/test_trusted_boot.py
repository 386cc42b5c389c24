"""The two boots of `make test`: a new machine with Secure Boot in setup mode, and the same machine the next day."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.vm import VM
from tests.vm.conftest import RECOVERY_KEY, storage, verify_boot

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def machine(image: Path) -> Iterator[VM]:
    with VM(image, secure_boot=True) as machine:
        machine.power_on()
        print(f"\nready after {machine.wait_ready():.0f} s under {machine.accelerator}")
        yield machine


def test_the_boot_loader_enrolled_our_keys_and_started_again(machine: VM) -> None:
    assert machine.resets == 1
    assert "Secure Boot keys successfully enrolled" in machine.console.text
    assert storage(machine)["secure_boot"] == "on"


def test_the_appliance_answers(machine: VM) -> None:
    assert machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False).strip() == "running"
    assert machine.run("systemctl", "--failed", "--no-legend", "--plain") == ""
    answer = machine.run("ai-assistant", "ask", "how much memory is free?", timeout_s=300)
    assert "memory" in answer.lower()


def test_the_root_is_verified_and_read_only(machine: VM) -> None:
    root = machine.run("findmnt", "--noheadings", "--output", "SOURCE,FSTYPE,OPTIONS", "/").split()
    assert root[:2] == ["/dev/mapper/root", "erofs"]
    assert "ro" in root[2].split(",")
    assert "verity" in machine.run("sh", "-c", "cat /sys/block/dm-*/dm/uuid").lower()


def test_state_is_encrypted_and_etc_is_writable(machine: VM) -> None:
    said = storage(machine)
    assert (said["encryption"], said["opened_by"], said["first_boot"]) == ("tpm2", "tpm2", True), said
    assert machine.run("findmnt", "--noheadings", "--output", "SOURCE,FSTYPE", "/var").split() == [
        "/dev/mapper/var",
        "ext4",
    ]
    assert "overlay" in machine.run("findmnt", "--noheadings", "--output", "FSTYPE", "/etc")
    machine.run("sh", "-c", "echo changed >/etc/a-change && test -e /var/lib/ai-assistant-etc/upper/a-change")
    tokens = machine.run("cryptsetup", "luksDump", said["device"])
    assert "systemd-tpm2" in tokens
    # One slot for the TPM, one for the recovery key.
    assert tokens.count(": luks2") == 2, tokens


def test_the_seed_of_the_boot_loader_was_refreshed(machine: VM) -> None:
    assert machine.run("systemctl", "is-active", "ai-assistant-boot-seed").strip() == "active"
    seed = "/boot/loader/random-seed"
    assert machine.run("find", seed, "-newer", "/run/ai-assistant-storage/state.json").strip() == seed


def test_the_machine_has_an_identity(machine: VM) -> None:
    identity = machine.run("cat", "/etc/machine-id").strip()
    assert re.fullmatch("[0-9a-f]{32}", identity)
    assert identity == machine.run("cat", "/run/machine-id").strip()
    assert identity in machine.run("hostnamectl")


def test_the_other_slot_is_there(machine: VM) -> None:
    labels = machine.run("lsblk", "--noheadings", "--output", "PARTLABEL", "/dev/vda").split()
    assert labels.count("_empty") == 2, labels
    assert {"esp", "var"} <= set(labels)
    sizes = machine.run("lsblk", "--noheadings", "--bytes", "--raw", "--output", "PARTTYPENAME,SIZE", "/dev/vda")
    assert sizes.count(str(300 * 2**20)) == 2, sizes
    assert sizes.count(str(8 * 2**20)) == 2, sizes


def test_the_boot_is_as_published(machine: VM) -> None:
    code, words = verify_boot(machine)
    assert code == 0, words


def test_the_recovery_key_waits_to_be_written_down(machine: VM) -> None:
    key = machine.run("cat", RECOVERY_KEY).strip()
    assert len(key.split("-")) == 8, key
    assert key in machine.console.text
    assert machine.run("stat", "--format=%a %U", RECOVERY_KEY).strip() == "600 root"


def test_the_journal_has_no_warnings_of_ours(machine: VM) -> None:
    journal = "journalctl --boot --priority=warning --output=cat --no-pager --unit=ai-assistant* --grep=."
    assert machine.run(*journal.split(), check=False) == ""


def test_the_next_day(machine: VM) -> None:
    """The second boot: the TPM opens /var, everything is where it was, and the key has been written down."""
    machine.run("touch", "/var/lib/kept")
    identity = machine.run("cat", "/etc/machine-id", RECOVERY_KEY)
    machine.power_off()
    assert "[FAILED]" not in machine.console.text
    machine.power_on()
    machine.wait_ready()
    said = storage(machine)
    assert (said["encryption"], said["opened_by"], said["first_boot"]) == ("tpm2", "tpm2", False), said
    assert machine.run("cat", "/etc/machine-id", RECOVERY_KEY) == identity
    machine.run("test", "-e", "/var/lib/kept", "-a", "-e", "/etc/a-change")
    code, words = verify_boot(machine)
    assert code == 0, words
    machine.run("ai-assistant", "storage", "acknowledge", "--yes")
    assert machine.execute("test", "-e", RECOVERY_KEY).code == 1
