"""`ai-assistant top`: the picture from plain values, and the command against a scripted daemon."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from ai_assistant.cli.top_view import bar, row, view
from tests.cli.conftest import Cli
from tests.sdk.bus_service import Scripted

MODEL = {"name": "a:1", "state": "loaded", "resident_bytes": 1 << 20, "running": 2, "kv_cells": 100, "kv_used": 50}


def drawn(columns: int, **statistics: object) -> str:
    console = Console(width=columns, file=io.StringIO(), color_system=None)
    console.print(view({"load_1m": 0.5, "cores": 2}, statistics, columns, "gone\x1b[2J"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("columns", [20, 45, 80, 200])
def test_it_fits_and_steers_no_terminal(columns: int) -> None:
    text = drawn(columns, models=[MODEL, {"name": "\x1b]0;x\x07", "state": "unloaded"}])
    assert max(map(len, text.splitlines())) <= columns
    assert "\x1b" not in text
    assert "a:1" in text


def test_busy_models_come_first_and_columns_go_when_it_is_narrow() -> None:
    text = drawn(200, models=[{"name": "0-idle:1", "state": "loaded"}, MODEL])
    assert text.index("a:1") < text.index("0-idle:1")
    assert "50%" in text
    assert "50%" not in drawn(60, models=[MODEL])


@pytest.mark.parametrize("used", [None, math.nan, "x", True])
def test_what_is_no_number_is_a_dash(used: object) -> None:
    assert bar(used, 100) == "–"
    assert row({"running": used})[3] == "–"


def test_nothing_at_all() -> None:
    assert "no models" in drawn(80)


@pytest.mark.bus
def test_without_a_terminal_it_prints_once(cli: Cli, daemon: Scripted) -> None:
    result = cli("top")
    assert result.status == 0
    assert "assistant:1" in result.out
    assert "(pinned)" in result.out
    assert "200 ms / 1.5 s" in result.out
    found = cli("top", "--json").json
    assert found["statistics"]["models"][0]["kv_used"] == 250
    assert found["status"]["watts"] is None


def test_no_daemon_is_an_error(cli: Cli, nothing: None) -> None:
    result = cli("top", "--once", "--json")
    assert (result.status, result.error["name"]) == (4, "ServiceUnavailable")
