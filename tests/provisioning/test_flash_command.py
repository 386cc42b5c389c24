"""`image/flash` as a person or a script meets it."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from image import flash
from tests.provisioning.world import World
from tests.support.disk_image import MIB

CHECKOUT = Path(__file__).resolve().parents[2]
DISK = 32 * MIB


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target.raw"
    path.write_bytes(random.Random(1).randbytes(MIB))
    with path.open("r+b") as file:
        file.truncate(DISK)
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as it stands in the checkout, with nothing but the standard library."""
    command = [CHECKOUT / "image/flash", *arguments]
    path = f"{Path(sys.executable).resolve().parent}:/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={"PATH": path}, check=False
    )


def test_it_writes_and_says_so(image: Path, target: Path) -> None:
    done = run(image, target, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "image.raw written and verified in" in done.stdout
    assert target.read_bytes().startswith(image.read_bytes())


def test_json(image: Path, target: Path) -> None:
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    done = run(image, target, "--yes", "--json", "--sha256", digest)
    found = json.loads(done.stdout)
    assert (found["device"], found["verified"], found["image_bytes"]) == (str(target), True, image.stat().st_size)
    wrong = run(image, target, "--yes", "--json", "--sha256", "00")
    error = json.loads(wrong.stderr)["error"]
    assert (wrong.returncode, error["name"], wrong.stdout) == (1, "InvalidImage", "")


def test_without_a_terminal_it_needs_yes(image: Path, target: Path) -> None:
    before = target.read_bytes()
    done = run(image, target)
    assert done.returncode == 2
    assert "say --yes" in done.stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "usage"),
        (("one",), 2, "usage"),
        (("a", "b", "c"), 2, "usage"),
        (("--list", "a"), 2, "usage"),
        (("--profile", "gaming", "/dev/null"), 2, "invalid choice"),
        (("/nowhere.raw", "/dev/null", "--yes"), 1, "/nowhere.raw cannot be read"),
    ],
)
def test_wrong_usage_and_input(arguments: tuple[str, ...], status: int, said: str) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sda", "is in use: .*sda1 is mounted on /media/stick"),
        ("sda1", "is a partition of"),
        ("sdb", "that this system runs from"),
        ("sdc", "is too small"),
        ("sdz", "there is no"),
    ],
)
def test_refusals(image: Path, world: World, capfd: pytest.CaptureFixture[str], name: str, said: str) -> None:
    for disk, size in (("sda", DISK), ("sdb", DISK), ("sdc", MIB)):
        world.disk(disk, size)
    world.mount(world.partition("sda", 1), "/media/stick")
    world.mount(world.partition("sdb", 1), "/")
    node = world.root / "dev" / name
    assert flash.main([str(image), str(node), "--yes"], world.machine) == 1
    error = capfd.readouterr().err
    assert re.search(said, error)
    assert "hint: " in error


def test_force_writes_to_a_mounted_disk_and_not_to_a_small_one(image: Path, world: World) -> None:
    sda, sdb = world.disk("sda", DISK), world.disk("sdb", MIB)
    world.mount("sda", "/media/stick")
    assert flash.main([str(image), str(sda), "--yes", "--force"], world.machine) == 0
    assert sda.read_bytes().startswith(image.read_bytes())
    assert flash.main([str(image), str(sdb), "--yes", "--force"], world.machine) == 1


def test_the_list(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.disk("sda", DISK, device__model="Stick")
    world.disk("sdb", DISK)
    world.mount("sdb", "/")
    assert flash.main(["--list", "--json"], world.machine) == 0
    rows = {Path(row["device"]).name: row for row in json.loads(capfd.readouterr().out)}
    assert (rows["sda"]["usable"], rows["sda"]["model"]) == (True, "Stick")
    assert rows["sdb"]["reasons"] == ["this system runs from it: /"]
    flash.main(["--list"], world.machine)
    assert "no: this system runs from it: /" in capfd.readouterr().out


def on_a_terminal(answer: str, *arguments: str | Path) -> tuple[int, str]:
    """Exit status, and what was seen, when a person types an answer."""
    process, terminal = pty.fork()
    if process == 0:
        # Who runs the tests in the background ignores Ctrl-C, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(CHECKOUT / "image/flash", ["flash", *map(str, arguments)])
    seen = b""
    try:
        while data := os.read(terminal, 4096):
            seen += data
            if answer and b"to go on: " in seen:
                os.write(terminal, answer.encode())
                answer = ""
    except OSError:  # the terminal is closed at the end
        pass
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), seen.decode()


def test_it_asks_for_the_name_and_shows_progress(image: Path, target: Path) -> None:
    before = target.read_bytes()
    for wrong in ("y\n", "\n", "/dev/sda\n"):
        status, seen = on_a_terminal(wrong, image, target)
        assert status == 1
        assert "nothing was changed" in seen
    assert "Everything on it will be lost." in seen
    assert target.read_bytes() == before
    status, seen = on_a_terminal("target.raw\n", image, target)
    assert status == 0
    assert "100% ████" in seen
    assert "written and verified" in seen
    assert target.read_bytes().startswith(image.read_bytes())


def test_ctrl_c_at_the_question(image: Path, target: Path) -> None:
    status, seen = on_a_terminal("\x03", image, target)
    assert status == 130
    assert "interrupted; nothing was changed" in seen


def test_ctrl_c_while_writing_says_what_is_left(
    image: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ai_assistant.provisioning.writing.Target.sync", interrupted)
    assert flash.main([str(image), str(target), "--yes"]) == 130
    assert "is now unusable until it is flashed again" in capfd.readouterr().err
