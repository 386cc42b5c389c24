from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.cli import main
from tests.sdk.bus_service import Broker, Scripted, broker, scripted
from tests.sdk.served import Served, served

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "ai_assistant"]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, str]:
        """The JSON error, which must be all that stderr has."""
        found: dict[str, str] = json.loads(self.err)["error"]
        assert set(found) == {"name", "message", "hint"}
        return found


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process; neither its input nor its output is a terminal."""

    def run(*args: str) -> Result:
        capfd.readouterr()
        status = main(args)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(status, out, err)

    return run


def program(*args: str, stdin: str | bytes = b"", **environment: str) -> Result:
    """Run the command line as a process of its own."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*PROGRAM, *args], input=given, capture_output=True, cwd=CHECKOUT, env={**os.environ, **environment}, timeout=60
    )
    err = done.stderr.decode(errors="replace")
    assert "Traceback" not in err
    return Result(done.returncode, done.stdout.decode(errors="replace"), err)


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a bus nor a socket."""
    monkeypatch.setenv("AI_ASSISTANT_SOCKET", str(tmp_path / "none.sock"))
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")


@pytest.fixture
def api(nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The API server, but no bus."""
    monkeypatch.setenv("AI_ASSISTANT_SOCKET", str(tmp_path / "api.sock"))
    with served(tmp_path / "api.sock") as running:
        yield running


@pytest.fixture
def private_bus(tmp_path: Path, nothing: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    with broker(tmp_path) as running:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", running.address)
        yield running


@pytest.fixture
def daemon(private_bus: Broker) -> Iterator[Scripted]:
    """A scripted daemon on a private bus, but no socket."""
    with scripted(private_bus.address) as running:
        yield running
