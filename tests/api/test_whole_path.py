"""Socket → service → worker process → engine, with a small real model of random weights."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from ai_assistant.daemon.api.server import serve
from ai_assistant.daemon.service import DaemonService
from tests.support.gguf_writer import write_llama
from tests.support.local_service import local_service

pytestmark = pytest.mark.engine

USER: Any = [{"role": "user", "content": "tell me something"}]


class Whole:
    def __init__(self, service: DaemonService, client: AsyncOpenAI, model: str) -> None:
        self.service = service
        self.client = client
        self.model = model

    async def chat(self, **more: Any) -> Any:
        return await self.client.chat.completions.create(
            **{"model": self.model, "messages": USER, "max_tokens": 24, "temperature": 0, **more}
        )


@pytest.fixture
async def whole(tmp_path: Path) -> AsyncIterator[Whole]:
    path = tmp_path / "api.sock"
    model = write_llama(tmp_path / "tiny.gguf", context=512)
    stop = asyncio.Event()
    async with local_service(tmp_path) as service:
        entry = await service.open_model(os.open(model, os.O_RDONLY), "tiny", 0, ":1.0")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        serving = asyncio.create_task(serve(service, [listener], stop, lambda _peer, _scope: True))
        http: Any = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)))
        async with AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http, max_retries=0) as client:
            yield Whole(service, client, entry.name)
        stop.set()
        await serving


async def test_a_stream_says_the_same_as_a_whole_answer(whole: Whole) -> None:
    answer = await whole.chat()
    assert answer.usage.prompt_tokens > 3
    assert 1 <= answer.usage.completion_tokens <= 24
    assert answer.usage.model_extra["decode_s"] > 0
    stream = await whole.chat(stream=True, stream_options={"include_usage": True})
    chunks = [each async for each in stream]
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    # The second prompt is the first one's: only its last token is read again.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1


async def test_a_schema_is_kept_to_whatever_the_weights_say(whole: Whole) -> None:
    schema = {
        "type": "object", "additionalProperties": False, "required": ["on", "level"],
        "properties": {"on": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
    }  # fmt: skip
    answer = await whole.chat(
        max_tokens=100, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"on", "level"}
    assert found["level"] in ("low", "high")


async def test_a_required_tool_is_called_with_its_own_arguments(whole: Whole) -> None:
    parameters = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}
    tool = {"type": "function", "function": {"name": "dim", "parameters": parameters}}
    answer = await whole.chat(max_tokens=100, tools=[tool], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "dim"
    assert json.loads(call.function.arguments)["level"] in ("low", "high")
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_log_probabilities_are_those_of_the_choice(whole: Whole) -> None:
    answer = await whole.chat(logprobs=True, top_logprobs=3, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        # Greedy: the likeliest was taken.
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.logprob <= 0


async def test_a_seed_repeats_an_answer(whole: Whole) -> None:
    one, two, three = [(await whole.chat(temperature=1.5, seed=seed)).choices[0].message.content for seed in (5, 5, 6)]
    assert one == two
    assert one != three


async def test_overflow_is_the_callers_mistake(whole: Whole) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await whole.chat(messages=[{"role": "user", "content": "word " * 2000}], stream=stream)
        assert caught.value.code == "ContextOverflow"
    assert (await whole.chat()).usage.completion_tokens > 0


async def test_leaving_frees_the_place_at_once(whole: Whole) -> None:
    for _ in range(12):
        stream = await whole.chat(stream=True, max_tokens=400, temperature=1)
        async for _ in stream:
            break
        await stream.close()
    async with asyncio.timeout(5):
        assert (await whole.chat()).usage.model_extra["queue_s"] < 2
    assert whole.service.counters.running == 0


async def test_a_dead_worker_is_an_error_and_then_there_is_another(whole: Whole) -> None:
    await whole.chat()
    (child,) = _workers()
    stream = await whole.chat(stream=True, max_tokens=450, temperature=1)
    await anext(aiter(stream))
    os.kill(child, signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "WorkerCrashed"
    codes = []
    async with asyncio.timeout(20):
        while (code := await _outcome(whole)) is not None:
            codes.append(code)
            await asyncio.sleep(0.2)
    assert set(codes) <= {"WorkerCrashed", "Busy"}


async def _outcome(whole: Whole) -> str | None:
    """None for an answer, else the error's code."""
    try:
        await whole.chat()
    except openai.APIStatusError as error:
        return error.code
    return None


def _workers() -> list[int]:
    found = []
    for each in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in each.read_text().split():
            if b"ai_assistant.daemon.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


async def test_embeddings_have_unit_length(whole: Whole) -> None:
    answer = await whole.client.embeddings.create(model=whole.model, input=["one", "two three"])
    assert len(answer.data) == 2
    for each in answer.data:
        assert sum(value * value for value in each.embedding) == pytest.approx(1, abs=1e-3)


async def test_the_model_is_listed_with_what_it_is(whole: Whole) -> None:
    (model,) = [each async for each in whole.client.models.list()]
    assert model.id == whole.model
    assert model.model_extra is not None
    assert model.model_extra["architecture"] == "llama"
    assert model.model_extra["transient"] is True
