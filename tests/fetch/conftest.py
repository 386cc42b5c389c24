"""A hub on loopback and the downloading process behind its socket, for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import gguf_writer
from tests.support.fetch_unit import Unit
from tests.support.hub_server import Hub, serving


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as made:
        yield made


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Unit]:
    made = Unit(tmp_path / "fetch.sock")
    yield made
    made.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small GGUF that is a model."""
    folder = tmp_path_factory.mktemp("models")
    return gguf_writer.write_llama(folder / "tiny.gguf", width=64, hidden=64, layers=1).read_bytes()
