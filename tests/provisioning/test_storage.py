"""Decisions of the storage service; what it does to real disks and TPMs is tested in the virtual machine."""

from __future__ import annotations

import hashlib
import json
import ssl
import struct
import subprocess
from collections.abc import Callable, Sequence
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
    for name, folder in {
        "RUNTIME": "run",
        "PRIVATE": "run/private",
        "MOUNTED": "run/private/var",
        "OPENED_WITH": "run/private/opened-with",
        "SEED": "run/private/seed",
        "PENDING": "run/recovery-pending",
        "RECOVERY": "recovery",
    }.items():
        monkeypatch.setattr(storage, name, tmp_path / folder)
    (tmp_path / "run/private").mkdir(parents=True)
    (tmp_path / "recovery").mkdir()
    monkeypatch.setattr(storage, "write_protected", lambda device: False)
    monkeypatch.setattr(firmware, "only_our_keys", lambda certificate: True)
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
    assert [Path(words[0]).name for words in world.commands] == ["systemd-pcrextend", "mount"]


class Partitioner:
    """`partition` without a disk: runs what comes before the commit, and keeps what lay in the seed then."""

    def __init__(self, seed: Path) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []
        self.keys: list[str] = []
        self._seed = seed

    def __call__(
        self,
        disk: Disk,
        where: list[Path],
        options: Sequence[str] = (),
        before_commit: Callable[[Path], None] = lambda device: None,
    ) -> None:
        self.calls.append(([each.name for each in where], list(options)))
        if (self._seed / "key").exists():
            assert (self._seed / "key").stat().st_mode & 0o777 == 0o600
            self.keys.append((self._seed / "key").read_text())
        before_commit(Path("/dev/loop7"))


@pytest.fixture
def partitioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Partitioner:
    made = Partitioner(tmp_path / "run/private/seed")
    monkeypatch.setattr(storage, "partition", made)
    return made


