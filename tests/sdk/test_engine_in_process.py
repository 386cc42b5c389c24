"""`InferenceEngine` in its own process with the compiled engine and real model files."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant import AsyncInferenceEngine, ContextOverflow, FinishReason, InferenceEngine, InvalidModel
from tests.support import gguf_writer

pytestmark = pytest.mark.engine

BUILT_IN = Path(__file__).resolve().parents[2] / "models" / "assistant-1.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_writer.write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", context=512)


@pytest.fixture
def engine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceEngine]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    with InferenceEngine(model_path=tiny, context_length=256) as made:
        assert made.backend == "in-process"
        yield made


def test_generate_chat_stream(engine: InferenceEngine) -> None:
    greedy = engine.generate("once upon", max_tokens=8, temperature=0)
    assert greedy == engine.generate("once upon", max_tokens=8, temperature=0)
    assert greedy.usage.completion_tokens <= 8
    assert greedy.usage.prompt_tokens > 0
    seeded = engine.chat("hello", max_tokens=8, seed=5)
    assert seeded.content == engine.chat("hello", max_tokens=8, seed=5).content
    stream = engine.stream([{"role": "user", "content": "hello"}], max_tokens=8, seed=5)
    assert "".join(stream) == seeded.content
    assert stream.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_a_schema_holds(engine: InferenceEngine) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    assert isinstance(json.loads(engine.chat("yes?", response_schema=schema).content)["ok"], bool)


def test_logprobs(engine: InferenceEngine) -> None:
    answer = engine.chat("hello", max_tokens=4, logprobs=3)
    assert 1 <= len(answer.logprobs) <= 4
    for each in answer.logprobs:
        assert each.logprob <= 0
        assert len(each.top) == 3


def test_closing_and_dropping_free_the_slot(engine: InferenceEngine) -> None:
    for _ in range(10):  # more than there are sequences
        stream = engine.stream("once upon", max_tokens=200)
        next(stream, "")  # random weights may well end at once
        stream.close()
        next(engine.stream("once upon", max_tokens=200), "")
        gc.collect()
    assert engine.generate("and on", max_tokens=1).usage.completion_tokens == 1


def test_overflow_is_named(engine: InferenceEngine) -> None:
    with pytest.raises(ContextOverflow):
        engine.chat("word " * 2000)


def test_vectors_have_length_one(engine: InferenceEngine) -> None:
    for vector in engine.embed(["one text", "another"]):
        assert math.isclose(math.fsum(x * x for x in vector), 1.0, rel_tol=1e-3)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InvalidModel):
        InferenceEngine(model_path=tmp_path / "bad.gguf", backend="in-process")


async def test_async_twin(tiny: Path) -> None:
    async with AsyncInferenceEngine(model_path=tiny, backend="in-process") as engine:
        answers = await asyncio.gather(*(engine.chat(f"hello {i}", max_tokens=6) for i in range(6)))
        assert all(each.usage.completion_tokens >= 1 for each in answers)
        stream = await engine.stream("once upon", max_tokens=300)
        await anext(stream, "")
        await stream.aclose()
        assert len(await engine.embed(["x"])) == 1
    assert not [each for each in threading.enumerate() if each.name == "ai-assistant-generation"]


def test_the_built_in_model_loads_here_too() -> None:
    with InferenceEngine(model_path=BUILT_IN, backend="in-process") as engine:
        assert engine.chat("how warm is it", max_tokens=4).usage.completion_tokens >= 1
