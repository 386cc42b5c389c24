"""`InferenceEngine` in its own process: the SDK's part, with a scripted engine in place of a native one."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ai_assistant import (
    AsyncInferenceEngine,
    Cancelled,
    ContextOverflow,
    FinishReason,
    InferenceEngine,
    InvalidArgument,
    InvalidModel,
    NoSuchModel,
    NotAuthorized,
    NotSupported,
    ServiceUnavailable,
    ToolCall,
    Usage,
)
from ai_assistant.engines.contract import Chunk, Event, Finished, GenerateRequest, LoadOptions, ModelInfo
from tests.sdk.served import Served


class ScriptedGeneration(Iterator[Event]):
    def __init__(self, engine: ScriptedEngine, request: GenerateRequest) -> None:
        self._engine = engine
        self._cancelled = threading.Event()
        text = request.prompt or str((request.messages or ({},))[-1].get("content"))
        self._forever = text == "!forever"
        self._fails = text == "!fail"
        self._words = text.split()
        self._done = False
        self._tools = request.tools

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        if self._forever:
            if self._cancelled.wait(0.005):
                self._engine.cancelled += 1
                raise Cancelled("cancelled")
            return Chunk("tick ")
        if self._fails:
            raise MemoryError("a defect")
        if self._words:
            return Chunk(self._words.pop(0) + " ")
        self._done = True
        calls = tuple(ToolCall(each["function"]["name"], "{}") for each in self._tools)
        return Finished(FinishReason.TOOL_CALLS if calls else FinishReason.STOP, Usage(3, 4, energy_j=2.5), calls)

    def cancel(self) -> None:
        self._cancelled.set()


class ScriptedEngine:
    def __init__(self, path: Any, options: LoadOptions) -> None:
        self.path = path
        self.options = options
        self.requests: list[GenerateRequest] = []
        self.cancelled = 0
        self.closed = 0

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            format="gguf", architecture="llama", parameters=1, size_bytes=1, quantization="F32", context_length=16,
            has_chat_template=True, can_embed=True, name="",
        )  # fmt: skip

    def generate(self, request: GenerateRequest) -> ScriptedGeneration:
        self.requests.append(request)
        if request.prompt == "!overflow":
            raise ContextOverflow("too long", param="prompt")
        return ScriptedGeneration(self, request)

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        return [[float(len(text))] for text in texts], len(texts)

    def tokenize(self, text: str) -> list[int]:
        return [1]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ScriptedEngine]:
    """No daemon, and the engines that were opened."""
    found: list[ScriptedEngine] = []

    def open_model(path: Any, options: LoadOptions) -> ScriptedEngine:
        found.append(ScriptedEngine(path, options))
        return found[-1]

    monkeypatch.setattr("ai_assistant.engines.open_model", open_model)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    monkeypatch.setenv("AI_ASSISTANT_SOCKET", str(tmp_path / "none.sock"))
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    return path


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_without_a_daemon_the_file_is_loaded_here(made: list[ScriptedEngine], file: Path) -> None:
    with InferenceEngine(model_path=file, context_length=64, threads=2, sequences=3, memory_limit_bytes=5) as engine:
        assert engine.backend == "in-process"
        assert engine.model == "m.gguf"
        options = made[0].options
        assert (options.context_length, options.threads, options.sequences) == (64, 2, 3)
        assert options.memory_limit_bytes == 5
        assert engine.generate("a b", max_tokens=5) == "a b "
        assert made[0].requests[-1].max_tokens == 5
        answer = engine.chat("hello", tools=[{"type": "function", "function": {"name": "look"}}])
        assert answer.tool_calls == (ToolCall("look", "{}"),)
        assert answer.usage.energy_j == 2.5
        assert list(engine.stream([{"role": "user", "content": "x y"}])) == ["x ", "y "]
        assert list(engine.stream("raw text")) == ["raw ", "text "]
        assert made[0].requests[-1].prompt == "raw text"
        assert engine.embed(["a", "abc"]) == [[1.0], [3.0]]
        with pytest.raises(ContextOverflow):
            engine.generate("!overflow")
        with pytest.raises(InvalidArgument, match="top_q"):
            engine.generate("x", top_q=1)  # type: ignore[call-arg]
    assert made[0].closed == 1
    assert engine.backend == "in-process"
    for call in (lambda: engine.generate("x"), lambda: engine.embed(["x"])):
        with pytest.raises(InvalidArgument, match="closed"):
            call()
    engine.close()
    assert made[0].closed == 1


def test_raw_prompts_have_the_same_limit_here_as_in_the_daemon(made: list[ScriptedEngine], file: Path) -> None:
    with InferenceEngine(model_path=file) as engine:
        engine.generate("x")
        engine.chat("x")
    assert [each.max_tokens for each in made[0].requests] == [128, None]


def test_a_dropped_engine_and_a_dropped_stream_are_cleaned_up(made: list[ScriptedEngine], file: Path) -> None:
    engine = InferenceEngine(model_path=file)
    stream = engine.stream("!forever")
    assert next(stream) == "tick "
    cancelled = stream._cancel.__self__  # type: ignore[attr-defined]
    del stream
    gc.collect()
    assert cancelled._cancelled.is_set()
    del engine
    gc.collect()
    assert made[0].closed == 1


def test_a_generator_that_is_left_early_is_cancelled(made: list[ScriptedEngine], file: Path) -> None:
    with InferenceEngine(model_path=file) as engine:
        with engine.stream("!forever") as stream:
            for count, _ in enumerate(stream):
                if count == 3:
                    break
        assert list(stream) == []
        assert engine.generate("and on") == "and on "


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "long", "nul", "unreadable"])
def test_files_that_are_no_models(
    made: list[ScriptedEngine], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / {"nul": "a\0b", "long": "x" * 5000}.get(kind, "m.gguf")
    expected: type[Exception] = InvalidModel
    if kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "unreadable":
        # Root may read everything, so the refusal is the system call's.
        def refuse(*_: object, **__: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("os.open", refuse)
        expected = NotAuthorized
    else:
        expected = NoSuchModel if kind == "missing" else InvalidArgument
    with pytest.raises(expected) as caught:
        InferenceEngine(model_path=path)
    assert type(caught.value) is expected
    assert "\0" not in str(caught.value)
    assert made == []


def test_arguments_that_do_not_go_together(made: list[ScriptedEngine], file: Path) -> None:
    for wrong in (
        {"model": "a", "model_path": file},
        {"backend": "cloud"},
        {"backend": "in-process"},
        {"model": "a", "context_length": 7},
        {"model_path": file, "context_length": -1},
        {"model_path": file, "context_length": "many"},
    ):
        for kind in (InferenceEngine, AsyncInferenceEngine):
            with pytest.raises(InvalidArgument):
                kind(**wrong)


def test_a_model_by_name_needs_the_daemon(made: list[ScriptedEngine], file: Path) -> None:
    with pytest.raises(ServiceUnavailable) as caught:
        InferenceEngine("writer")
    assert "model_path" in caught.value.hint
    with pytest.raises(ServiceUnavailable):
        InferenceEngine(model_path=file, backend="daemon")
    assert made == []


def test_no_engine_installed(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    monkeypatch.setitem(__import__("sys").modules, "ai_assistant.engines", None)
    with pytest.raises(NotSupported) as caught:
        InferenceEngine(model_path=file)
    assert "local" in caught.value.hint


def test_models_by_name_are_the_daemons(api: Served) -> None:
    with InferenceEngine("writer") as engine:
        assert engine.backend == "daemon"
        assert engine.chat("over there").content == "over there "
        assert list(engine.stream("raw")) == ["raw "]
        assert len(engine.embed(["x"])[0]) == 4
    with InferenceEngine() as engine:
        assert engine.model == "writer:2"
    with pytest.raises(NoSuchModel):
        InferenceEngine("nobody")


# The asynchronous twin.


async def test_async_in_process(made: list[ScriptedEngine], file: Path) -> None:
    engine = AsyncInferenceEngine(model_path=file, context_length=64)
    assert [engine.backend] == [None]
    async with engine:
        assert engine.backend == "in-process"
        assert await engine.generate("a b") == "a b "
        assert (await engine.chat("hello")).usage.completion_tokens == 4
        stream = await engine.stream([{"role": "user", "content": "x y"}])
        assert [text async for text in stream] == ["x ", "y "]
        assert stream.usage is not None
        assert await engine.embed(["abc"]) == [[3.0]]
        with pytest.raises(ContextOverflow):
            await engine.generate("!overflow")
        with pytest.raises(MemoryError):
            await engine.generate("!fail")
    assert made[0].closed == 1
    with pytest.raises(InvalidArgument, match="closed"):
        await engine.generate("x")


async def test_async_engine_opens_on_first_use_and_only_once(made: list[ScriptedEngine], file: Path) -> None:
    engine = AsyncInferenceEngine(model_path=file)
    answers = await asyncio.gather(*(engine.chat(f"n {i}") for i in range(8)))
    assert [each.content for each in answers] == [f"n {i} " for i in range(8)]
    assert len(made) == 1
    await engine.aclose()


@pytest.mark.parametrize("how", ["close", "drop", "cancel"])
async def test_async_cancel(made: list[ScriptedEngine], file: Path, how: str) -> None:
    async with AsyncInferenceEngine(model_path=file) as engine:
        if how == "cancel":
            task = asyncio.create_task(engine.chat("!forever"))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = await engine.stream("!forever")
            assert await anext(stream) == "tick "
            if how == "close":
                await stream.aclose()
                assert [text async for text in stream] == []
            else:
                del stream
                gc.collect()
        await asyncio.to_thread(until, lambda: made[0].cancelled == 1)
        await asyncio.to_thread(
            until, lambda: not [t for t in threading.enumerate() if t.name == "ai-assistant-generation"]
        )


async def test_async_bad_files(made: list[ScriptedEngine], tmp_path: Path) -> None:
    with pytest.raises(NoSuchModel):
        await AsyncInferenceEngine(model_path=tmp_path / "none").open()
    with pytest.raises(ServiceUnavailable):
        await AsyncInferenceEngine("writer").chat("x")


async def test_async_models_by_name(api: Served) -> None:
    async with AsyncInferenceEngine() as engine:
        assert engine.model == "writer:2"
        assert (await engine.chat("over there")).content == "over there "
    with pytest.raises(NoSuchModel):
        await AsyncInferenceEngine("nobody").open()


def test_a_language_model_here_is_not_moved_by_the_environment(
    made: list[ScriptedEngine], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was loaded accordingly; only what a request says itself is a demand."""
    monkeypatch.setenv("HETERO_COMPUTE", "npu")
    with InferenceEngine(model_path=file) as engine:
        assert made[0].options.hetero_compute == "npu"
        assert engine.generate("x").usage.devices == ()
        assert engine.embed(["x"]).devices == ()
        assert engine.generate("x", hetero_compute="ON").usage.devices == ("cpu",)
        assert engine.embed(["x"], hetero_compute="cpu").devices == ("cpu",)
        for work in (
            lambda: engine.generate("x", hetero_compute="npu"),
            lambda: engine.generate("x", n=2, hetero_compute="npu"),
            lambda: engine.embed(["x"], hetero_compute="npu"),
        ):
            with pytest.raises(NotSupported, match="cannot move it") as caught:
                work()
            assert caught.value.param == "hetero_compute"
    with InferenceEngine(model_path=file, hetero_compute="latency") as engine:
        assert made[1].options.hetero_compute == "latency"
    monkeypatch.setenv("HETERO_COMPUTE", "on,off")
    with pytest.raises(InvalidArgument, match="stands alone"):
        InferenceEngine(model_path=file)
