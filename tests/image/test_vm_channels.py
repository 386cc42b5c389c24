"""The driver's ends of a machine – console, agent, monitor – against a machine that is played here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from image.vm.agent import Agent, Monitor
from image.vm.console import Console
from image.vm.process import VMError, finish, spawn


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, guest = socket.socketpair()
    with ours, guest:
        yield ours, guest


@pytest.fixture
def console(tmp_path: Path, ends: tuple[socket.socket, socket.socket]) -> Iterator[Console]:
    console = Console(tmp_path / "serial.log")
    console.power_on(ends[0])
    yield console
    ends[1].close()
    console.close()


def test_the_console_is_plain_text_with_a_time_before_each_line(
    console: Console, ends: tuple[socket.socket, socket.socket]
) -> None:
    for part in (b"\x1b[2J\x1b[01;01HBds", b"Dxe\r\n\x1b[0", b";32mgr\xc3", b"\xbcn\x1b[0m\r", b"\nlogin: "):
        ends[1].sendall(part)
        time.sleep(0.02)
    assert console.wait_for("login: ", timeout_s=5) == "login: "
    assert console.text.split() == ["BdsDxe", "grün", "login:"]
    lines = console.tail().splitlines()
    assert lines[0] == "-- power on, number 1"
    assert [each[0] == "[" and each[10:12] == "] " for each in lines[1:]] == [True] * 3, lines
    assert [each.split("] ")[1] for each in lines[1:]] == ["BdsDxe", "grün", "login: "]


def test_what_is_waited_for_comes_after_what_was_found(
    console: Console, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].sendall(b"key: wrong\nkey: ")
    assert console.wait_for("never", "key:", timeout_s=5) == "key:"
    assert console.wait_for("key:", timeout_s=5) == "key:"
    assert console.wait_for("key:", timeout_s=0.1) is None
    console.type("abc\r")
    assert ends[1].recv(10) == b"abc\r"


def test_a_console_whose_machine_is_gone_is_not_waited_for(
    console: Console, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].sendall(b"last words")
    ends[1].close()
    assert console.wait_for("last words", timeout_s=5)
    started = time.monotonic()
    assert console.wait_for("more", timeout_s=60) is None
    assert time.monotonic() - started < 30


def play(guest: socket.socket, answer: Callable[[dict[str, object]], bytes]) -> None:
    """One request, one answer, on a thread."""

    def serve() -> None:
        guest.sendall(answer(json.loads(guest.makefile("rb").readline())))

    threading.Thread(target=serve, daemon=True).start()


def test_a_command_has_its_own_answer(ends: tuple[socket.socket, socket.socket]) -> None:
    agent = Agent(ends[0], lambda: True)
    # A line that a reset cut short, a late answer to another command, and then the right one.
    play(
        ends[1],
        lambda request: (
            b'{"id": 1, "co\n{"id": 99, "code": 1, "stdout": "", "stderr": ""}\n'
            + json.dumps({"id": request["id"], "code": 3, "stdout": "out", "stderr": "err"}).encode()
            + b"\n"
        ),
    )
    answer = agent.execute("true", timeout_s=5)
    assert (answer.code, answer.stdout, answer.stderr) == (3, "out", "err")


def test_a_machine_that_starts_again_answers_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    play(ends[1], lambda _: b'{"ready": true}\n')
    with pytest.raises(VMError, match="started again while it ran systemctl"):
        Agent(ends[0], lambda: True).execute("systemctl", "stop", timeout_s=5)


def test_a_machine_that_is_off_is_not_waited_for(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(VMError, match="is off"):
        Agent(ends[0], lambda: False).wait_ready(60)
    ends[1].close()
    with pytest.raises(VMError, match="is off"):
        Agent(ends[0], lambda: True).wait_ready(60)


def test_the_monitor_counts_events_and_names_errors(ends: tuple[socket.socket, socket.socket]) -> None:
    def serve() -> None:
        lines = ends[1].makefile("rb")
        ends[1].sendall(b'{"QMP": {}}\n')
        for reply in ('{"return": {}}', '{"event": "RESET"}\n{"return": {}}', '{"error": {"desc": "no such thing"}}'):
            lines.readline()
            ends[1].sendall(reply.encode() + b"\n")

    threading.Thread(target=serve, daemon=True).start()
    monitor = Monitor(ends[0], lambda: True)
    assert monitor.count("RESET") == 1
    with pytest.raises(VMError, match="nothing: no such thing"):
        monitor.execute("nothing")


def test_a_process_ends_with_its_starter(tmp_path: Path) -> None:
    starter = (
        "import sys; from image.vm.process import spawn; "
        "print(spawn(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().decode().strip()
    assert child.exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]


def test_a_process_that_does_not_want_to_end_is_ended() -> None:
    process = spawn(["bash", "-c", "trap '' TERM; while :; do sleep 0.1; done"])
    time.sleep(0.3)
    finish(process, grace_s=0.5)
    assert process.poll() is not None
