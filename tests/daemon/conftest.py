from __future__ import annotations

from pathlib import Path

import pytest

from ai_assistant.daemon.registry import Registry
from ai_assistant.engines.contract import LoadOptions
from tests.support import gguf_writer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_writer.write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", width=64, hidden=64, layers=1)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "image", tmp_path / "state", LoadOptions())
    made.scan()
    return made
