"""The official client, unmodified, over the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from ai_assistant import errors
from tests.api.conftest import Api

USER: Any = [{"role": "user", "content": "how warm is it"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("warmth", "watts")
]


@pytest.fixture
async def client(api: Api) -> AsyncIterator[AsyncOpenAI]:
    http: Any = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(api.path)))
    async with AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0) as made:
        yield made


async def test_chat(api: Api, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="assistant", messages=USER, temperature=0, seed=3, max_completion_tokens=2, stop=["\n"], user="ann",
        store=False, metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto",
    )  # fmt: skip
    assert answer.choices[0].message.content == "how warm "
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "assistant:1"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.model_extra == {"energy_j": 1.5, "queue_s": 0.25, "prefill_s": 0.5, "decode_s": 0.75}
    request = api.service.requests[0]
    assert (request.seed, request.temperature, request.stop) == (3, 0.0, ("\n",))


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="assistant", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [each async for each in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == "how warm is it "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_the_stream_helper_accumulates_the_same(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="assistant", messages=USER) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "how warm is it "


async def test_tools(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="assistant", messages=USER, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "watts"}}
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert [each.function.name for each in calls] == ["watts"]
    assert answer.choices[0].finish_reason == "tool_calls"
    # What came goes back as it is, with the tool's answer.
    again: Any = [*USER, answer.choices[0].message, {"role": "tool", "tool_call_id": calls[0].id, "content": "41 W"}]
    final = await client.chat.completions.create(model="assistant", messages=again)
    assert final.choices[0].message.content == "41 W "


async def test_streamed_tools(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="assistant", messages=USER, tools=TOOLS, stream=True)
    found: dict[int, str] = {}
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            found[call.index] = call.function.name or ""
    assert found == {0: "warmth", 1: "watts"}


async def test_json_schema(client: AsyncOpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
    answer = await client.chat.completions.create(
        model="assistant", messages=USER,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert answer.choices[0].message.content == '{"city": "how warm is it"} '


async def test_log_probabilities(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="assistant", messages=USER, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [each.token for each in logprobs.content] == ["how ", "warm ", "is ", "it "]
    assert [each.logprob for each in logprobs.content[0].top_logprobs] == [-1.0, -2.0]


async def test_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="assistant", prompt="a b c", max_tokens=2, logprobs=1)
    assert answer.choices[0].text == "a b "
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset == [0, 2]
    stream = await client.completions.create(model="assistant", prompt="a b c", stream=True)
    assert "".join([each.choices[0].text async for each in stream]) == "a b c "


async def test_embeddings(client: AsyncOpenAI) -> None:
    # The client asks for base64 by itself, and decodes it.
    coded = await client.embeddings.create(model="assistant", input=["one", "two words"])
    plain = await client.embeddings.create(model="assistant", input=["one", "two words"], encoding_format="float")
    assert coded.usage.total_tokens == 3
    for one, two in zip(coded.data, plain.data, strict=True):
        assert one.index == two.index
        assert one.embedding == pytest.approx(two.embedding, abs=1e-6)


async def test_models(client: AsyncOpenAI) -> None:
    assert [each.id async for each in client.models.list()] == ["assistant:1", "writer:2"]
    assert (await client.models.retrieve("assistant:1")).owned_by == "ai-assistant"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody:1")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidArgument("wrong"), openai.BadRequestError),
        (errors.ContextOverflow("too long", param="messages"), openai.BadRequestError),
        (errors.NotAuthorized("no"), openai.PermissionDeniedError),
        (errors.NoSuchModel("gone"), openai.NotFoundError),
        (errors.AlreadyExists("there"), openai.ConflictError),
        (errors.Unsure("hm"), openai.UnprocessableEntityError),
        (errors.Busy("later"), openai.RateLimitError),
        (errors.WorkerCrashed("died"), openai.InternalServerError),
        (errors.NotSupported("cannot"), openai.InternalServerError),
        (errors.OutOfMemory("5 GB > 4 GB"), openai.InternalServerError),
        (ZeroDivisionError("secret"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_answer_are_the_clients_own(
    api: Api, client: AsyncOpenAI, error: Exception, kind: type[openai.APIStatusError], stream: bool
) -> None:
    api.service.errors["X"] = error
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": "!raise X"}], stream=stream
        )
    known = isinstance(error, errors.AIAssistantError)
    assert caught.value.code == (error.name if isinstance(error, errors.AIAssistantError) else "InternalError")
    assert caught.value.status_code == (error.http_status if isinstance(error, errors.AIAssistantError) else 500)
    assert known or "secret" not in caught.value.response.text
    assert "Traceback" not in caught.value.response.text
    assert ("retry-after" in caught.value.response.headers) == isinstance(error, errors.Busy | errors.WorkerCrashed)


async def test_an_error_in_the_middle_of_a_stream_is_raised_there(api: Api, client: AsyncOpenAI) -> None:
    api.service.errors["X"] = errors.WorkerCrashed("the worker died")
    stream = await client.chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "!break X"}], stream=True
    )
    texts: list[str | None] = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="the worker died"):
        await read()
    assert texts == ["", "one ", "two "]


async def test_leaving_a_stream_stops_the_work(api: Api, client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "!forever"}], stream=True
    )
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(2):
        await api.service.closed.wait()
    await api.still_answers()


async def test_the_blocking_client(api: Api) -> None:
    def ask() -> str:
        http: Any = httpx.Client(transport=httpx.HTTPTransport(uds=str(api.path)))
        with OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http) as client:
            answer = client.chat.completions.create(model="assistant", messages=USER)
            return answer.choices[0].message.content or ""

    assert await asyncio.to_thread(ask) == "how warm is it "
