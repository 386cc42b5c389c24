"""`verify-boot` from end to end: on a machine in a folder, and on logs that were taken elsewhere."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ai_assistant.cli import main, verify_boot
from tests.cli.conftest import Cli, Result, program
from tests.tee import boots
from tests.tee.boots import LOADER, PHASES, ROOT_HASH, UKI, Boot
from tests.tee.machines import World

COMMAND = "verify-boot"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "machine")
    monkeypatch.setattr(verify_boot, "machine", made.machine)
    return made


def other(tmp_path: Path, boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_boot, "machine", World(tmp_path / "other", boot).machine)


def elsewhere(folder: Path, boot: Boot | None = None) -> list[str]:
    """The arguments for a log that somebody sent."""
    found, raw = boots.measure(boot or Boot()), boots.published()
    values = json.dumps({pcr: value.hex() for pcr, value in found.pcrs.items()}).encode()
    files = {
        "--event-log": found.log,
        "--pcrs": values,
        "--system-log": found.system_log,
        "--measurements": raw,
        "--key": boots.public("release"),
    }
    folder.mkdir(exist_ok=True)
    arguments = []
    for option, content in files.items():
        (folder / option[2:]).write_bytes(content)
        arguments += [option, str(folder / option[2:])]
    (folder / "measurements.sig").write_bytes(boots.sign(raw))
    return arguments


def test_a_good_boot(cli: Cli, world: World) -> None:
    result = cli(COMMAND)
    assert result.status == 0
    assert result.err == ""
    rows = {line.split("  ")[0]: line for line in result.out.splitlines()}
    for component in ("boot loader", "unified kernel image", "root file system", "allowed signers (db)"):
        assert "as published" in rows[component]
    assert "differs" not in result.out
    assert result.out.endswith("\nAs published: this boot is ai-assistant 0.1.0 (production, x86-64).\n")


def test_a_good_boot_as_json(cli: Cli, world: World) -> None:
    """The keys are for programs, and documented: they stay."""
    result = cli(COMMAND, "--json")
    assert result.status == 0
    found = result.json
    assert set(found) == {"verdict", "this_machine", "release", "phases", "checks"}
    assert (found["verdict"], found["this_machine"], found["phases"]) == ("as published", True, list(PHASES))
    assert found["release"] == {
        "name": "ai-assistant", "profile": "production", "version": "0.1.0", "architecture": "x86-64", "uki": UKI,
        "root_hash": ROOT_HASH, "measurements": "measurements-0.1.0.json",
    }  # fmt: skip
    keys = {"id", "component", "pcr", "verdict", "found", "expected", "meaning", "hint"}
    assert all(set(check) == keys for check in found["checks"])
    assert {check["verdict"] for check in found["checks"]} == {"as published", "information"}


def test_each_difference_is_explained(cli: Cli, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other(tmp_path, Boot(secure_boot=False, command_line_added=("init=/bin/sh",)), monkeypatch)
    result = cli(COMMAND)
    assert result.status == 1
    assert "\ndiffers: Secure Boot (PCR 7)\n  expected: on\n  found: off\n  Secure Boot is off: " in result.out
    assert "\n  hint: switch Secure Boot on in the firmware setup, and boot again\n" in result.out
    assert "\ndiffers: additions to the command line (PCR 12)\n" in result.out
    assert "init=/bin/sh" in result.out
    assert result.out.endswith("is not ai-assistant 0.1.0 (production, x86-64) in 2 points, explained above.\n")
    as_json = cli(COMMAND, "--json")
    assert as_json.status == 1
    assert as_json.json["verdict"] == "differs"
    wrong = [check["id"] for check in as_json.json["checks"] if check["verdict"] == "differs"]
    assert wrong == ["secure-boot", "additions"]


CANNOT_TELL = [
    ("sys/class/tpm/tpm0", "NoTPM"),
    ("sys/kernel/security/tpm0/binary_bios_measurements", "NoEventLog"),
    ("efi/loader/ai-assistant/measurements-0.1.0.json", "NoMeasurements"),
    ("efi/loader/ai-assistant/measurements-0.1.0.json.sig", "BadSignature"),
    ("usr/lib/ai-assistant/keys/release.pub", "NoMeasurements"),
]


@pytest.mark.parametrize(("name", "error"), CANNOT_TELL)
def test_nobody_can_tell(cli: Cli, world: World, name: str, error: str) -> None:
    (world.root / name).rename(world.root / "away")
    result = cli(COMMAND, "--json")
    assert result.status == 2
    assert result.out == ""
    assert result.error["name"] == error
    assert result.error["hint"]
    assert cli(COMMAND).err.startswith("error: ")


def test_a_broken_log_cannot_tell(cli: Cli, world: World) -> None:
    world.write("sys/kernel/security/tpm0/binary_bios_measurements", boots.measure(Boot()).log[:-3])
    result = cli(COMMAND, "--json")
    assert (result.status, result.error["name"]) == (2, "InvalidEventLog")


def test_measurements_signed_by_somebody_else_cannot_tell(cli: Cli, world: World) -> None:
    world.publish(world.root / "efi", signer="Someone else")
    result = cli(COMMAND, "--json")
    assert (result.status, result.error["name"]) == (2, "BadSignature")


def test_not_root_cannot_tell(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_boot, "machine", lambda: world.machine(superuser=False))
    result = cli(COMMAND)
    assert result.status == 2
    assert "hint: sudo ai-assistant verify-boot" in result.err


def test_a_log_from_elsewhere_needs_no_root(cli: Cli, tmp_path: Path) -> None:
    arguments = elsewhere(tmp_path / "sent")
    result = cli(COMMAND, *arguments, "--json")
    assert result.status == 0
    assert result.json["this_machine"] is False
    ids = {check["id"] for check in result.json["checks"]}
    assert not ids & {"root", "command-line"}
    assert "the boot of this log is" in cli(COMMAND, *arguments).out


def test_a_log_from_elsewhere_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert program(COMMAND, *elsewhere(tmp_path / "sent")).status == 0
    bad = elsewhere(tmp_path / "bad", Boot(programs=(replace(LOADER, digest=bytes(32)), boots.IMAGE)))
    result = program(COMMAND, *bad)
    assert result.status == 1
    assert "differs: boot loader (PCR 4)" in result.out


def test_the_signature_may_be_elsewhere(cli: Cli, tmp_path: Path) -> None:
    arguments = elsewhere(tmp_path / "sent")
    (tmp_path / "sent/measurements.sig").rename(tmp_path / "signature")
    assert cli(COMMAND, *arguments).status == 2
    assert cli(COMMAND, *arguments, "--signature", str(tmp_path / "signature")).status == 0


@pytest.mark.parametrize("name", ["event-log", "pcrs", "system-log", "measurements", "measurements.sig", "key"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\0\x1e\n", b"{}", b"[" * 50_000])
def test_hostile_files_cannot_tell(cli: Cli, tmp_path: Path, name: str, content: bytes | None) -> None:
    arguments = elsewhere(tmp_path / "sent")
    path = tmp_path / "sent" / name
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    result = cli(COMMAND, *arguments, "--json")
    if (name, content) == ("system-log", b""):
        # It names no phase at all, while the TPM holds four.
        assert result.status == 1
    else:
        assert result.status == 2
        assert result.error["name"] not in ("InternalError", "Usage")


@pytest.mark.parametrize(
    "left_out", [("--event-log",), ("--pcrs",), ("--measurements",), ("--event-log", "--pcrs")], ids=" ".join
)
def test_half_a_log_is_wrong_usage(cli: Cli, tmp_path: Path, left_out: tuple[str, ...]) -> None:
    arguments = elsewhere(tmp_path / "sent")
    for option in left_out:
        at = arguments.index(option)
        del arguments[at : at + 2]
    result = cli(COMMAND, *arguments, "--json")
    assert (result.status, result.error["name"]) == (2, "Usage")
    assert cli(COMMAND, "--signature", "x", "--json").error["name"] == "Usage"


def test_evidence_is_kept_and_verifies_elsewhere(cli: Cli, world: World, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert cli(COMMAND, "--save", str(kept)).status == 0
    assert sorted(path.name for path in kept.iterdir()) == [
        "command-line.txt", "event-log.bin", "measurements.json", "measurements.json.sig", "pcrs.json", "release.pub",
        "report.json", "root.txt", "tpm2-measure.log",
    ]  # fmt: skip
    assert json.loads((kept / "report.json").read_text())["verdict"] == "as published"
    again = program(
        COMMAND, "--event-log", f"{kept}/event-log.bin", "--pcrs", f"{kept}/pcrs.json", "--system-log",
        f"{kept}/tpm2-measure.log", "--measurements", f"{kept}/measurements.json", "--key", f"{kept}/release.pub",
    )  # fmt: skip
    assert again.status == 0, again.err
    refused = cli(COMMAND, "--save", str(kept), "--json")
    assert (refused.status, refused.error["name"]) == (2, "AlreadyExists")


def test_evidence_is_kept_even_when_nobody_can_tell(cli: Cli, world: World, tmp_path: Path) -> None:
    world.write("sys/kernel/security/tpm0/binary_bios_measurements", b"broken")
    assert cli(COMMAND, "--save", str(tmp_path / "kept")).status == 2
    assert (tmp_path / "kept/event-log.bin").read_bytes() == b"broken"


def on_a_terminal(*args: str) -> Result:
    """What the command shows in this process on a pseudo-terminal of 100 columns."""
    leader, follower = pty.openpty()
    shown = b""

    def collect() -> None:
        nonlocal shown
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:
                return
            if not piece:
                return
            shown += piece

    reader = threading.Thread(target=collect)
    reader.start()
    kept = sys.stdout
    try:
        with os.fdopen(follower, "w") as sys.stdout:
            status = main(args)
    finally:
        sys.stdout = kept
    reader.join()
    os.close(leader)
    return Result(status, shown.decode(), "")


def test_a_table_for_people_without_anybodys_control_characters(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    evil = Boot(phases=(*PHASES[:2], "[bold]\x1b]0;owned\x07"))
    other(tmp_path, evil, monkeypatch)
    result = on_a_terminal(COMMAND)
    assert result.status == 1
    head = result.out.splitlines()[0]
    assert all(title in head for title in ("component", "PCR", "verdict", "found"))
    assert "\x1b]0;" not in result.out
    assert "\x07" not in result.out
    assert "[bold]" in result.out
    assert "as published" in result.out
