from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ai_assistant.hal.native import NativeBackend
from tests.hal.native import build


@pytest.fixture(scope="session")
def example_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="session")
def example(example_library: Path) -> NativeBackend:
    return NativeBackend(example_library)


@pytest.fixture(scope="session")
def faulty_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.faulty(tmp_path_factory.mktemp("faulty"))


@pytest.fixture
def faulty(faulty_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], NativeBackend]:
    """The example with a fault. Each is a file of its own, since a file is loaded only once."""

    def load(fault: str) -> NativeBackend:
        monkeypatch.setenv("HAL_FAULT", fault)
        return NativeBackend(Path(shutil.copy(faulty_library, tmp_path / f"{fault}.so")))

    return load
