from __future__ import annotations

from pathlib import Path

import pytest

from tests.provisioning.world import World
from tests.support.disk_image import write_image


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "machine").mkdir()
    return World(tmp_path / "machine")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "image.raw")
