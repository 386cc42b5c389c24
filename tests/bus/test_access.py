"""Who may do what, with the real polkit, for users in the two groups and in neither."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dbus_fast import Variant

from tests.bus import world as worlds
from tests.bus.client import ROOT, Client
from tests.bus.world import World

POLKIT = "org.freedesktop.PolicyKit1"


def import_null(world: World, user: str) -> str:
    """The name of the error that somebody gets who imports /dev/null, which can be no model."""
    script = f"""
import asyncio
from tests.bus.client import Refused, connected
async def main():
    async with connected({world.address!r}) as client:
        with open("/dev/null", "rb") as file:
            try:
                await client.call("Manager", "ImportModel", "hsa{{sv}}", 0, "x", {{}}, fds=(file.fileno(),))
            except Refused as refused:
                print(refused.name)
asyncio.run(main())
"""
    command = world.inside([sys.executable, "-c", script], user=worlds.USERS.get(user, 0))
    env = {**os.environ, "PYTHONPATH": str(worlds.CHECKOUT)}
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("user", ["outsider", "member", "admin", "root"])
def test_everybody_may_read(world: World, user: str) -> None:
    assert "version" in world.call("GetStatus", user=user)
    assert world.call("ListModels", user=user).startswith("ao")


@pytest.mark.parametrize(
    ("user", "infer", "load", "import_"),
    [
        ("outsider", False, False, False),
        ("member", True, True, False),
        ("admin", True, True, True),
        ("root", True, True, True),
    ],
)
def test_groups_decide(world: World, user: str, infer: bool, load: bool, import_: bool) -> None:
    denied = "not allowed"
    answer = world.call("Generate", "ssa{sv}", "nope", "hello", "0", user=user, interface="Inference")
    assert (denied not in answer) == infer, answer
    assert ("there is no model" in answer) == infer
    answer = world.call("GetLog", "us", "5", "loud", user=user)
    assert (denied not in answer) == load, answer
    answer = import_null(world, user)
    assert answer == "org.ai_assistant1.Error." + ("InvalidModel" if import_ else "NotAuthorized")


def test_the_denial_says_what_to_do(world: World) -> None:
    answer = world.call("Generate", "ssa{sv}", "nope", "hello", "0", user="outsider", interface="Inference")
    assert "group ai-assistant)" in answer


def test_without_polkit_only_root_may(tiny_model: Path) -> None:
    if worlds.missing():
        pytest.fail(worlds.missing())
    with worlds.temporary_directory() as directory:
        world = World(directory)
        world.prepare()
        try:
            world.start_bus()
            world.start_daemon()
            for user, yes in (("admin", False), ("member", False), ("root", True)):
                answer = world.call("Generate", "ssa{sv}", "nope", "x", "0", user=user, interface="Inference")
                assert ("not allowed" not in answer) == yes, answer
            assert "Health" in world.busctl("introspect", "org.ai_assistant1", ROOT, user="outsider").stdout
        except AssertionError:
            print(world.log)
            raise
        finally:
            world.stop()


def _polkit_pid(world: World) -> int:
    answer = world.busctl(
        "call", "org.freedesktop.DBus", "/", "org.freedesktop.DBus", "GetConnectionUnixProcessID", "s", POLKIT
    )
    return int(answer.stdout.split()[-1])


def test_polkit_that_dies_of_a_question_is_asked_again(tiny_model: Path) -> None:
    if worlds.missing():
        pytest.fail(worlds.missing())
    with worlds.temporary_directory() as directory:
        world = World(directory)
        world.prepare()
        try:
            world.start_bus()
            world.start_polkit()
            world.start_daemon()
            pid = _polkit_pid(world)
            os.kill(pid, signal.SIGSTOP)
            with ThreadPoolExecutor(2) as pool:
                asked = [
                    pool.submit(world.call, "Generate", "ssa{sv}", "nope", "x", "0", user=user, interface="Inference")
                    for user in ("member", "outsider")
                ]
                time.sleep(1.5)
                os.kill(pid, signal.SIGKILL)
                member, outsider = (each.result(30) for each in asked)
            assert "not allowed" not in member, member
            assert "not allowed" in outsider, outsider
            assert _polkit_pid(world) != pid
        except AssertionError:
            print(world.log)
            raise
        finally:
            world.stop()


def test_an_action_that_nobody_registered_is_denied(tiny_model: Path) -> None:
    if worlds.missing():
        pytest.fail(worlds.missing())
    with worlds.temporary_directory() as directory:
        world = World(directory)
        world.prepare()
        (directory / "actions" / "org.ai-assistant1.policy").unlink()
        (directory / "rules" / "50-ai-assistant.rules").unlink()
        try:
            world.start_bus()
            world.start_polkit()
            world.start_daemon()
            answer = world.call("Generate", "ssa{sv}", "nope", "x", "0", user="admin", interface="Inference")
            assert "not allowed" in answer
        finally:
            world.stop()


async def test_a_transient_model_is_not_lent_to_others(world: World, client: Client, tiny_model: Path) -> None:
    with tiny_model.open("rb") as file:
        body = 0, {"name": Variant("s", "mine")}
        path, name = await client.call("Manager", "OpenModel", "ha{sv}", *body, fds=(file.fileno(),))
    assert path in await client.call("Manager", "ListModels")
    for user in ("member", "admin"):
        assert path not in world.call("ListModels", user=user)
        assert "there is no model" in world.call("FindModel", "s", name, user=user)
        asked = world.call("Generate", "ssa{sv}", name, "hello", "0", user=user, interface="Inference")
        assert "there is no model" in asked
        assert "there is no model" in world.call("Load", "a{sv}", "0", path=path, interface="Model", user=user)
    assert "there is no model" in world.call("FindModel", "s", "mine")
    # What others do to it is announced all the same, and the object stays readable.
    assert world.property(path, "Model", "Name") == name
    await client.call("Model", "Remove", path=path)
