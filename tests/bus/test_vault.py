"""The real vault on a private system bus with the real polkit: who sees the recovery key, and where it goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from dbus_fast import Message, MessageType

from ai_assistant.tee import vault
from tests.bus import world as worlds
from tests.bus.client import connected
from tests.bus.test_objects import shape
from tests.bus.world import World, wait_for
from tests.support.recovery import ENCRYPTED, KEY, PLAIN, describe, flag, key_waits

NAME, PATH = vault.BUS_NAME, vault.PATH
CALL = ("call", NAME, PATH, NAME)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Bus and polkit, and a machine whose recovery key waits; a test starts its vault itself."""
    reason = worlds.missing()
    if reason:
        pytest.fail(reason)
    with worlds.temporary_directory() as directory:
        made = World(directory)
        made.prepare()
        describe(made.directory / "root", ENCRYPTED)
        key_waits(made.directory / "root")
        try:
            made.start_bus()
            made.start_polkit()
            yield made
            assert KEY not in made.log, "the key is in a log"
        finally:
            made.stop()


def root(world: World) -> Path:
    return world.directory / "root"


def properties(world: World, user: str = "outsider") -> dict[str, object]:
    done = world.busctl(
        *("--json=short", "call", NAME, PATH, "org.freedesktop.DBus.Properties", "GetAll", "s", NAME), user=user
    )
    assert done.returncode == 0, done.stderr
    return {key: each["data"] for key, each in json.loads(done.stdout)["data"][0].items()}


async def test_live_introspection_is_the_xml(world: World) -> None:
    world.start_vault()
    async with connected(world.address) as client:
        reply = await client.bus.call(Message(NAME, PATH, "org.freedesktop.DBus.Introspectable", "Introspect"))
    assert reply is not None
    assert reply.message_type is MessageType.METHOD_RETURN
    live = {each.get("name"): each for each in ElementTree.fromstring(reply.body[0]).findall("interface")}
    written = ElementTree.parse(Path(vault.__file__).parent / f"{NAME}.xml").find("interface")
    assert written is not None
    assert shape(live[NAME]) == shape(written)
    assert "org.freedesktop.DBus.ObjectManager" not in live


def test_everybody_may_read_how_it_is(world: World) -> None:
    world.start_vault()
    assert properties(world) == {
        "StorageEncryption": "tpm2",
        "StorageReason": "",
        "OpenedBy": "tpm2",
        "RecoveryKeyPending": True,
        "SecureBoot": "on",
        "HasTPM": True,
    }
    describe(root(world), PLAIN)
    found = properties(world)
    assert (found["StorageEncryption"], found["StorageReason"]) == ("none", "this machine has no TPM")
    (root(world) / "run/ai-assistant-storage/state.json").write_bytes(b'{"encryption":"tp')
    found = properties(world)
    assert (found["StorageEncryption"], found["SecureBoot"], found["HasTPM"]) == ("unknown", "unknown", False)
    assert "no JSON" in str(found["StorageReason"])


@pytest.mark.parametrize(("user", "allowed"), [("outsider", False), ("member", False), ("admin", True), ("root", True)])
def test_only_administrators_see_and_acknowledge(world: World, user: str, allowed: bool) -> None:
    world.start_vault("--reseal", "true", "--refresh", "true")
    answers = {member: world.vault(member, user) for member in ("GetRecoveryKey", "Reseal", "AcknowledgeRecoveryKey")}
    for member, answer in answers.items():
        assert ("not allowed" not in answer) == allowed, (member, answer)
        assert allowed or "group ai-assistant-admin" in answer
    assert (KEY in answers["GetRecoveryKey"]) == allowed
    assert properties(world)["RecoveryKeyPending"] is not allowed
    assert (root(world) / "var/lib/ai-assistant-recovery/key").exists() is not allowed


def test_without_polkit_only_root_may(world: World) -> None:
    polkit = next(each for each in world.processes if "polkitd" in str(each.args))
    polkit.terminate()
    polkit.wait(15)
    world.start_vault()
    assert "not allowed" in world.vault("GetRecoveryKey", "admin")
    assert KEY in world.vault("GetRecoveryKey")


