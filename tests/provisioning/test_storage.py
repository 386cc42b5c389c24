"""Decisions of the storage service; what it does to real disks and TPMs is tested in the virtual machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ai_assistant.provisioning import firmware, storage
from ai_assistant.provisioning.errors import DiskFailed, DiskTooSmall
from ai_assistant.provisioning.partitioning import Disk, Partition
from ai_assistant.provisioning.storage import State, normalised, why_closed

KEY = "-".join(["cbdefghi"] * 8)
BASE = State("tpm2", "", "tpm2", False, "/dev/vda6", "on", True)


class World:
    """The commands that were run, and what each answers."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.answers: dict[str, tuple[int, str, str]] = {}

    def run(self, command: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        self.commands.append(words)
        for key, (status, out, err) in self.answers.items():
            if key in " ".join(words):
                return subprocess.CompletedProcess(words, status, out, err)
        return subprocess.CompletedProcess(words, 0, "", "")

    def ran(self, text: str) -> bool:
        return any(text in " ".join(words) for words in self.commands)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(storage, "run", made.run)
    monkeypatch.setattr(storage, "say", lambda text: made.commands.append(["say", text]))
    monkeypatch.setattr(storage, "repair_table", lambda disk: False)
    for name, folder in {"RUNTIME": "run", "MOUNTED": "run/var", "OPENED_WITH": "run/opened-with",
                         "PENDING": "run/recovery-pending", "RECOVERY": "recovery"}.items():  # fmt: skip
        monkeypatch.setattr(storage, name, tmp_path / folder)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(firmware, "secure_boot", lambda: "on")
    monkeypatch.setattr(firmware, "tpm_works", lambda: True)
    return made


def disk_with(tmp_path: Path, content: bytes | None, removable: bool = False) -> Disk:
    partitions = [Partition(tmp_path / "vda2", "root_0.1.0", 0, 4096)]
    if content is not None:
        (tmp_path / "vda6").write_bytes(content.ljust(4096, b"\0"))
        partitions.append(Partition(tmp_path / "vda6", "var", 0, 4096))
    return Disk(tmp_path / "vda", 2**34, removable, tuple(partitions))


def start(monkeypatch: pytest.MonkeyPatch, *disks: Disk) -> State:
    left = list(disks)
    monkeypatch.setattr(storage, "boot_disk", lambda: left.pop(0) if len(left) > 1 else left[0])
    return storage.start()


def test_a_live_system_writes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = start(monkeypatch, disk_with(tmp_path, None, removable=True))
    assert state.encryption == "volatile"
    assert "live system" in state.reason
    assert [words[0] for words in world.commands] == ["mount"]


def test_the_first_boot_with_a_tpm_encrypts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[list[Path], list[str]]] = []
    monkeypatch.setattr(storage, "partition", lambda disk, where, options=(): made.append((where, list(options))))
    state = start(monkeypatch, disk_with(tmp_path, None), disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert (state.encryption, state.opened_by, state.first_boot, state.reason) == ("tpm2", "tpm2", True, "")
    (definitions, options) = made[0]
    assert [each.name for each in definitions] == ["slots", "tpm2"]
    assert {"--tpm2-pcrs=7", "--tpm2-public-key-pcrs=11"} <= set(options)


def test_without_a_tpm_it_is_plain_and_says_so(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(storage, "partition", lambda disk, where, options=(): made.append([p.name for p in where]))
    monkeypatch.setattr(firmware, "tpm_works", lambda: False)
    state = start(monkeypatch, disk_with(tmp_path, None), disk_with(tmp_path, b""))
    assert made == [["slots", "plain"]]
    assert (state.encryption, state.reason) == ("none", "this machine has no TPM")


def test_a_tpm_that_refuses_leaves_a_working_machine(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(disk: Disk, where: list[Path], options: list[str] | tuple[str, ...] = ()) -> None:
        if options:
            raise DiskFailed("partitioning: TPM in lockout mode")

    monkeypatch.setattr(storage, "partition", refuse)
    state = start(monkeypatch, disk_with(tmp_path, None), disk_with(tmp_path, b""))
    assert state.encryption == "none"
    assert "lockout" in state.reason


@pytest.mark.parametrize(
    "error", [DiskTooSmall("the disk is too small"), DiskFailed("input/output error"), OSError(5, "EIO")]
)
def test_whatever_the_disk_does_the_machine_comes_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(storage, "partition", fail)
    state = start(monkeypatch, disk_with(tmp_path, None))
    assert state.encryption == "volatile"
    assert state.reason
    assert world.ran("nothing of this session is kept")


def test_an_unreadable_table_is_left_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("partitioned")

    monkeypatch.setattr(storage, "partition", never)
    state = start(monkeypatch, Disk(tmp_path / "vda", 2**34, False, (Partition(tmp_path / "vda1", "", 0, 4096),)))
    assert state.encryption == "volatile"
    assert "cannot be read" in state.reason


def test_a_state_partition_is_never_made_twice(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("partitioned again")

    monkeypatch.setattr(storage, "partition", never)
    world.answers["mount -t ext4"] = (32, "", "mount: wrong fs type")
    state = start(monkeypatch, disk_with(tmp_path, b"garbage"))
    assert state.encryption == "volatile"
    assert "was left as it is" in state.reason
    assert not world.ran("mkfs")


def test_the_recovery_key_opens_when_the_tpm_does_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.answers["tpm2-device=auto"] = (1, "", "current policy digest does not match stored policy digest")
    tries = ["wrong\n", KEY.upper().replace("-", " ") + "\n"]
    attach = world.run

    def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "systemd-ask-password":
            return subprocess.CompletedProcess([], 0, tries.pop(0), "")
        if "opened-with" in " ".join(map(str, command)):
            right = (tmp_path / "run/opened-with").read_text() == KEY
            return subprocess.CompletedProcess([], 0 if right else 1, "", "" if right else "no key available")
        return attach(command, **options)

    monkeypatch.setattr(storage, "run", run)
    state = start(monkeypatch, disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert state.opened_by == "recovery-key"
    assert (tmp_path / "run/opened-with").stat().st_mode & 0o077 == 0
    assert world.ran("Secure Boot or its keys were changed")
    assert world.ran("That is not the recovery key")


@pytest.mark.parametrize(("failure", "changes", "words"), [
    ("Failed to unseal: TPM is in DA lockout mode", {}, "locked after too many"),
    ("policy digest does not match", {}, "keys were changed"),
    ("anything", {"tpm": False}, "missing or switched off"),
    ("anything", {"secure_boot": "off"}, "Secure Boot is off"),
    ("anything", {"secure_boot": "setup"}, "Secure Boot is not set up"),
    ("No such device or address", {}, "was cleared or is another one"),
])  # fmt: skip
def test_the_reason_is_in_words(failure: str, changes: dict[str, object], words: str) -> None:
    assert words in why_closed(failure, replace(BASE, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("typed", [KEY, KEY.upper(), KEY.replace("-", ""), KEY.replace("-", " "), f"  {KEY}\n"])
def test_a_recovery_key_may_be_typed_in_any_way(typed: str) -> None:
    assert normalised(typed) == KEY


@pytest.mark.parametrize("typed", ["", "password", "a" * 64, KEY + "c", "\x00", "ключ"])
def test_what_is_no_recovery_key_is_passed_on_as_it_is(typed: str) -> None:
    assert normalised(typed) == typed.strip()


@pytest.fixture
def with_state(world: World, tmp_path: Path) -> Callable[..., None]:
    def write(**changes: object) -> None:
        facts = {name: getattr(BASE, name) for name in BASE.__dataclass_fields__}
        (tmp_path / "run/state.json").write_text(json.dumps({**facts, **changes}))

    return write


def test_a_recovery_key_is_made_once_and_kept_until_acknowledged(
    world: World, with_state: Callable[..., None], tmp_path: Path
) -> None:
    with_state()
    world.answers["systemd-cryptenroll"] = (0, KEY + "\n", "")
    storage.recovery()
    key = tmp_path / "recovery/key"
    assert key.read_text() == KEY + "\n"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "run/recovery-pending").exists()
    assert world.ran(f"say Recovery key of this device – write it down and keep it elsewhere:\n\n    {KEY}")
    made = len([words for words in world.commands if words[0] == "systemd-cryptenroll"])
    storage.recovery()
    assert len([words for words in world.commands if words[0] == "systemd-cryptenroll"]) == made == 1
    (tmp_path / "recovery/acknowledged").touch()
    storage.recovery()
    assert not key.exists()


def test_a_key_that_nobody_saw_is_replaced(world: World, with_state: Callable[..., None]) -> None:
    """The power went between enrolling it and writing it down."""
    with_state()
    world.answers["systemd-cryptenroll"] = (0, KEY + "\n", "")
    storage.recovery()
    assert world.ran("--wipe-slot=recovery")


def test_a_failure_leaves_no_half_a_key(world: World, with_state: Callable[..., None], tmp_path: Path) -> None:
    with_state()
    world.answers["systemd-cryptenroll"] = (1, "", "Failed to unseal")
    with pytest.raises(DiskFailed, match="no recovery key could be made"):
        storage.recovery()
    assert list((tmp_path / "recovery").iterdir()) == []


def test_no_recovery_key_without_encryption(world: World, with_state: Callable[..., None]) -> None:
    with_state(encryption="none")
    storage.recovery()
    assert world.commands == []


def test_after_the_recovery_key_the_tpm_is_bound_again(
    world: World, with_state: Callable[..., None], tmp_path: Path
) -> None:
    with_state(opened_by="recovery-key")
    (tmp_path / "run/opened-with").write_text(KEY)
    world.answers["--recovery-key"] = (0, KEY + "\n", "")
    storage.recovery()
    assert world.ran("--wipe-slot=tpm2 --tpm2-device=auto --tpm2-pcrs=7")
    assert not (tmp_path / "run/opened-with").exists()


def test_without_secure_boot_that_is_left_to_the_owner(
    world: World, with_state: Callable[..., None], tmp_path: Path
) -> None:
    with_state(opened_by="recovery-key", secure_boot="off")
    (tmp_path / "run/opened-with").write_text(KEY)
    world.answers["--recovery-key"] = (0, KEY + "\n", "")
    storage.recovery()
    assert not world.ran("--wipe-slot=tpm2")


@pytest.mark.parametrize(("secure_boot", "setup", "expected"), [
    (b"\6\0\0\0\1", b"\6\0\0\0\0", "on"), (b"\6\0\0\0\0", b"\6\0\0\0\0", "off"),
    (b"\6\0\0\0\0", b"\6\0\0\0\1", "setup"),
    (b"", b"", "off"), (None, None, "unsupported"),
])  # fmt: skip
def test_secure_boot_from_the_firmware(
    tmp_path: Path, secure_boot: bytes | None, setup: bytes | None, expected: str
) -> None:
    for name, value in (("SecureBoot", secure_boot), ("SetupMode", setup)):
        if value is not None:
            (tmp_path / f"{name}-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(value)
    assert firmware.secure_boot(tmp_path) == expected


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert storage.main(["unknown"]) == 2
    assert "storage start" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"encryption": "tpm2"}', '{"unknown": 1}'])
@pytest.mark.parametrize("verb", ["recovery", "reseal"])
def test_without_a_usable_state_the_verbs_say_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, verb: str
) -> None:
    if content is not None:
        (tmp_path / "run/state.json").write_text(content)
    assert storage.main([verb]) == 1
    shown = capsys.readouterr().err
    assert "state.json cannot be used" in shown
    assert "hint:" in shown
