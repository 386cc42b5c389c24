"""The official client, unmodified, over the socket."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from ai_assistant import errors
from tests.api.conftest import Api, until
from tests.support.fake_service import RECORD

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


async def test_several_answers(api: Api, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="assistant", messages=USER, n=3, seed=2**63 - 2)
    assert [each.index for each in answer.choices] == [0, 1, 2]
    assert {each.message.content for each in answer.choices} == {"how warm is it "}
    # Each has a seed of its own, within 64 bits.
    assert [each.seed for each in api.service.requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert answer.usage is not None
    # The prompt counts once.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)
    texts = await client.completions.create(model="assistant", prompt="a b c", n=2)
    assert [(each.index, each.text) for each in texts.choices] == [(0, "a b c "), (1, "a b c ")]


async def test_several_streamed_answers_interleave(api: Api, client: AsyncOpenAI) -> None:
    api.service.pause_s = 0.01
    stream = await client.chat.completions.create(
        model="assistant", messages=USER, n=3, stream=True, stream_options={"include_usage": True}
    )
    found: dict[int, str] = {}
    order: list[int] = []
    ends: dict[int, str | None] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
            if choice.delta.content:
                order.append(choice.index)
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert found == dict.fromkeys(range(3), "how warm is it ")
    assert ends == dict.fromkeys(range(3), "stop")
    assert order != sorted(order)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 12)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_several_answers_ends_all(api: Api, stream: bool) -> None:
    async def ask() -> None:
        await api.chat("!forever", n=4, stream=stream)

    asking = asyncio.create_task(ask())
    await until(lambda: api.service.begun == 4)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await api.settled()
    assert api.service.closed_early == 4


async def test_one_of_several_answers_fails(api: Api, client: AsyncOpenAI) -> None:
    api.service.errors["X"] = errors.WorkerCrashed("the worker died")
    with pytest.raises(openai.InternalServerError, match="the worker died"):
        await client.chat.completions.create(model="assistant", messages=[{"role": "user", "content": "!break X"}], n=3)
    await api.settled()
    await api.still_answers()


async def test_what_openai_has_no_word_for_goes_as_extra_body(api: Api, client: AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="assistant", messages=USER, logit_bias={"50256": -100},
        extra_body={
            "top_k": 40, "min_p": 0.1, "typical_p": 0.9, "repeat_penalty": 1.2, "repeat_last_n": 16, "mirostat": 2,
            "mirostat_tau": 3, "mirostat_eta": 0.2, "priority": "batch", "keep_alive": "5m", "ignore_eos": True,
            "response_format": {"type": "regex", "regex": "[a-z ]+"},
        },
    )  # fmt: skip
    request = api.service.requests[0]
    assert (request.top_k, request.min_p, request.typical_p, request.repeat_penalty) == (40, 0.1, 0.9, 1.2)
    assert (request.repeat_last_n, request.mirostat, request.mirostat_tau, request.mirostat_eta) == (16, 2, 3.0, 0.2)
    assert (request.logit_bias, request.response_regex) == ({"50256": -100.0}, "[a-z ]+")
    assert (request.priority, request.ignore_eos) == ("batch", True)
    assert api.service.kept == [300.0]
    await client.embeddings.create(model="assistant", input="x", extra_body={"keep_alive": -1})
    assert api.service.kept == [300.0, math.inf]


async def test_images_are_refused_clearly(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="models here read text, not image_url") as caught:
        await client.chat.completions.create(
            model="assistant",
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        )
    assert (caught.value.status_code, caught.value.param) == (501, "messages[0].content[0].type")


@pytest.fixture
def ranker(api: Api) -> str:
    name = "ranker:1"
    api.service.records.append(replace(RECORD, name=name, builtin=False, capabilities=("rerank", "classify")))
    return name


async def test_rerank(client: AsyncOpenAI, ranker: str) -> None:
    body = {
        "model": ranker, "query": "warm fan", "documents": ["cold", {"text": "a warm fan"}, "warm", "fan"],
        "top_n": 3, "return_documents": True,
    }  # fmt: skip
    answer: Any = await client.post("/rerank", body=body, cast_to=object)
    assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    assert answer["results"][0]["document"] == {"text": "a warm fan"}
    assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert answer["model"] == ranker
    plain: Any = await client.post("/rerank", body={**body, "return_documents": False, "top_n": None}, cast_to=object)
    assert len(plain["results"]) == 4
    assert "document" not in plain["results"][0]


async def test_classify(client: AsyncOpenAI, ranker: str) -> None:
    answer: Any = await client.post("/classify", body={"model": ranker, "input": ["a", "b c"]}, cast_to=object)
    assert [(each["index"], each["prediction"], each["score"]) for each in answer["data"]] == [
        (0, "long", 0.75),
        (1, "long", 0.75),
    ]
    assert answer["data"][1]["predictions"] == [{"label": "long", "score": 0.75}, {"label": "short", "score": 0.25}]
    assert answer["usage"]["total_tokens"] == 3


async def test_ranking_and_classifying_say_how_long_the_model_stays(api: Api, client: AsyncOpenAI, ranker: str) -> None:
    more = {"model": ranker, "keep_alive": "5m"}
    await client.post("/rerank", body={**more, "query": "q", "documents": ["d"]}, cast_to=object)
    await client.post("/classify", body={**more, "keep_alive": 0, "input": "x"}, cast_to=object)
    assert api.service.kept == [300.0, 0.0]


async def test_what_the_model_cannot_do_is_refused_before_it_is_loaded(client: AsyncOpenAI, ranker: str) -> None:
    with pytest.raises(openai.InternalServerError, match="does not generate text"):
        await client.chat.completions.create(model=ranker, messages=USER)
    with pytest.raises(openai.InternalServerError, match="gives no vectors"):
        await client.embeddings.create(model=ranker, input="x")
    with pytest.raises(openai.InternalServerError, match="does not rank"):
        await client.post("/rerank", body={"model": "assistant", "query": "x", "documents": ["y"]}, cast_to=object)
    with pytest.raises(openai.InternalServerError, match="does not classify"):
        await client.post("/classify", body={"model": "assistant", "input": "x"}, cast_to=object)


async def test_tokens_there_and_back(client: AsyncOpenAI) -> None:
    root = client.with_options(base_url="http://localhost")
    body = {"model": "assistant", "content": "one three one", "with_pieces": True}
    made: Any = await root.post("/tokenize", body=body, cast_to=object)
    assert made == {"tokens": [3, 5, 3], "count": 3, "pieces": ["xxx", "xxxxx", "xxx"]}
    back: Any = await root.post("/detokenize", body={"model": "assistant", "tokens": [3, 5]}, cast_to=object)
    assert back == {"content": "xxx xxxxx"}
    health: Any = await root.get("/health", cast_to=object)
    assert health["status"] == "ok"
    assert "ai_assistant_requests_total" in await root.get("/metrics", cast_to=str)


async def test_models_say_what_they_take_and_can(client: AsyncOpenAI) -> None:
    extra = (await client.models.retrieve("assistant:1")).model_extra
    assert extra is not None
    assert extra["memory"]["weights_bytes"] == 4_000_000
    assert extra["memory"]["total_bytes"] == 9_000_000
    assert extra["capabilities"] == ["generate", "embed"]
    assert (extra["pinned"], extra["resident_bytes"]) == (False, None)


async def test_who_waits_is_told_where_it_stands(api: Api, client: AsyncOpenAI) -> None:
    said: Any = [{"role": "user", "content": "!queue up"}]
    whole = await client.chat.completions.with_raw_response.create(model="assistant", messages=said)
    assert (whole.headers["x-queue-position"], whole.headers["x-queue-eta-seconds"]) == ("3", "41.5")
    assert (whole.parse()).choices[0].message.content == "!queue up "
    streamed = await api.chat("!queue up", stream=True, n=2)
    assert streamed.headers["x-queue-position"] == "3"
    comments = [line for line in streamed.text.splitlines() if line.startswith(":")]
    assert comments == [": 3 before you, 41.5 s to wait", ": 1 before you"]
    assert "x-queue-position" not in (await api.chat("not me")).headers


async def test_a_full_queue_says_how_long_it_is(api: Api, client: AsyncOpenAI) -> None:
    api.service.errors["X"] = errors.Busy("64 wait already")
    assert (await api.chat("!raise X")).headers["retry-after"] == "1"
    waiting = asyncio.create_task(api.chat("!line", stream=True))
    await until(lambda: api.service.sent > 0)
    await asyncio.sleep(0.05)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="assistant", messages=[{"role": "user", "content": "!raise X"}])
    assert 30 <= int(caught.value.response.headers["retry-after"]) <= 42
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await api.settled()
    assert (await api.chat("!raise X")).headers["retry-after"] == "1"


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