def test_an_acknowledged_key_is_gone_and_the_console_is_told(world: World) -> None:
    told = world.directory / "told"
    process = world.start_vault("--refresh", f"touch {told}")
    assert world.vault("AcknowledgeRecoveryKey", "admin") == ""
    wait_for(told.exists, "the console")
    assert not flag(root(world)).exists()
    for member in ("GetRecoveryKey", "AcknowledgeRecoveryKey"):
        assert "no recovery key waits" in world.vault(member)
    assert properties(world)["RecoveryKeyPending"] is False
    assert process.poll() is None


def test_of_two_at_once_one_acknowledges(world: World) -> None:
    world.start_vault("--refresh", "true")
    command = world.inside(["busctl", f"--address={world.address}", *CALL, "AcknowledgeRecoveryKey"])
    callers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [caller.communicate(timeout=60)[1] for caller in callers]
    assert sorted(caller.returncode for caller in callers) == [0, 1, 1, 1]
    assert sum("no recovery key waits" in each for each in said) == 3


def test_a_full_disk_is_said_and_the_key_still_waits(world: World) -> None:
    folder = root(world) / "var/lib/ai-assistant-recovery"
    # Room for the folder and the key, and for no other file.
    mount = f"mount -t tmpfs -o nr_inodes=2,mode=700 tmpfs {folder}; echo {KEY} | (umask 077; cat >{folder}/key)"
    world.start_vault(first=mount)
    answer = world.vault("AcknowledgeRecoveryKey", "admin")
    assert "the disk is full" in answer
    assert "free some space" in answer
    assert KEY in world.vault("GetRecoveryKey", "admin")


def test_damaged_files_are_named_and_the_next_call_works(world: World) -> None:
    world.start_vault("--refresh", "true")
    path = root(world) / "var/lib/ai-assistant-recovery/key"
    for content in (b"", b"\0" * 100, b"c" * (64 << 20)):
        path.write_bytes(content)
        for member in ("GetRecoveryKey", "AcknowledgeRecoveryKey"):
            assert "cannot be used" in world.vault(member)
    path.write_text(KEY + "\n")
    path.chmod(0o644)
    assert "others could have read it" in world.vault("GetRecoveryKey")
    path.chmod(0o600)
    assert KEY in world.vault("GetRecoveryKey")


def test_wrong_calls_are_refused(world: World) -> None:
    process = world.start_vault()
    for arguments in (("GetRecoveryKey", "s", "x"), ("Reseal", "ay", "3", "1", "2", "3"), ("Unseal",)):
        assert world.busctl(*CALL, *arguments).returncode != 0
    assert world.busctl("set-property", NAME, PATH, NAME, "RecoveryKeyPending", "b", "false").returncode != 0
    assert world.busctl("call", NAME, "/", NAME, "GetRecoveryKey").returncode != 0
    assert process.poll() is None
    assert KEY in world.vault("GetRecoveryKey")


async def flood(address: str) -> None:
    """Messages that are far too large, and descriptors that nobody asked for."""
    async with connected(address) as client:
        for _ in range(20):
            large = Message(NAME, PATH, NAME, "Reseal", signature="s", body=["x" * (16 << 20)])
            with Path("/dev/null").open("rb") as file:  # noqa: ASYNC230
                number = file.fileno()
                lent = Message(NAME, PATH, NAME, "GetRecoveryKey", signature="h", body=[0], unix_fds=[number])
                for message in (large, lent):
                    reply = await client.bus.call(message)
                    assert reply is not None
                    assert reply.message_type is MessageType.ERROR


def test_large_messages_and_descriptors_leave_nothing_behind(world: World) -> None:
    process = world.start_vault()
    properties(world)
    fds = Path(f"/proc/{process.pid}/fd")
    before = len(list(fds.iterdir()))
    asyncio.run(flood(world.address))
    wait_for(lambda: len(list(fds.iterdir())) == before, "the end of the descriptors")
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"peak {peak} KiB")
    # The unit gives it 128 MiB.
    assert peak < 96 << 10, status


