"""Nobody gets a shell on the production image: not by the firmware's tables, the boot stub or files on the ESP.

There is no agent on it, so these stories look at the console, type on it, and see whether anything answers.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.vm import VM
from tests.vm.conftest import Installed

pytestmark = pytest.mark.vm_long

PASSWORD = "let-me-in"
# openssl passwd -6 -salt salt let-me-in
HASHED = "$6$salt$Dzz//kwSDmtQsQJ.tseQcP6Sk2Q2.BeOzGp0rXvfzVeRsTXOrBiNHIhNQ1I2KFq3CHmd1nGo/7PIbeFOAVZHv."
# Nobody has acknowledged it, so every boot that gets that far says it.
UP = "Recovery key of this device"
REFUSED = ("cannot start from this disk", "Kernel panic")
SHELL_UNIT = """[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/sh -c 'echo CREDENTIAL-$((6*7))-RAN >/dev/console; exec /bin/sh -i </dev/console >/dev/console 2>&1'
"""
WANTED_BY_EVERYTHING = "[Unit]\nWants=intruder.service\n"
CREDENTIALS = {
    "passwd.hashed-password.root": HASHED,
    "passwd.plaintext-password.root": PASSWORD,
    "passwd.shell.root": "/bin/sh",
    "systemd.extra-unit.intruder.service": SHELL_UNIT,
    "systemd.unit-dropin.multi-user.target": WANTED_BY_EVERYTHING,
    "systemd.unit-dropin.sysinit.target": WANTED_BY_EVERYTHING,
    "tmpfiles.extra": "f /etc/profile.d/intruder.sh 0755 root root - echo intruder\n",
    "ssh.authorized_keys.root": "ssh-ed25519 AAAA intruder",
    "getty.ttys.serial": "ttyS0",
    "agetty.autologin": "root",
    "login.noauth": "yes",
}
EXTRA_COMMAND_LINES = [
    "init=/bin/sh",
    "rdinit=/bin/sh",
    "systemd.debug_shell=ttyS0",
    "rd.systemd.unit=emergency.target",
    "systemd.unit=rescue.target systemd.setenv=SYSTEMD_SULOGIN_FORCE=1",
    "systemd.set_credential=passwd.plaintext-password.root:" + PASSWORD + " systemd.import_credentials=yes",
    "systemd.run=/bin/sh systemd.run_success_action=none",
]


@pytest.fixture(scope="module")
def appliance(production: Path) -> Iterator[Installed]:
    """A production machine after its first boot, with Secure Boot on."""
    with VM(production, secure_boot=True, disk_gib=6) as machine:
        machine.power_on()
        machine.wait_for_console(UP)
        machine.power_off()
        yield Installed(machine, "")


def no_shell(machine: VM) -> None:
    """Whatever is typed, nothing runs it."""
    time.sleep(30)  # whatever else wants to start
    machine.type_on_console("")
    for line in ("root", PASSWORD, "echo shell-$((6*7))-$(id -u)", "\x03", "echo shell-$((6*7))-$(id -u)"):
        machine.type_on_console(line)
        time.sleep(5)
    text = machine.console.text
    assert "CREDENTIAL-42-RAN" not in text
    assert "shell-42" not in text
    assert "uid=0" not in text
    assert not re.search(r"^\S*[#$] ?$", text, re.MULTILINE), text[-2000:]


def test_credentials_in_the_firmwares_tables(appliance: Installed) -> None:
    strings = [
        f"io.systemd.credential.binary:{name}={base64.b64encode(value.encode()).decode()}"
        for name, value in CREDENTIALS.items()
    ]
    with appliance.copy(smbios=tuple(strings)) as machine:
        machine.power_on()
        machine.wait_for_console(UP)
        no_shell(machine)


def test_credentials_on_the_esp(appliance: Installed, tmp_path: Path) -> None:
    """Beside the kernel image, for it alone, and in the boot loader's folder, for all."""
    with appliance.copy() as machine:
        folders = [f"{machine.disk.kernel()}.extra.d", "loader/credentials"]
        for folder in folders:
            machine.disk.esp_make_folder(folder)
            for name, value in CREDENTIALS.items():
                (tmp_path / "credential").write_text(value)
                machine.disk.esp_copy_in(tmp_path / "credential", f"{folder}/{name}.cred")
        machine.power_on()
        machine.wait_for_console(UP, *REFUSED)
        no_shell(machine)


def test_an_extra_command_line_is_refused_with_secure_boot(appliance: Installed) -> None:
    """The stub appends what the firmware's tables give it even then; it only measures it."""
    with appliance.copy(cmdline=" ".join(EXTRA_COMMAND_LINES[2:])) as machine:
        machine.power_on()
        machine.wait_for_console(*REFUSED)
        no_shell(machine)
        assert "ai-assistant-command-line.service" in machine.console.text


@pytest.mark.parametrize("words", EXTRA_COMMAND_LINES)
def test_an_extra_command_line_is_refused_without_secure_boot(appliance: Installed, words: str) -> None:
    with appliance.copy(secure_boot=False, cmdline=words) as machine:
        machine.power_on()
        machine.wait_for_console(*REFUSED)
        no_shell(machine)


def test_the_boot_menu_has_no_editor(appliance: Installed) -> None:
    """Space shows the menu where there is one, "e" edits an entry where that is allowed."""
    with appliance.copy() as machine:
        machine.power_on()
        for _ in range(60):
            machine.type_on_console("  e", end="")
            time.sleep(0.5)
        machine.wait_for_console(UP)
        assert "roothash=" not in machine.console.text
        no_shell(machine)
