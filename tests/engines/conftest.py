"""Tiny models of random weights, and engines over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.engines.contract import LoadOptions
from tests.support import gguf_writer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1.3 M parameters, 512 byte-level tokens, a context of 512, ChatML."""
    return gguf_writer.write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[object]:
    from ai_assistant.engines.llama import LlamaEngine

    with LlamaEngine.open(tiny, LoadOptions(sequences=3, threads=1, extra={"max_queued": 4})) as opened:
        yield opened
