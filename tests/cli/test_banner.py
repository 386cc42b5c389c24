"""The console banner: whatever is known, quickly, and never a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ai_assistant import __version__
from ai_assistant.cli import banner
from tests.cli.conftest import CHECKOUT, Cli, program

STATUS = {
    "version": "9.9",
    "state": "running",
    "addresses": ["192.0.2.7", "2001:db8::7"],
    "watts": 12.34,
    "models": [{"name": "big:1", "state": "unloaded"}, {"name": "assistant:1", "state": "loaded"}],
}


def image(root: Path, profile: str, password: str) -> Path:
    (root / "usr/lib/ai-assistant").mkdir(parents=True)
    (root / "usr/lib/ai-assistant/profile").write_text(profile + "\n")
    (root / "etc").mkdir()
    (root / "etc/shadow").write_text(f"root:*:1::::::\ndeveloper:{password}:1::::::\n")
    return root


def test_it_shows_what_the_daemon_says(tmp_path: Path) -> None:
    text = banner.text(tmp_path, STATUS)
    assert "AI Assistant OS 9.9" in text
    assert "192.0.2.7, 2001:db8::7" in text
    assert "running" in text
    assert "assistant:1 (loaded) and 1 more" in text
    assert "12.3 W" in text
    assert 'ai-assistant ask "how warm is it?"' in text
    assert "WARNING" not in text


def test_what_nothing_measures_is_said_so(tmp_path: Path) -> None:
    text = banner.text(tmp_path, {**STATUS, "watts": None, "models": None})
    assert "no sensor" in text
    assert "not measured yet" in banner.text(tmp_path, {**STATUS, "watts": None, "watts_source": "rapl"})
    assert "model    none" in text


@pytest.mark.parametrize(
    ("profile", "password", "warned"),
    [("developer", "", True), ("developer", "$y$j9T$x", False), ("developer", "!", False), ("production", "", False)],
)
def test_the_warning_is_for_a_developer_without_a_password(
    tmp_path: Path, profile: str, password: str, warned: bool
) -> None:
    text = banner.text(image(tmp_path, profile, password), STATUS)
    assert ("WARNING" in text) is warned
    assert ("as developer" in text) is (profile == "developer")
    assert max(len(line) for line in text.splitlines()) <= 80


def test_without_a_daemon_it_says_so(nothing: None, cli: Cli) -> None:
    result = cli("banner")
    assert result.status == 0
    assert "the daemon is not up yet" in result.out
    assert __version__ in result.out
    assert result.err == ""


@pytest.mark.parametrize("status", [{}, {"models": [7]}, {"models": 0, "addresses": None, "watts": "x"}])
def test_an_odd_status_is_no_failure(tmp_path: Path, status: dict[str, object]) -> None:
    assert "ai-assistant" in banner.text(tmp_path, status)


def test_getty_finds_nothing_to_expand(tmp_path: Path) -> None:
    assert "\\" not in banner.text(tmp_path, {**STATUS, "version": "\\4 \\n"})


def test_it_ends_even_when_the_bus_does_not_answer(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        result = program("banner", DBUS_SYSTEM_BUS_ADDRESS=f"unix:path={tmp_path}/silent")
    assert result.status == 0
    assert "not up yet" in result.out


def test_it_needs_neither_typer_nor_rich(nothing: None) -> None:
    code = (
        "import sys; from ai_assistant.cli import main; main(['banner']);"
        "print([m for m in ('rich','typer','click') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True, env=dict(os.environ)
    )
    assert done.stdout.endswith("[]\n")
