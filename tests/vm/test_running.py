"""Stories that need a running machine and no boot of their own: each begins with the same snapshot, in seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from image.vm import VM
from tests.vm.conftest import RECOVERY_KEY, SNAPSHOT, Installed, storage, verify_boot

pytestmark = pytest.mark.vm_long

TPM_OPENS = ("cryptsetup", "open", "--test-passphrase", "--token-only", "--token-type=systemd-tpm2")


@pytest.fixture
def machine(installed: Installed) -> Iterator[VM]:
    with installed.copy() as machine:
        machine.power_on(snapshot=SNAPSHOT)
        yield machine


def extend(machine: VM, pcr: int) -> None:
    machine.run("/usr/lib/systemd/systemd-pcrextend", f"--pcr={pcr}", "something else")


def test_the_tpm_gives_the_key_to_nobody_once_the_machine_runs(machine: VM) -> None:
    """PCR 15 is extended before anything of /var is looked at; no program can take that back."""
    opened = machine.execute(*TPM_OPENS, storage(machine)["device"])
    assert opened.code != 0, opened.stdout
    assert set(machine.run("cat", "/sys/class/tpm/tpm0/pcr-sha256/15").strip()) != {"0"}


def test_verify_boot_names_an_addition(machine: VM) -> None:
    assert verify_boot(machine)[0] == 0
    extend(machine, 12)
    code, words = verify_boot(machine)
    assert code == 1, words
    assert "additions to the command line" in words


def test_verify_boot_names_a_published_file_that_was_changed(machine: VM) -> None:
    change = "sed -i s/0.1.0/0.1.1/ /boot/loader/ai-assistant/measurements-*.json"
    machine.run("sh", "-c", f"ls /boot/loader && {change}")
    code, words = verify_boot(machine)
    assert code == 2, words
    assert "not signed by the release key" in words


def test_only_root_sees_the_recovery_key(machine: VM) -> None:
    machine.run("cat", RECOVERY_KEY)
    assert machine.execute("setpriv", "--reuid=65534", "--clear-groups", "cat", RECOVERY_KEY).code != 0


def test_the_root_cannot_be_written_to(machine: VM) -> None:
    assert machine.execute("touch", "/usr/lib/a-file").code != 0
    assert machine.execute("mount", "-o", "remount,rw", "/").code != 0
    assert machine.execute("sh", "-c", "echo x >/dev/mapper/root").code != 0
