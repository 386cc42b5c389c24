"""`install` as a person or a script meets it; tests/provisioning has what it does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ai_assistant.provisioning import gpt, install
from ai_assistant.provisioning.disks import Machine
from tests.cli.conftest import Cli
from tests.provisioning.test_install import FILES, LARGE, boot_partition
from tests.provisioning.world import World
from tests.support.disk_image import write_image


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """An appliance that runs from a stick, and us as its root."""
    (tmp_path / "machine").mkdir()
    made = World(tmp_path / "machine")
    made.appliance(write_image(tmp_path / "stick.raw"))
    monkeypatch.setattr("ai_assistant.provisioning.disks.Machine", lambda: made.machine)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return made


def test_only_root_may(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = cli("install", "/dev/sdb", "--json")
    assert result.status == 3
    assert result.error["name"] == "NotAuthorized"
    assert "sudo" in result.error["hint"]


@pytest.mark.parametrize("args", [(), ("/dev/sdb", "--list"), ("/dev/sdb", "/dev/sdc")])
def test_either_a_disk_or_the_list(cli: Cli, world: World, args: tuple[str, ...]) -> None:
    assert cli("install", *args).status == 2


def test_not_on_an_appliance(cli: Cli, world: World) -> None:
    (world.root / "proc/self/mountinfo").unlink()
    result = cli("install", "--list", "--json")
    assert (result.status, result.error["name"]) == (1, "NotSupported")


def test_the_list_says_why_not(cli: Cli, world: World) -> None:
    world.disk("nvme0n1", LARGE, place="pci0/nvme/nvme0", device__model="WD")
    world.disk("sdb", 1 << 20)
    rows = {Path(row["device"]).name: row for row in cli("install", "--list", "--json").json}
    assert {name: row["usable"] for name, row in rows.items()} == {"nvme0n1": True, "sda": False, "sdb": False}
    assert rows["sda"]["reasons"][0] == "this system runs from it: /"
    assert "too small" in rows["sdb"]["reasons"][0]
    text = cli("install", "--list")
    assert text.status == 0
    assert "root_1.2.3 runs from" in text.err
    assert len(text.out.splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "error"),
    [("sda", "DiskInUse"), ("sda1", "NotADisk"), ("sdb", "DiskTooSmall"), ("sdz", "NoSuchDisk"), ("disk", "NotADisk")],
)
def test_refusals_have_names(cli: Cli, world: World, name: str, error: str) -> None:
    world.disk("sdb", 1 << 20)
    result = cli("install", str(world.root / "dev" / name), "--yes", "--json")
    assert (result.status, result.out, result.error["name"]) == (1, "", error)
    assert result.error["hint"]


def test_without_a_terminal_it_needs_yes(cli: Cli, world: World) -> None:
    path = world.disk("sdb", LARGE)
    result = cli("install", str(path))
    assert result.status == 2
    assert "would be erased" in result.err
    assert "--yes" in result.err


def test_another_name_is_no_agreement(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = world.disk("sdb", LARGE)
    asked: list[str] = []
    monkeypatch.setattr("ai_assistant.cli.disk.can_ask", lambda out: True)

    class Person:
        def readline(self) -> str:
            asked.append("")
            return "yes\n"

    monkeypatch.setattr("sys.stdin", Person())
    monkeypatch.setattr(install, "install", lambda *_, **__: pytest.fail("it must not go on"))
    result = cli("install", str(path))
    assert result.status == 1
    assert asked == [""]
    assert "Everything on it will be lost" in result.err
    assert "nothing was changed" in result.err


def test_ctrl_c_says_what_is_left(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("interrupted: /dev/sdb is now unusable")

    monkeypatch.setattr(install, "install", interrupted)
    path = world.disk("sdb", LARGE)
    result = cli("install", str(path), "--yes", "--json")
    assert result.status == 130
    assert result.error["message"] == "interrupted: /dev/sdb is now unusable"


@pytest.mark.tools
def test_it_installs_and_says_so(
    cli: Cli, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = World(tmp_path)
    esp = boot_partition(tmp_path_factory.mktemp("esp"), FILES)
    made.appliance(write_image(tmp_path_factory.mktemp("image") / "stick.raw", esp=esp))
    monkeypatch.setattr("ai_assistant.provisioning.disks.Machine", lambda: Machine(tmp_path))
    path = made.disk("nvme0n1", LARGE, place="pci0/nvme/nvme0")
    found = json.loads(cli("install", str(path), "--yes", "--json").out)
    assert (found["device"], found["installed"], found["verified"]) == (str(path), "root_1.2.3", True)
    content = path.read_bytes()
    table = gpt.read(lambda offset, size: content[offset : offset + size])
    assert [str(each.uuid) for each in table.partitions] == [each["uuid"] for each in found["partitions"]]
    assert "installed root_1.2.3 on" in cli("install", str(path), "--yes").out


def test_completion_offers_free_disks_only(world: World) -> None:
    from ai_assistant.cli.install import complete_disk

    world.disk("sdb", LARGE)
    assert complete_disk("") == [str(world.root / "dev/sdb")]
    assert complete_disk("/nothing") == []
