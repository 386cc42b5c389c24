"""TPM and /var: without one it is plain and says so; when the TPM does not open it, the recovery key does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from image.vm import VM
from tests.vm.conftest import Installed, storage, verify_boot

pytestmark = pytest.mark.vm_long

WEAK = "Secure Boot is not on"


def test_without_a_tpm_var_is_plain_and_everybody_says_so(image: Path) -> None:
    with VM(image, secure_boot=True, tpm=False) as machine:
        machine.power_on()
        machine.wait_ready()
        said = storage(machine)
        assert (said["encryption"], said["tpm"], said["opened_by"]) == ("none", False, ""), said
        assert machine.run("findmnt", "--noheadings", "--output", "SOURCE", "/var").startswith("/dev/vda")
        assert "not encrypted: this machine has no TPM" in machine.run("ai-assistant", "status")
        machine.wait_for_console("not encrypted")
        assert "Recovery key" not in machine.console.text
        machine.run("touch", "/var/lib/kept")
        machine.cold_boot()
        machine.run("test", "-e", "/var/lib/kept")
        code, words = verify_boot(machine)
        assert code == 2, words
        assert "TPM" in words


def test_without_secure_boot_the_tpm_opens_var_and_the_status_says_that_it_is_weak(
    installed_without_secure_boot: Installed,
) -> None:
    with installed_without_secure_boot.copy() as machine:
        machine.power_on()
        machine.wait_ready()
        said = storage(machine)
        assert (said["encryption"], said["opened_by"]) == ("tpm2", "tpm2"), said
        assert said["secure_boot"] in ("setup", "unsupported"), said  # by what the firmware has, never "on"
        machine.run("test", "-e", "/var/lib/kept")
        assert WEAK in machine.run("ai-assistant", "status")
        code, words = verify_boot(machine)
        assert code == 1
        assert "Secure Boot" in words


def removed(machine: VM) -> None:
    machine.change(tpm=False)


def cleared(machine: VM) -> None:
    machine.tpm.clear()


def replaced(machine: VM) -> None:
    machine.tpm.replace()


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (removed, "the TPM that holds its key is missing or switched off"),
        (cleared, "the TPM was cleared or is another one"),
        (replaced, "the TPM was cleared or is another one"),
    ],
)
def test_a_tpm_that_does_not_open_is_named_and_the_recovery_key_opens(
    installed: Installed, happens: Callable[[VM], None], reason: str
) -> None:
    with installed.copy() as machine:
        happens(machine)
        machine.power_on()
        machine.wait_for_console(reason)
        machine.wait_for_console("Recovery key:")
        machine.type_on_console("not-the-key")
        machine.wait_for_console("That is not the recovery key")
        machine.wait_for_console("Recovery key:")
        machine.type_on_console(installed.recovery_key)
        machine.wait_ready()
        machine.run("test", "-e", "/var/lib/kept")
        assert storage(machine)["opened_by"] == "recovery-key"
        machine.run("systemctl", "is-system-running", "--wait", timeout_s=600, check=False)
        if machine.hardware.tpm:  # it is bound to the TPM that is there now
            machine.cold_boot()
            assert storage(machine)["opened_by"] == "tpm2"
            machine.run("test", "-e", "/var/lib/kept")


def test_a_tpm_that_is_locked_against_guessing(installed: Installed) -> None:
    """No secret is guessed here: a key bound to the boot alone may be given out while guessing is locked. Either way
    the machine comes up, and says which way."""
    with installed.copy() as machine:
        machine.tpm.lock_out()
        machine.power_on()
        text = "the TPM is locked after too many wrong attempts"
        if machine.wait_for_console("login:", text) == text:
            machine.wait_for_console("Recovery key:")
            machine.type_on_console(installed.recovery_key)
        machine.wait_ready()
        machine.run("test", "-e", "/var/lib/kept")
        assert storage(machine)["encryption"] == "tpm2"


def test_firmware_that_forgot_the_keys_is_given_them_again(installed: Installed) -> None:
    with installed.copy() as machine:
        machine.firmware.forget()
        machine.power_on()
        machine.wait_for_console("Secure Boot keys successfully enrolled")
        machine.wait_ready()
        assert storage(machine)["opened_by"] == "tpm2"


def test_secure_boot_switched_off_keeps_var_closed(installed: Installed) -> None:
    with installed.copy(secure_boot=False) as machine:
        machine.power_on()
        machine.wait_for_console("Secure Boot is")
        machine.wait_for_console("Recovery key:")
        machine.type_on_console(installed.recovery_key)
        machine.wait_ready()
        machine.run("test", "-e", "/var/lib/kept")
        assert storage(machine)["opened_by"] == "recovery-key"
