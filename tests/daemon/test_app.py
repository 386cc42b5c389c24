"""The daemon's start and end, as far as they need no bus: the rest is in tests/bus."""

from __future__ import annotations

from pathlib import Path

import pytest

from ai_assistant.daemon import app
from ai_assistant.daemon.app import App, Options


async def test_what_is_ending_does_not_become_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been stopped while the libraries of its API were still being loaded."""
    said: list[str] = []
    looked: list[bool] = []
    monkeypatch.setattr(app, "notify", said.append)
    daemon = App(Options(root=tmp_path, state_directory=tmp_path))
    monkeypatch.setattr(daemon.devices, "start", lambda: looked.append(True))
    daemon._ready()
    assert said == ["READY=1\nSTATUS=0 models known"]
    assert looked == [True]
    daemon._ending = True
    daemon._ready()
    assert len(said) == len(looked) == 1
