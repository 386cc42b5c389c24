from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sdk.bus_service import Broker, broker
from tests.sdk.served import Served, served


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The API server; clients find it by the environment. There is no bus."""
    monkeypatch.setenv("AI_ASSISTANT_SOCKET", str(tmp_path / "api.sock"))
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/no-bus")
    with served(tmp_path / "api.sock") as running:
        yield running


@pytest.fixture
def system_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """A private system bus with nobody on it; clients find it by the environment."""
    with broker(tmp_path) as running:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", running.address)
        yield running