def test_reseal_tells_what_the_tool_said(world: World) -> None:
    tool = world.directory / "tool"
    says = f"storage: the TPM is locked out ({KEY})\n  hint: switch the machine off for\n  ten minutes"
    tool.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 3\n")
    tool.chmod(0o755)
    world.start_vault("--reseal", str(tool))
    done = world.busctl(*CALL, "Reseal", user="admin")
    assert done.returncode != 0
    assert "storage: the TPM is locked out ((a recovery key))" in done.stderr
    assert "(hint: switch the machine off for ten minutes)" in done.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "the tool ended with status 3 and said nothing"),
        ("kill -9 $$", "the tool ended with status -9 and said nothing"),
        ("yes | head -c 50000000; echo; echo the end; exit 1", "the end"),
        ("echo Traceback '(most recent call last):'; echo '  File x'; echo KeyError: 7; exit 1", "failed: KeyError: 7"),
        (r"printf '\377\000\033[2J'; exit 1", "[2J"),
    ],
)
def test_a_tool_that_behaves_badly_is_one_error(world: World, script: str, said: str) -> None:
    tool = world.directory / "tool"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    process = world.start_vault("--reseal", str(tool))
    done = world.busctl(*CALL, "Reseal")
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr) < 1000
    assert "\x1b" not in done.stderr
    assert process.poll() is None
    assert KEY in world.vault("GetRecoveryKey")


def test_no_tool_is_an_error_too(world: World) -> None:
    world.start_vault("--reseal", "/nowhere/tool")
    assert "cannot run /nowhere/tool: No such file" in world.vault("Reseal")


def test_one_reseal_at_a_time_and_it_outlives_its_caller(world: World) -> None:
    began, done = world.directory / "began", world.directory / "done"
    tool = world.directory / "tool"
    tool.write_text(
        f"#!/bin/sh\ntouch {began}; while [ ! -e {world.directory}/go ]; do sleep 0.1; done; touch {done}\n"
    )
    tool.chmod(0o755)
    process = world.start_vault("--reseal", str(tool), "--idle", "1")
    caller = subprocess.Popen(world.inside(["busctl", f"--address={world.address}", *CALL, "Reseal"]))
    wait_for(began.exists, "the tool")
    assert "being bound to the TPM already" in world.vault("Reseal")
    caller.terminate()
    caller.wait(15)
    # Longer than it stays without calls.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    (world.directory / "go").touch()
    wait_for(done.exists, "the tool's end")
    assert process.wait(15) == 0


def test_the_daemon_says_so_too_and_sees_no_key(world: World) -> None:
    world.start_vault("--refresh", "true")
    world.start_daemon()

    def manager(name: str) -> object:
        return world.property("/org/ai_assistant1", "Manager", name)

    assert (manager("StorageEncryption"), manager("StorageReason"), manager("RecoveryKeyPending")) == ("tpm2", "", True)
    assert world.vault("AcknowledgeRecoveryKey", "admin") == ""
    assert manager("RecoveryKeyPending") is False
    describe(root(world), PLAIN)
    assert (manager("StorageEncryption"), manager("StorageReason")) == ("none", "this machine has no TPM")
    assert KEY not in world.call("GetStatus", user="outsider")


def test_it_leaves_when_nobody_asks(world: World) -> None:
    process = world.start_vault("--idle", "1")
    assert KEY in world.vault("GetRecoveryKey")
    assert process.wait(15) == 0
    assert not world.owned(NAME)
    # And comes again.
    process = world.start_vault()
    assert KEY in world.vault("GetRecoveryKey")
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


def test_killed_half_way_the_next_one_tidies_up(world: World) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from ai_assistant.tee.vault.recovery import Recovery\n"
        "os.unlink = lambda *a, **m: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Recovery(Path(sys.argv[1])).acknowledge()"
    )
    done = subprocess.run([sys.executable, "-c", script, root(world)], cwd=worlds.CHECKOUT, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert flag(root(world)).exists()
    world.start_vault()
    assert properties(world)["RecoveryKeyPending"] is False
    assert not flag(root(world)).exists()
    assert {each.name for each in (root(world) / "var/lib/ai-assistant-recovery").iterdir()} == {"acknowledged"}


def test_the_key_is_in_no_core_and_no_argument(world: World) -> None:
    process = world.start_vault()
    world.vault("GetRecoveryKey")
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert "Max core file size        0                    0 " in limits
    for name in ("cmdline", "environ"):
        assert KEY.encode() not in Path(f"/proc/{process.pid}/{name}").read_bytes()


def test_a_second_one_is_refused(world: World) -> None:
    world.start_vault()
    command = [sys.executable, "-m", "ai_assistant.tee.vault", "--bus-address", world.address]
    second = world.spawn("second", [*command, "--root", root(world)], env={"PYTHONPATH": str(worlds.CHECKOUT)})
    assert second.wait(30) == 1
    assert "is owned by another process" in world.log
