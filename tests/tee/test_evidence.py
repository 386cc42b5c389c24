"""What is read of a machine, and what is said where it is not there."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.errors import AlreadyExists, InvalidArgument
from ai_assistant.tee import evidence
from ai_assistant.tee.errors import (
    BadSignature,
    CannotVerify,
    InvalidMeasurements,
    NeedsRoot,
    NoEventLog,
    NoMeasurements,
    NoTPM,
)
from ai_assistant.tee.eventlog import parse_pcrs
from ai_assistant.tee.evidence import KEY, Machine, Published, choose, pcrs_json, save
from tests.tee import boots
from tests.tee.boots import COMMAND_LINE, UKI, Boot
from tests.tee.machines import MOUNTS, TABLE, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_everything_is_read(world: World) -> None:
    machine, wanted = world.machine(), boots.measure(Boot())
    assert machine.values() == (wanted.pcrs, wanted.system_log)
    assert machine.event_log() == wanted.log
    running = machine.running()
    assert (running.command_line, running.uki, running.root.table) == (COMMAND_LINE, UKI, TABLE)
    assert world.ran == [["dmsetup", "table", "--major", "254", "--minor", "0"]]
    assert machine.key() == boots.public("release")
    assert [each.name for each in machine.published()] == ["measurements-0.1.0.json"]


def test_values_as_json_come_back(world: World) -> None:
    values, _ = world.machine().values()
    assert parse_pcrs(pcrs_json(values)) == values


def test_no_log_of_systemd_is_none(world: World) -> None:
    world.remove("run/log/systemd/tpm2-measure.log")
    assert world.machine().values()[1] is None


def test_values_are_read_while_nobody_extends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_LOCK_TRIES", 100)
    path = world.root / "run/log/systemd/tpm2-measure.log"
    with path.open("ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.append(world.machine().values()))
        reader.start()
        reader.join(0.3)
        assert not got
        writer.write(boots.system_record(11, b"shutdown"))
        writer.flush()
        fcntl.flock(writer, fcntl.LOCK_UN)
    reader.join()
    assert got[0][1].endswith(boots.system_record(11, b"shutdown"))


def test_a_lock_that_is_never_given_back_does_not_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_LOCK_TRIES", 2)
    with (world.root / "run/log/systemd/tpm2-measure.log").open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert world.machine().values()[1] == boots.measure(Boot()).system_log


def test_only_root() -> None:
    with pytest.raises(NeedsRoot) as caught:
        Machine(superuser=False).demand_root()
    assert caught.value.hint == "sudo ai-assistant verify-boot"


MISSING: list[tuple[str, type[CannotVerify], str]] = [
    ("sys/class/tpm", NoTPM, "no TPM"),
    ("sys/class/tpm/tpm0/pcr-sha256", NoTPM, "no SHA-256 bank"),
    ("sys/class/tpm/tpm0/pcr-sha256/7", NoTPM, "no SHA-256 bank"),
    ("sys/kernel/security", NoEventLog, "binary_bios_measurements"),
    ("proc/cmdline", NoMeasurements, "/proc/cmdline"),
    (KEY, NoMeasurements, "release.pub"),
    ("sys/firmware", NoMeasurements, "from which partition"),
    ("dev/disk", NoMeasurements, "not there any more"),
    ("sys/class/block", NoMeasurements, "not there any more"),
    ("efi/loader", NoMeasurements, "no published measurements"),
]


def everything(world: World) -> None:
    machine = world.machine()
    machine.values()
    machine.event_log()
    machine.running()
    machine.key()
    machine.published()


@pytest.mark.parametrize(("name", "error", "words"), MISSING)
def test_what_is_missing_is_named(world: World, name: str, error: type[CannotVerify], words: str) -> None:
    everything(world)
    path = world.root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=words) as caught:
        everything(world)
    assert caught.value.hint or name == "proc/cmdline"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 64, b"00" * 31, b"00" * 200])
def test_values_that_are_none_are_named(world: World, content: bytes) -> None:
    world.write("sys/class/tpm/tpm0/pcr-sha256/7", content)
    with pytest.raises(NoTPM):
        world.machine().values()


def test_an_endless_log_is_read_up_to_its_limit(tmp_path: Path) -> None:
    assert len(evidence.read(Path("/dev/zero"), 1000)) == 1001


@pytest.mark.parametrize("text", ["", "nonsense", "../../etc", "\0" * 40, "x" * 40_000])
def test_a_hostile_variable_names_no_partition(world: World, text: str) -> None:
    world.variable("LoaderDevicePartUUID", text)
    with pytest.raises(NoMeasurements, match="from which partition"):
        world.machine().published()


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("\\EFI\\Linux\\a.efi", "a.efi"),
        ("/EFI/Linux/a+3.efi", "a.efi"),
        ("\\EFI\\Linux\\a+0-3.efi", "a.efi"),
        ("a+b.efi", "a+b.efi"),
        ("", ""),
    ],
)
def test_an_image_name_has_no_boot_counters(world: World, said: str, name: str) -> None:
    world.variable("StubImageIdentifier", said)
    assert world.machine().uki() == name


def test_an_older_stub_lets_the_loader_say_the_name(world: World) -> None:
    world.remove("sys/firmware/efi/efivars/StubImageIdentifier-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
    world.variable("LoaderEntrySelected", "a.efi")
    assert world.machine().uki() == "a.efi"


@pytest.mark.parametrize(
    ("mount", "uuid", "words"),
    [
        ("22 1 8:2 / / rw - ext4 /dev/sda2 rw\n", None, "ext4 on /dev/sda2"),
        ("22 1 254:0 / / ro - ext4 /dev/mapper/x ro\n", b"CRYPT-LUKS2-1-x\n", "CRYPT of the device-mapper"),
        (MOUNTS[0] + "40 22 0:9 / / rw - overlay overlay rw\n", b"CRYPT-VERITY-1-root\n", "overlay on overlay"),
        ("nonsense\n- -\n1 2 3 4 5 -\n", None, "nothing"),
        ("", None, "nothing"),
    ],
)
def test_a_root_without_verity_is_seen(world: World, mount: str, uuid: bytes | None, words: str) -> None:
    world.write("proc/self/mountinfo", mount.encode())
    if uuid is not None:
        world.write("sys/dev/block/254:0/dm/uuid", uuid)
    root = world.machine().running().root
    assert root.table == ""
    assert words in root.source


def test_dmsetup_that_fails_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: object) -> str:
        raise subprocess.CalledProcessError(1, "dmsetup")

    monkeypatch.setattr(world, "run", fails)
    with pytest.raises(NoMeasurements, match="dmsetup"):
        world.machine().running()


def test_a_boot_partition_that_is_not_mounted_is_mounted_for_us_alone(tmp_path: Path) -> None:
    world = World(tmp_path, mounts=MOUNTS[:1])
    places: list[Path] = []

    def mount(place: Path) -> None:
        assert place.stat().st_mode & 0o777 == 0o700
        places.append(place)
        world.publish(place)

    world.mount = mount
    assert [each.raw for each in world.machine().published()] == [boots.published()]
    assert [command[0] for command in world.ran] == ["mount", "umount"]
    assert "ro,nosuid,nodev,noexec" in world.ran[0][4]
    assert world.ran[0][-2:] == [str(tmp_path / "dev/nvme0n1p1"), str(places[0])]
    assert not places[0].exists()


def test_a_boot_partition_that_cannot_be_mounted_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, mounts=MOUNTS[:1])

    def mount(place: Path) -> None:
        raise subprocess.CalledProcessError(32, "mount")

    world.mount = mount
    with pytest.raises(NoMeasurements, match="nvme0n1p1 cannot be mounted"):
        world.machine().published()
    assert list((tmp_path / "run").glob("ai-assistant-esp-*")) == []


@pytest.mark.parametrize("lazy", [True, False])
def test_a_boot_partition_that_stays_mounted_is_not_emptied(tmp_path: Path, lazy: bool) -> None:
    world = World(tmp_path, mounts=MOUNTS[:1])

    def umount(command: Sequence[str]) -> None:
        if not lazy or "--lazy" not in command:
            raise subprocess.CalledProcessError(32, "umount")

    world.mount, world.umount = world.publish, umount
    if lazy:
        assert [each.raw for each in world.machine().published()] == [boots.published()]
    else:
        with pytest.raises(NoMeasurements, match="stays mounted at") as caught:
            world.machine().published()
        assert caught.value.hint.startswith("umount ")
    assert [command[:-1] for command in world.ran[1:]] == [["umount"], ["umount", "--lazy"]]
    left = [path.name for path in (tmp_path / "run").rglob("ai-assistant-esp-*/loader/*/*.json")]
    assert left == ([] if lazy else ["measurements-0.1.0.json"])
    assert bool(list((tmp_path / "run").glob("ai-assistant-esp-*"))) is not lazy


def other(**changes: Any) -> Published:
    raw = boots.published(**changes)
    return Published("measurements-x.json", raw, boots.sign(raw))


def test_the_measurements_are_chosen_by_name_then_by_root_hash_then_as_the_only_ones() -> None:
    key = boots.public("release")
    one, two = other(uki="one.efi", version="1", root_hash="11" * 32), other(uki="two.efi", version="2")
    assert choose([one, two], key, "one.efi", "")[1].version == "1"
    assert choose([one, two], key, "two.efi", "")[1].version == "2"
    assert choose([one, two], key, "x.efi", f"quiet roothash={'11' * 32}")[1].version == "1"
    assert choose([two], key, "x.efi", "roothash=77")[1].version == "2"
    with pytest.raises(NoMeasurements, match=r"for x\.efi") as caught:
        choose([one, two], key, "x.efi", "")
    assert "those of 1, 2" in caught.value.hint


def test_what_is_not_signed_is_never_chosen() -> None:
    key = boots.public("release")
    good, bad = other(uki="good.efi"), other(uki="bad.efi")
    unsigned = Published("unsigned", bad.raw, b"")
    assert choose([unsigned, good], key, "bad.efi", "")[1].uki == "good.efi"
    with pytest.raises(BadSignature, match=r"^unsigned: "):
        choose([unsigned], key, "bad.efi", "")
    with pytest.raises(InvalidMeasurements, match="format 2"):
        choose([other(format=2)], key, "", "")


def test_evidence_is_for_root_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "evidence"
    save(folder, {"log": b"1"})
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "log").stat().st_mode & 0o777 == 0o600
    with pytest.raises(AlreadyExists):
        save(folder, {"log": b"2"})
    with pytest.raises(InvalidArgument):
        evidence.add(folder, {"log": b"2"})
    assert (folder / "log").read_bytes() == b"1"
    with pytest.raises(InvalidArgument, match="cannot write"):
        save(folder / "log", {})


def test_a_folder_of_thousands_of_files_is_not_read_entirely(world: World) -> None:
    for number in range(100):
        world.publish(world.root / "efi", b"{}", f"9.{number}")
    assert len(world.machine().published()) == 64
