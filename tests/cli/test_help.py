"""Help, usage errors and start-up: what works without any daemon."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ai_assistant import __version__
from ai_assistant.cli.app import app
from tests.cli.conftest import CHECKOUT, Cli, program

COMMANDS = (
    ("status",), ("top",), ("ask",), ("chat",), ("run",), ("doctor",), ("install",), ("version",), ("devices",),
    ("plan",), ("config", "show"),
    ("config", "check"), ("model", "list"), ("model", "show"), ("model", "import"), ("model", "remove"),
    ("model", "load"), ("model", "unload"), ("model", "pin"), ("model", "unpin"), ("model", "drain"),
    ("model", "estimate"), ("model", "pull"), ("model", "suggest"), ("storage", "recovery-key"),
    ("storage", "acknowledge"),
    ("storage", "reseal"), ("verify-boot",), ("api", "enable"), ("api", "disable"), ("api", "status"),
    ("api", "key", "add"), ("api", "key", "list"), ("api", "key", "remove"),
    ("hal", "list"), ("hal", "certify"), ("hal", "verify-report"), ("hal", "keygen"), ("hal", "new"),
    ("hal", "include"),
)  # fmt: skip


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, each in command.commands.items():
        if not each.hidden:
            found += leaves(each, (*path, name)) if hasattr(each, "commands") else [(*path, name)]
    return found


def test_the_tree_is_what_it_should_be() -> None:
    assert sorted(leaves(typer.main.get_command(app))) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_reads_like_a_manual(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert f"{' '.join(command)} [OPTIONS]" in result.output
    assert "Examples:" in result.output
    assert f"  ai-assistant {' '.join(command)}" in result.output or command[-1] == "version"
    assert "--json" in result.output
    assert "\\[" not in result.output
    assert max(len(line) for line in result.output.splitlines()) <= 100


def test_help_lists_the_commands_and_hides_the_banner(cli: Cli) -> None:
    result = cli("--help")
    assert result.status == 0
    for name in ("status", "ask", "chat", "run", "model", "config", "storage", "doctor", "version"):
        assert f"\n  {name} " in result.out
    assert "banner" not in result.out
    assert "3 not authorised" in result.out


@pytest.mark.parametrize("args", [(), ("model",), ("config",)])
def test_a_group_alone_shows_its_help(cli: Cli, args: tuple[str, ...]) -> None:
    result = cli(*args)
    assert "Usage:" in result.out
    assert "error" not in result.err
    assert result.status == 0


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("status", "more"),
        ("status", "--nonsense"),
        ("model", "show"),
        ("model", "nonsense"),
        ("run",),
        ("run", "m", "--temperature", "9"),
        ("run", "m", "--max-tokens", "many"),
        ("run", "m", "--context", "7", "x"),
        ("run", "m", "--raw", "--schema", "pyproject.toml", "x"),
        ("run", "m", "--schema", "/nowhere.json", "x"),
        ("run", "m", "--schema", "pyproject.toml", "x"),
        ("config", "show", "no.such"),
        ("model", "load", "./file.gguf"),
    ],
)
def test_wrong_usage_is_2_with_a_hint(cli: Cli, nothing: None, args: tuple[str, ...]) -> None:
    result = cli(*args)
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "hint: see ai-assistant" in result.err
    as_json = cli(*args, "--json")
    assert as_json.status == 2
    assert as_json.error["name"] == "Usage"


def test_version_is_said_at_once() -> None:
    """Without the big imports: their time is the whole time of such a small command."""
    code = (
        "import sys; from ai_assistant.cli import main; status = main(['--version']);"
        "print(status, [m for m in ('rich','typer','click','dbus_fast','asyncio','http') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert done.stdout == f"{__version__}\n0 []\n"
    assert program("-V").out == f"{__version__}\n"


def test_both_entry_points_are_this_one() -> None:
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ai-assistant": "ai_assistant.cli:main", "ai_assistant": "ai_assistant.cli:main"}


def test_an_unexpected_defect_is_no_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("ai_assistant.client.Client.status", broken)
    result = cli("status")
    assert result.status == 1
    assert "RuntimeError: surprise" in result.err
    assert "--debug" in result.err
    assert cli("status", "--json").error["name"] == "InternalError"


def test_debug_shows_the_traceback(nothing: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ai_assistant", "status", "--debug"], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.returncode == 4
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = program(_AI_ASSISTANT_COMPLETE=f"source_{shell}")
    assert result.status == 0
    assert "_AI_ASSISTANT_COMPLETE=complete_" in result.out
    assert "ai-assistant" in result.out


def test_commands_are_completed() -> None:
    environment = {"_AI_ASSISTANT_COMPLETE": "complete_bash", "COMP_WORDS": "ai-assistant model ", "COMP_CWORD": "2"}
    assert set(program(**environment).out.split()) >= {"list", "import", "remove", "show", "load", "unload"}
