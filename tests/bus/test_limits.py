"""A disk that is full, a machine without workers, a second daemon, wrong configuration, and the units' sandbox."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bus import world as worlds
from tests.bus.client import Refused, connected
from tests.bus.world import CHECKOUT, DATA, World

MIB = 1 << 20
UNITS = DATA / "usr/lib/systemd/system"


@pytest.fixture(scope="module")
def world(tiny_model: Path) -> Iterator[World]:
    """With a state directory of 8 MiB, and without polkit and workers."""
    if worlds.missing():
        pytest.fail(worlds.missing())
    with worlds.temporary_directory() as directory:
        made = World(directory, state_bytes=8 * MIB)
        made.prepare()
        made.configure("[models]\ndisk_reserve_bytes = 0\n")
        made.add_builtin("assistant", "1", tiny_model)
        try:
            made.start_bus()
            made.start_daemon()
            yield made
        finally:
            made.stop()


async def test_a_full_disk_is_said_and_nothing_stays(world: World, tiny_model: Path) -> None:
    before = world.state_files()
    size = os.path.getsize(tiny_model)  # noqa: ASYNC240, PTH202
    assert size < 8 * MIB < 10 * size
    async with connected(world.address) as client:
        imported = 0
        with tiny_model.open("rb") as file, pytest.raises(Refused) as caught:  # noqa: PT012
            for index in range(20):
                body = 0, f"copy{index}", dict[str, object]()
                job = await client.call("Manager", "ImportModel", "hsa{sv}", *body, fds=(file.fileno(),))
                values = await client.job(job)
                if values["State"] != "done":
                    raise Refused(*values["Error"])
                imported += 1
        assert caught.value.name == "org.ai_assistant1.Error.NoSpace"
        assert imported >= 1
        files = world.state_files()
        assert not [each for each in files if ".partial" in each]
        assert len([each for each in files if each.endswith("model.gguf")]) == imported
        for index in range(imported):
            path = await client.call("Manager", "FindModel", "s", f"copy{index}")
            await client.call("Model", "Remove", path=path)
        assert world.state_files() == before
        with tiny_model.open("rb") as file:
            job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "again", {}, fds=(file.fileno(),))
        assert (await client.job(job))["State"] == "done"


async def test_without_workers(world: World) -> None:
    async with connected(world.address) as client:
        with pytest.raises(Refused) as caught:
            await client.call("Inference", "Generate", "ssa{sv}", "assistant", "hello", {})
        assert caught.value.name == "org.ai_assistant1.Error.WorkerCrashed"
        assert "no worker can be started" in caught.value.text
        with pytest.raises(Refused, match="WorkerCrashed"):
            await client.call("Inference", "Generate", "ssa{sv}", "assistant", "hello", {})
        results = {name: passed for name, passed, _ in await client.call("Manager", "SelfTest")}
        assert results["inference"] is False
    assert world.alive


def test_a_second_daemon_says_so_and_ends(world: World) -> None:
    command = [sys.executable, "-m", "ai_assistant.daemon", "--root", world.directory / "root"]
    command += ["--bus-address", world.address, "--state-directory", world.directory / "run"]
    done = subprocess.run(
        world.inside(list(map(str, command)), user=worlds.DAEMON_UID),
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "owned by another process" in done.stderr
    assert "Traceback" not in done.stderr
    assert world.alive


@pytest.mark.parametrize(
    ("text", "status", "says"), [("[models]\nnope = 1\n", 78, "unknown key 'models.nope'"), ("", 1, "cannot connect")]
)
def test_what_keeps_it_from_starting(tmp_path: Path, text: str, status: int, says: str) -> None:
    if worlds.missing():
        pytest.fail(worlds.missing())
    folder = tmp_path / "etc/ai-assistant/config.d"
    folder.mkdir(parents=True)
    (folder / "a.toml").write_text(text)
    command = [sys.executable, "-m", "ai_assistant.daemon", "--root", str(tmp_path)]
    command += ["--bus-address", f"unix:path={tmp_path}/none", "--state-directory", str(tmp_path / "state")]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, says in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "unit", ["ai-assistantd.service", "ai-assistant-worker@.service", "ai-assistant-gpu-worker@.service"]
)
def test_units_are_sandboxed(unit: str) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(UNITS / unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_units_are_valid() -> None:
    names = [str(path) for path in UNITS.iterdir() if path.is_file()]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, timeout=60)
    ours = [each for each in done.stderr.splitlines() if "ai-assistant" in each]
    assert ours == []
