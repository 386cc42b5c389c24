"""`ai-assistant storage`, against the real vault on a private bus; and the sentence that the console says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.cli import banner
from ai_assistant.cli.status import described
from ai_assistant.cli.storage import described as described_by_the_vault
from tests.cli.conftest import CHECKOUT, Cli, program
from tests.cli.test_talk import Terminal
from tests.sdk.bus_service import Broker
from tests.support.recovery import ENCRYPTED, KEY, PLAIN, describe, flag, key_waits

STATUS = {"version": "9.9", "state": "running", "addresses": ["192.0.2.7"]}


@pytest.fixture
def machine(tmp_path: Path, private_bus: Broker) -> Iterator[Path]:
    """A machine below a folder, whose recovery key waits, and its vault. Its reseal runs the file `tool` there."""
    assert os.geteuid() == 0, "the tools tree's tests run as root, and there is no polkit here"
    root = tmp_path / "machine"
    describe(root, ENCRYPTED)
    key_waits(root)
    arguments: list[str | Path] = [
        "--root",
        root,
        "--bus-address",
        private_bus.address,
        "--reseal",
        str(root / "tool"),
        "--refresh",
        "true",
    ]
    command: list[str | Path] = [sys.executable, "-m", "ai_assistant.tee.vault", *arguments, "--idle", "600"]
    process = subprocess.Popen(command, cwd=CHECKOUT)
    try:
        deadline = time.monotonic() + 20
        while program("storage", "--json", DBUS_SYSTEM_BUS_ADDRESS=private_bus.address).status != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield root
    finally:
        process.terminate()
        process.wait(15)


def tool(root: Path, script: str) -> None:
    (root / "tool").write_text(f"#!/bin/sh\n{script}\n")
    (root / "tool").chmod(0o755)


@pytest.mark.bus
def test_how_it_is(cli: Cli, machine: Path) -> None:
    result = cli("storage")
    assert result.status == 0
    fields = dict(line.split("  ", 1) for line in result.out.splitlines())
    assert {key.strip(): value.strip() for key, value in fields.items()} == {
        "storage": "encrypted, opened by the TPM",
        "recovery key": "waits to be written down: ai-assistant storage recovery-key",
        "Secure Boot": "on",
        "TPM": "yes",
    }
    assert cli("storage", "--json").json == {
        "encryption": "tpm2",
        "reason": "",
        "opened_by": "tpm2",
        "recovery_key_pending": True,
        "secure_boot": "on",
        "tpm": True,
    }
    describe(machine, b"{}")
    assert "unknown: /run/ai-assistant-storage/state.json: unknown encryption ''" in cli("storage").out


@pytest.mark.bus
def test_the_key_is_shown_until_it_is_acknowledged(cli: Cli, machine: Path) -> None:
    result = cli("storage", "recovery-key")
    assert (result.status, result.out) == (0, KEY + "\n")
    assert "ai-assistant storage acknowledge" in result.err
    assert cli("storage", "recovery-key", "--json").json == {"recovery_key": KEY}
    refused = cli("storage", "acknowledge")
    assert (refused.status, "--yes" in refused.err) == (2, True)
    assert cli("storage", "recovery-key").status == 0
    assert cli("storage", "acknowledge", "--yes", "--json").json == {"acknowledged": True}
    assert not flag(machine).exists()
    for command in (("recovery-key",), ("acknowledge", "--yes")):
        gone = cli("storage", *command, "--json")
        assert (gone.status, gone.error["name"]) == (1, "NoRecoveryKey")
    assert cli("storage", "--json").json["recovery_key_pending"] is False


@pytest.mark.bus
@pytest.mark.parametrize("typed", [KEY[-8:], f"  {KEY.upper()} ", KEY])
def test_a_person_proves_that_it_is_written_down(machine: Path, typed: str) -> None:
    terminal = Terminal("storage", "acknowledge")
    terminal.until("last eight letters.*: ")
    terminal.type("vvvvvvvv\n")
    terminal.until("not how it ends(.|\r|\n)*: ")
    terminal.type(typed + "\n")
    assert "acknowledged" in terminal.until("not shown any more")
    assert terminal.end() == 0
    assert not flag(machine).exists()


@pytest.mark.bus
def test_whoever_cannot_say_how_it_ends_has_not_written_it_down(machine: Path) -> None:
    terminal = Terminal("storage", "acknowledge")
    seen = ""
    for _ in range(3):
        seen += terminal.until("last eight letters.*: ")
        terminal.type(KEY[:8] + "\n")
    seen += terminal.until("so it is still shown")
    assert terminal.end() == 1
    assert KEY not in seen
    assert (machine / "var/lib/ai-assistant-recovery/key").exists()


@pytest.mark.bus
def test_reseal(cli: Cli, machine: Path) -> None:
    tool(machine, "exit 0")
    assert cli("storage", "reseal").out == "the storage is bound to the TPM as the machine is now\n"
    assert cli("storage", "reseal", "--json").json == {"resealed": True}
    tool(machine, "echo 'storage: the TPM is locked' >&2; echo '  hint: wait' >&2; exit 1")
    failed = cli("storage", "reseal", "--json")
    assert failed.status == 1
    assert failed.error == {"name": "ResealFailed", "message": "storage: the TPM is locked", "hint": "wait"}


@pytest.mark.bus
def test_a_damaged_key_is_an_error_with_a_hint(cli: Cli, machine: Path) -> None:
    (machine / "var/lib/ai-assistant-recovery/key").write_bytes(b"\0" * 71)
    result = cli("storage", "recovery-key")
    assert result.status == 1
    assert "systemd-cryptenroll" in result.err
    assert cli("storage").status == 0


@pytest.mark.bus
def test_a_bus_without_a_vault_is_4(cli: Cli, private_bus: Broker) -> None:
    for command in ((), ("recovery-key",), ("acknowledge", "--yes"), ("reseal",)):
        result = cli("storage", *command)
        assert result.status == 4
        assert "ai-assistant-vaultd" in result.err


def test_no_bus_is_4(cli: Cli, nothing: None) -> None:
    assert cli("storage").status == 4


@pytest.mark.parametrize("found", [{}, {"StorageEncryption": ["x"], "SecureBoot": 7, "StorageReason": None}])
def test_an_odd_vault_is_no_failure(found: dict[str, object]) -> None:
    assert dict(described_by_the_vault(found))["storage"] == "unknown"


def test_the_console_says_how_the_storage_is_protected(tmp_path: Path) -> None:
    assert "storage  unknown: nothing here looks after the storage" in banner.text(tmp_path, None)
    describe(tmp_path, PLAIN)
    for status in (None, STATUS):
        assert "\n  storage  not encrypted: this machine has no TPM\n" in banner.text(tmp_path, status)
    describe(tmp_path, PLAIN | {"reason": "the TPM could not be used at the first boot: " + "it is broken and " * 9})
    lines = banner.text(tmp_path, STATUS).splitlines()
    assert max(map(len, lines)) < 80
    start = next(number for number, line in enumerate(lines) if line.startswith("  storage  "))
    assert lines[start + 1].startswith(" " * 11)


def test_the_console_shows_the_key_until_it_is_acknowledged(tmp_path: Path) -> None:
    describe(tmp_path, ENCRYPTED)
    path = key_waits(tmp_path)
    text = banner.text(tmp_path, STATUS)
    assert f"\n    {KEY}\n" in text
    assert "write it down" in text
    assert "ai-assistant storage acknowledge" in text
    assert max(map(len, text.splitlines())) < 80
    path.unlink()
    flag(tmp_path).unlink()
    assert "RECOVERY" not in banner.text(tmp_path, STATUS)


def test_who_may_not_see_the_key_is_told_who_may(tmp_path: Path) -> None:
    describe(tmp_path, ENCRYPTED)
    # For others than root the folder is closed; here it is not there at all, which looks the same.
    flag(tmp_path).touch()
    text = banner.text(tmp_path, STATUS)
    assert "An administrator sees it with\n    ai-assistant storage recovery-key" in text


@pytest.mark.parametrize("content", [b"", b"\\4 \\n\x1b[2J", b"x" * (1 << 20)])
def test_a_damaged_key_is_said_and_not_printed(tmp_path: Path, content: bytes) -> None:
    key_waits(tmp_path, content)
    text = banner.text(tmp_path, STATUS)
    assert "WARNING: the recovery key in" in text
    assert "systemd-cryptenroll" in text
    assert "\x1b" not in text
    assert "\\" not in text
    assert max(map(len, text.splitlines())) < 80


def test_status_has_it_in_one_line() -> None:
    known = dict.fromkeys(
        ("hostname", "os", "profile", "version", "state", "addresses", "models", "running", "cores", "cpu", "load_1m",
         "memory_available_bytes", "memory_total_bytes", "disk_free_bytes", "disk_total_bytes", "uptime_s")
    )  # fmt: skip
    assert dict(described(known))["storage"] == "unknown"
    plain = {"storage_encryption": "none", "storage_reason": "this machine has no TPM", "secure_boot": "off"}
    rows = dict(described({**known, **plain}))
    assert rows["storage"] == "not encrypted: this machine has no TPM"
    assert "recovery key" not in rows
    sealed = {"storage_encryption": "tpm2", "storage_opened_by": "tpm2", "secure_boot": "on"}
    rows = dict(described({**known, **sealed, "recovery_key_pending": True}))
    assert rows["storage"] == "encrypted, opened by the TPM"
    assert rows["recovery key"].endswith("ai-assistant storage recovery-key")