def test_the_first_boot_with_a_tpm_encrypts(
    world: World, partitioner: Partitioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(monkeypatch, disk_with(tmp_path, None), disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert (state.encryption, state.opened_by, state.first_boot, state.reason) == ("tpm2", "tpm2", True, "")
    assert partitioner.calls == [(["slots", "encrypted"], [f"--key-file={tmp_path}/run/private/passphrase"])]
    bound = next(words for words in world.commands if words[0] == "systemd-cryptenroll")
    assert f"--tpm2-pcrs=7+15:sha256={'0' * 64}" in bound
    assert "--tpm2-public-key-pcrs=11" in bound
    assert bound[-1] == "/dev/loop7"
    # The key is in the new /var and nowhere else.
    (key,) = partitioner.keys
    assert normalised(key) == key.strip()
    assert key.count("-") == 7
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not world.ran(key.strip())


def test_no_two_recovery_keys_are_the_same() -> None:
    assert len({storage.new_recovery_key() for _ in range(50)}) == 50


def test_the_tpm_is_closed_before_anything_of_var_is_looked_at(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, disk_with(tmp_path, b"LUKS\xba\xbe"))
    verbs = [Path(words[0]).name for words in world.commands]
    assert verbs.index("systemd-cryptsetup") < verbs.index("systemd-pcrextend") < verbs.index("fsck.ext4")
    assert verbs.index("systemd-pcrextend") < verbs.index("mount")


@pytest.mark.parametrize("content", [b"", b"LUKS\xba\xbe"])
def test_a_tpm_that_cannot_be_closed_leaves_var_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    world.answers["pcrextend"] = (1, "", "Failed to extend PCR")
    state = start(monkeypatch, disk_with(tmp_path, content))
    assert state.encryption == "volatile"
    assert not world.ran("mount -t ext4")


def test_without_a_tpm_it_is_plain_and_says_so(
    world: World, partitioner: Partitioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firmware, "tpm_works", lambda: False)
    state = start(monkeypatch, disk_with(tmp_path, None), disk_with(tmp_path, b""))
    assert partitioner.calls == [(["slots", "plain"], [])]
    assert (state.encryption, state.reason) == ("none", "this machine has no TPM")
    assert not world.ran("pcrextend")


def test_a_tpm_that_refuses_leaves_a_working_machine(
    world: World, partitioner: Partitioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.answers["systemd-cryptenroll"] = (1, "", "TPM in lockout mode")
    state = start(monkeypatch, disk_with(tmp_path, None), disk_with(tmp_path, b""))
    assert [definitions for definitions, _ in partitioner.calls] == [["slots", "encrypted"], ["slots", "plain"]]
    assert state.encryption == "none"
    assert "lockout" in state.reason


def test_a_disk_that_refuses_is_not_the_tpms_fault(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again at the next boot, encrypted."""
    tried: list[list[str]] = []

    def refuse(disk: Disk, where: list[Path], *_: object) -> None:
        tried.append([each.name for each in where])
        raise DiskFailed("input/output error")

    monkeypatch.setattr(storage, "partition", refuse)
    assert start(monkeypatch, disk_with(tmp_path, None)).encryption == "volatile"
    assert tried == [["slots", "encrypted"]]


def test_a_damaged_header_asks_nobody_for_a_key(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.answers["systemd-cryptsetup"] = (1, "", "Failed to load LUKS superblock")
    world.answers["luksDump"] = (1, "1\n", "damaged")
    state = start(monkeypatch, disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert state.encryption == "volatile"
    assert "header of the state partition is damaged" in state.reason
    assert not world.ran("systemd-ask-password")


def test_a_write_protected_disk_asks_nobody_for_a_key(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "write_protected", lambda device: True)
    state = start(monkeypatch, disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert state.encryption == "volatile"
    assert "write-protected" in state.reason
    assert not world.ran("systemd-ask-password")
    assert not world.ran("systemd-cryptsetup")


def test_the_kernel_says_whether_a_disk_is_write_protected(tmp_path: Path) -> None:
    said = tmp_path / "dev/block/1:3/ro"
    said.parent.mkdir(parents=True)
    for text, protected in (("0\n", False), ("1\n", True)):
        said.write_text(text)
        assert storage.write_protected(Path("/dev/null"), tmp_path) is protected


def test_what_is_not_about_the_key_is_not_called_a_wrong_key(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.answers["systemd-cryptsetup"] = (1, "", "device-mapper: reload ioctl failed: Cannot allocate memory")
    world.answers["systemd-ask-password"] = (0, KEY, "")
    state = start(monkeypatch, disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert state.encryption == "volatile"
    assert "cannot be opened" in state.reason


def test_a_disk_that_cannot_be_read_is_survived(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(disk: Disk) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "repair_table", unreadable)
    state = start(monkeypatch, disk_with(tmp_path, None))
    assert state.encryption == "volatile"
    assert "Input/output error" in state.reason


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
            right = (tmp_path / "run/private/opened-with").read_text() == KEY
            return subprocess.CompletedProcess([], 0 if right else 1, "", "" if right else "Key data incorrect?")
        return attach(command, **options)

    monkeypatch.setattr(storage, "run", run)
    state = start(monkeypatch, disk_with(tmp_path, b"LUKS\xba\xbe"))
    assert state.opened_by == "recovery-key"
    assert (tmp_path / "run/private/opened-with").stat().st_mode & 0o077 == 0
    assert world.ran("Secure Boot's keys were changed")
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


@pytest.fixture
def key(world: World, tmp_path: Path) -> Path:
    (tmp_path / "recovery/key").write_text(KEY + "\n")
    return tmp_path / "recovery/key"


def test_the_recovery_key_is_shown_until_it_is_acknowledged(
    world: World, with_state: Callable[..., None], tmp_path: Path, key: Path
) -> None:
    with_state()
    for _ in range(2):
        world.commands.clear()
        storage.recovery()
        assert world.ran(f"say Recovery key of this device – write it down and keep it elsewhere:\n\n    {KEY}")
    assert (tmp_path / "run/recovery-pending").exists()
    assert (tmp_path / "recovery").stat().st_mode & 0o777 == 0o700
    (tmp_path / "recovery/acknowledged").write_text(hashlib.sha256(KEY.encode()).hexdigest() + "\n")
    world.commands.clear()
    storage.recovery()
    assert not key.exists()
    assert world.commands == []


def test_another_key_than_the_acknowledged_one_waits(
    world: World, with_state: Callable[..., None], tmp_path: Path, key: Path
) -> None:
    with_state()
    (tmp_path / "recovery/acknowledged").write_text(hashlib.sha256(b"an older key").hexdigest() + "\n")
    storage.recovery()
    assert key.exists()
    assert world.ran(KEY)


def test_a_key_that_is_gone_is_not_replaced(world: World, with_state: Callable[..., None]) -> None:
    """Its owner may have it on paper."""
    with_state()
    storage.recovery()
    assert world.commands == []


def test_no_recovery_key_without_encryption(world: World, with_state: Callable[..., None]) -> None:
    with_state(encryption="none")
    storage.recovery()
    assert world.commands == []


def test_after_the_recovery_key_the_tpm_is_bound_again(
    world: World, with_state: Callable[..., None], tmp_path: Path
) -> None:
    with_state(opened_by="recovery-key")
    (tmp_path / "run/private/opened-with").write_text(KEY)
    storage.recovery()
    enrolled = [" ".join(words) for words in world.commands if words[0] == "systemd-cryptenroll"]
    # With the old binding in place nothing would be enrolled: another TPM has the same policy.
    assert "--wipe-slot=tpm2" in enrolled[0]
    assert "--tpm2-device=auto --tpm2-pcrs=7+15" in enrolled[1]
    assert not (tmp_path / "run/private/opened-with").exists()


def test_with_other_keys_in_secure_boot_that_is_left_to_the_owner(
    world: World, with_state: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firmware, "only_our_keys", lambda certificate: False)
    with_state(opened_by="recovery-key")
    (tmp_path / "run/private/opened-with").write_text(KEY)
    storage.recovery()
    assert not world.ran("--wipe-slot=tpm2")
    storage.reseal()
    assert world.ran("--wipe-slot=tpm2")


def test_a_failing_reseal_does_not_hide_the_key(world: World, with_state: Callable[..., None], key: Path) -> None:
    with_state(opened_by="recovery-key")
    storage.OPENED_WITH.write_text(KEY)
    world.answers["systemd-cryptenroll"] = (1, "", "TPM in lockout mode")
    storage.recovery()
    assert world.ran(f"    {KEY}")
    assert storage.OPENED_WITH.exists()


def test_there_is_nothing_to_bind_when_the_tpm_has_opened_it(world: World, with_state: Callable[..., None]) -> None:
    with_state()
    with pytest.raises(DiskFailed, match="nothing to bind anew"):
        storage.reseal()


def signature_list(*certificates: bytes) -> bytes:
    body = b"".join(bytes(16) + each for each in certificates)
    each = 16 + len(certificates[0])
    return b"\x27\0\0\0" + bytes(16) + struct.pack("<III", 28 + len(body), 0, each) + body


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"db-d719b2cb-3d3a-4596-a3bc-dad00e67656f": signature_list(b"ours", b"more")}, False),
        ({"db-d719b2cb-3d3a-4596-a3bc-dad00e67656f": signature_list(b"ours") + signature_list(b"more")[4:]}, False),
        ({"KEK-8be4df61-93ca-11d2-aa0d-00e098032b8c": signature_list(b"else")}, False),
        ({"PK-8be4df61-93ca-11d2-aa0d-00e098032b8c": b""}, False),
        ({"SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": b"\6\0\0\0\0"}, False),
    ],
)
def test_only_our_keys(tmp_path: Path, change: dict[str, bytes], expected: bool) -> None:
    (tmp_path / "our.crt").write_text(ssl.DER_cert_to_PEM_cert(b"ours"))
    (tmp_path / "variables").mkdir()
    found = {
        "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": b"\6\0\0\0\1",
        **{f"{name}-8be4df61-93ca-11d2-aa0d-00e098032b8c": signature_list(b"ours") for name in ("PK", "KEK")},
        "db-d719b2cb-3d3a-4596-a3bc-dad00e67656f": signature_list(b"ours"),
    }
    for name, value in {**found, **change}.items():
        (tmp_path / "variables" / name).write_bytes(value)
    assert firmware.only_our_keys(tmp_path / "our.crt", tmp_path / "variables") is expected
    assert not firmware.only_our_keys(tmp_path / "none.crt", tmp_path / "variables")


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
