from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ai_assistant.services import notify as module

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return sock


async def test_messages_and_signs_of_life(manager: socket.socket) -> None:
    with manager:
        module.notify("READY=1")
        assert manager.recv(100) == b"READY=1"
        task = asyncio.ensure_future(module.keep_alive(0.02))
        await asyncio.sleep(0.1)
        task.cancel()
        assert manager.recv(100) == b"WATCHDOG=1"
        assert manager.recv(100) == b"WATCHDOG=1"


def test_nobody_to_notify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    module.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    module.notify("READY=1")


@pytest.mark.parametrize(
    ("wanted", "owner", "interval"),
    [
        ("30000000", None, 15.0),
        ("1000000", None, 1.0),
        ("30000000", "1", None),
        (None, None, None),
        ("x", None, None),
        ("0", None, None),
    ],
)
def test_watchdog(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, owner: str | None, interval: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", wanted), ("WATCHDOG_PID", owner)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert module.watchdog_interval() == interval


def test_sockets_are_taken_by_name(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from ai_assistant.services.notify import passed_sockets\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "found = passed_sockets('api')\n"
        "print([each.getsockname() for each in found], [each.get_inheritable() for each in found])\n"
        "os.environ['LISTEN_PID'] = '1'\n"
        "print(passed_sockets('api'))\n"
    )
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for sock, name in ((one, "one"), (two, "two")):
            sock.bind(str(tmp_path / name))
            sock.listen()

        def pass_on() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        # Free ones: a fixed number may be what another thread is opening.
        high = [fcntl.fcntl(each.fileno(), fcntl.F_DUPFD, 50) for each in (one, two)]
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "other:api"},
            preexec_fn=pass_on,
            close_fds=False,
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
        )
        for fd in high:
            os.close(fd)
    assert done.stdout.splitlines() == [f"['{tmp_path}/two'] [False]", "[]"], done.stderr
