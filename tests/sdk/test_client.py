"""Both clients against the real API server on a unix socket."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ai_assistant import (
    AsyncClient,
    Busy,
    Client,
    Completion,
    FinishReason,
    InternalError,
    InvalidArgument,
    Message,
    NoSuchModel,
    NotAuthorized,
    NotSupported,
    ServiceUnavailable,
    Timeout,
    ToolCall,
    WorkerCrashed,
    errors,
)
from ai_assistant.daemon.contract import Scope
from tests.sdk.served import Served

TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}


@pytest.fixture
def client(api: Served) -> Iterator[Client]:
    with Client() as made:
        yield made


def test_generate_is_a_string_that_knows_its_cost(client: Client) -> None:
    answer = client.generate("one two three", model="assistant")
    assert isinstance(answer, Completion)
    assert answer == answer.text == "one two three "
    assert answer.finish_reason is FinishReason.STOP
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 3
    assert answer.usage.cached_tokens == 1
    assert (answer.usage.queue_s, answer.usage.prefill_s, answer.usage.decode_s) == (0.25, 0.5, 0.75)
    assert answer.usage.energy_j == 1.5


def test_chat_takes_a_string_or_a_conversation(client: Client, api: Served) -> None:
    answer = client.chat("你好 world", model="assistant:1")
    assert isinstance(answer, Message)
    assert str(answer) == answer.content == "你好 world "
    client.chat([{"role": "system", "content": "be brief"}, answer.to_dict(), {"role": "user", "content": "on"}])
    sent = api.service.requests[-1].messages
    assert sent is not None
    assert [each["role"] for each in sent] == ["system", "assistant", "user"]


def test_parameters_arrive_as_they_were_given(client: Client, api: Served) -> None:
    params: dict[str, Any] = {
        "max_tokens": 7, "stop": ["x", "y"], "seed": -3, "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125,
        "frequency_penalty": -1.0, "presence_penalty": 2.0, "logprobs": 2,
    }  # fmt: skip
    client.chat("a b", model="assistant", tools=[TOOL], tool_choice="look", **params)
    got = api.service.requests[-1]
    for name, value in params.items():
        assert getattr(got, name) == (tuple(value) if isinstance(value, list) else value), name
    assert got.tool_choice == "look"
    assert got.tools[0]["function"]["name"] == "look"
    client.generate("a b", model="assistant", **params)
    got = api.service.requests[-1]
    assert got.prompt == "a b"
    for name, value in params.items():
        assert getattr(got, name) == (tuple(value) if isinstance(value, list) else value), name


def test_tool_calls_and_their_way_back(client: Client, api: Served) -> None:
    answer = client.chat("what", model="assistant", tools=[TOOL])
    assert answer.finish_reason is FinishReason.TOOL_CALLS
    assert answer.tool_calls == (ToolCall("look", '{"said": "what"}'),)
    turn = answer.to_dict()
    result = {"role": "tool", "tool_call_id": turn["tool_calls"][0]["id"], "content": "42"}
    assert client.chat([{"role": "user", "content": "what"}, turn, result], model="assistant").content == "42 "


@pytest.mark.parametrize("schema", [{}, {"type": "object", "properties": {"name": {"type": "string"}}}])
def test_schemas_arrive(client: Client, api: Served, schema: dict[str, Any]) -> None:
    client.chat("x", model="assistant", response_schema=schema)
    assert api.service.requests[-1].response_schema == schema


def test_a_raw_prompt_takes_a_schema_but_no_tools(client: Client, api: Served) -> None:
    client.generate("x", model="assistant", response_schema={})
    assert api.service.requests[-1].response_schema == {}
    with pytest.raises(NotSupported, match="tools"):
        client.generate("x", model="assistant", tools=[TOOL])


@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_survive_both_shapes(client: Client, chat: bool) -> None:
    make: Callable[..., Message | Completion] = client.chat if chat else client.generate
    answer = make("a b", model="assistant", logprobs=2)
    assert [each.token for each in answer.logprobs] == ["a ", "b "]
    assert answer.logprobs[0].logprob == -0.5
    assert [each.token for each in answer.logprobs[0].top] == ["a 0", "a 1"]
    assert answer.logprobs[0].bytes == tuple(b"a ")


def test_stream_gives_pieces_then_the_cost(client: Client) -> None:
    stream = client.stream([{"role": "user", "content": "a b c"}], model="assistant", max_tokens=2)
    assert (stream.usage, stream.finish_reason) == (None, None)
    assert list(stream) == ["a ", "b "]
    assert stream.text == "a b "
    assert stream.finish_reason is FinishReason.LENGTH
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 2
    assert list(stream) == []


def _closed(api: Served) -> None:
    api.wait_for(lambda: api.service.closed_early == 1)
    assert api.service.finished == 0


def test_closing_a_stream_cancels_the_generation(client: Client, api: Served) -> None:
    with client.stream("!forever", model="assistant") as stream:
        assert next(stream) == "tick "
    _closed(api)
    assert list(stream) == []


def test_dropping_a_stream_cancels_the_generation(client: Client, api: Served) -> None:
    stream = client.stream("!forever", model="assistant")
    next(stream)
    del stream
    gc.collect()
    _closed(api)


def test_closing_from_another_thread_wakes_the_reader(client: Client, api: Served) -> None:
    stream = client.stream("!forever", model="assistant")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.extend(stream))
    reader.start()
    api.wait_for(lambda: len(stream.text) > 20)
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert got[0] == "tick "
    _closed(api)


def test_the_default_model_is_somebodys_own(client: Client, api: Served) -> None:
    assert client.default_model() == "writer:2"
    api.service.records = [each for each in api.service.records if each.builtin]
    assert client.default_model() == "assistant:1"
    api.service.records = []
    with pytest.raises(NoSuchModel):
        client.chat("x")


def test_embeddings_are_in_order(client: Client) -> None:
    short, long = client.embed(["a", "abc"], model="assistant")
    assert len(short) == len(long) == 4
    assert short != long
    assert client.embed(["abc"], model="assistant") == [long]


@pytest.mark.parametrize("texts", ["one string", [1], [None]])
def test_embedding_something_else_is_a_named_error(client: Client, texts: Any) -> None:
    with pytest.raises(InvalidArgument, match="list of strings"):
        client.embed(texts, model="assistant")


def test_health_models_and_metrics(client: Client, api: Served) -> None:
    assert client.health()["status"] == "ok"
    assert [row["id"] for row in client.served_models()] == ["assistant:1", "writer:2"]
    assert "# TYPE" in client.metrics()
    api.service.state["state"] = "starting"
    with pytest.raises(ServiceUnavailable):
        client.health()


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"AIAssistantError", "from_name"}))
def test_every_error_comes_back_as_itself(client: Client, api: Served, name: str) -> None:
    """Before the first token, in the middle of a stream, and from another endpoint."""
    error = getattr(errors, name)("what went wrong", hint="what to do", param="prompt")
    api.service.errors["it"] = error
    calls: tuple[Callable[[], Any], ...] = (
        lambda: client.chat("!raise it", model="assistant"),
        lambda: client.chat("!break it", model="assistant"),
        lambda: client.generate("!break it", model="assistant"),
        lambda: client.embed(["!raise it"], model="assistant"),
    )
    for call in calls:
        with pytest.raises(type(error)) as caught:
            call()
        assert type(caught.value) is type(error)
        assert caught.value.message == "what went wrong"
        assert caught.value.hint == "what to do"
        assert caught.value.param == "prompt"


def test_what_came_before_an_error_was_delivered(client: Client, api: Served) -> None:
    api.service.errors["it"] = WorkerCrashed("the worker died")
    stream = client.stream("!break it", model="assistant")
    with pytest.raises(WorkerCrashed):
        list(stream)
    assert stream.text == "one two "


def test_an_unknown_model(client: Client) -> None:
    with pytest.raises(NoSuchModel, match="nothing"):
        client.chat("x", model="nothing")


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": "word"}, "stop"),
        ({"colour": "blue"}, "colour"),
        ({"logprobs": 99}, "logprobs"),
    ],
)
def test_a_wrong_parameter_is_named_and_not_sent(
    client: Client, api: Served, params: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.chat("x", model="assistant", **params)
    assert caught.value.param == param
    assert api.service.begun == 0


@pytest.mark.parametrize("messages", [[], ["x"], 7, None, [{"role": "user"}], [{"role": "user", "content": {1, 2}}]])
def test_messages_that_are_none(client: Client, messages: Any) -> None:
    with pytest.raises(InvalidArgument):
        client.chat(messages, model="assistant")


def test_half_a_surrogate_pair_is_a_named_error(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="Unicode"):
        client.chat("bad \ud800", model="assistant")


def test_a_body_that_is_too_long_is_refused_by_name(client: Client) -> None:
    with pytest.raises(errors.AIAssistantError) as caught:
        client.chat("x" * 80_000_000, model="assistant")
    assert not isinstance(caught.value, ServiceUnavailable | InternalError)
    assert client.chat("and on", model="assistant").content == "and on "


def test_not_authorised(client: Client, api: Served) -> None:
    api.allowed.discard(Scope.INFER)
    with pytest.raises(NotAuthorized) as caught:
        client.chat("x", model="assistant")
    assert "ai-assistant" in caught.value.hint


def test_no_daemon(tmp_path: Path) -> None:
    with Client(socket=tmp_path / "none.sock") as client, pytest.raises(ServiceUnavailable) as caught:
        client.chat("x", model="assistant")
    assert "none.sock" in caught.value.message
    assert "systemctl start" in caught.value.hint


def test_a_stale_socket(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    with Client(socket=path) as client, pytest.raises(ServiceUnavailable):
        client.health()


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    with Client(socket=tmp_path / ("x" * 200)) as client, pytest.raises(ServiceUnavailable):
        client.health()


def test_a_daemon_that_stops_in_mid_answer(client: Client, api: Served) -> None:
    stream = client.stream("!forever", model="assistant")
    next(stream)
    threading.Thread(target=api.end).start()
    with pytest.raises(ServiceUnavailable) as caught:
        for _ in stream:
            pass
    assert caught.value.hint


def test_silence_is_a_timeout(api: Served) -> None:
    with Client(timeout=0.3) as impatient, pytest.raises(Timeout):
        impatient.chat("!stuck", model="assistant")
    api.wait_for(lambda: api.service.closed_early == 1)


class Peer:
    """A server that says exactly these bytes to each request, and hangs up."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.path = path
        self._answer = answer
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                data = b""
                # All of it: closing with something unread would take the answer away again.
                while not data.endswith(b"}") and (piece := connection.recv(65536)):
                    data += piece
                connection.sendall(self._answer)


def event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
TEXT = event('{"choices":[{"delta":{"content":"hi"}}]}')
ODD_ANSWERS = {
    "nothing": (b"", ServiceUnavailable),
    "no HTTP": (b"hello there\r\n\r\n", InternalError),
    "cut head": (b"HTTP/1.1 200 OK\r\ncontent-ty", ServiceUnavailable),
    "cut stream": (HEAD + TEXT, ServiceUnavailable),
    "cut chunk": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\nabc", ServiceUnavailable),
    "no reason": (HEAD + TEXT + event("[DONE]"), InternalError),
    "no JSON": (HEAD + event("{nothing"), InternalError),
    "other JSON": (HEAD + event("[1, 2]"), InternalError),
    "odd choices": (HEAD + event('{"choices": 7}'), InternalError),
    "odd error": (HEAD + event('{"error": "x"}'), InternalError),
    "bare 500": (b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno", InternalError),
    "bare 503": (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", ServiceUnavailable),
    "unknown error": (b'HTTP/1.1 418 No\r\n\r\n{"error": {"code": "Teapot", "message": "short"}}', InternalError),
    "busy": (
        b'HTTP/1.1 429 No\r\nretry-after: 3\r\n\r\n{"error": {"code": "Busy", "message": "full", "hint": ""}}',
        Busy,
    ),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
async def test_odd_answers_are_named_errors_in_both_clients(tmp_path: Path, name: str) -> None:
    answer, expected = ODD_ANSWERS[name]
    peer = Peer(tmp_path / "odd.sock", answer)
    with Client(socket=peer.path, timeout=5) as client, pytest.raises(expected) as caught:
        await asyncio.to_thread(client.chat, "x", model="m")
    assert type(caught.value) is expected
    async with AsyncClient(socket=peer.path, timeout=5) as other:
        with pytest.raises(expected) as again:
            await other.chat("x", model="m")
    assert type(again.value) is expected
    assert again.value.message == caught.value.message
    if name == "busy":
        assert "3 s" in again.value.hint


def test_no_descriptor_is_left(client: Client, api: Served) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    api.service.errors["it"] = InvalidArgument("no")
    client.chat("x", model="assistant")
    before = count()
    for _ in range(20):
        client.chat("x", model="assistant")
        client.stream("!forever", model="assistant").close()
        with pytest.raises(InvalidArgument):
            client.chat("!break it", model="assistant")
    gc.collect()
    api.wait_for(lambda: count() <= before + 1)


# The asynchronous twin.


@pytest.fixture
async def aclient(api: Served) -> AsyncClient:
    return AsyncClient()


async def test_async_chat_generate_embed(aclient: AsyncClient) -> None:
    assert (await aclient.chat("a b", model="assistant")).content == "a b "
    answer = await aclient.generate("a b", model="assistant")
    assert answer == "a b "
    assert answer.usage.energy_j == 1.5
    assert len((await aclient.embed(["x"], model="assistant"))[0]) == 4
    assert await aclient.default_model() == "writer:2"
    assert (await aclient.health())["status"] == "ok"
    assert "# TYPE" in await aclient.metrics()


async def test_async_stream(aclient: AsyncClient) -> None:
    stream = await aclient.stream("a b", model="assistant")
    assert [text async for text in stream] == ["a ", "b "]
    assert stream.usage is not None
    assert stream.finish_reason is FinishReason.STOP


async def test_async_closing_a_stream_cancels_the_generation(aclient: AsyncClient, api: Served) -> None:
    async with await aclient.stream("!forever", model="assistant") as stream:
        assert await anext(stream) == "tick "
    await asyncio.to_thread(api.wait_for, lambda: api.service.closed_early == 1)


async def test_async_dropped_stream_is_cancelled(aclient: AsyncClient, api: Served) -> None:
    stream = await aclient.stream("!forever", model="assistant")
    await anext(stream)
    del stream
    gc.collect()
    await asyncio.to_thread(api.wait_for, lambda: api.service.closed_early == 1)


async def test_async_cancelled_task_cancels_the_generation(aclient: AsyncClient, api: Served) -> None:
    task = asyncio.create_task(aclient.chat("!forever", model="assistant"))
    await asyncio.to_thread(api.wait_for, lambda: api.service.sent > 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(api.wait_for, lambda: api.service.closed_early == 1)


async def test_async_errors_and_timeouts(aclient: AsyncClient, api: Served, tmp_path: Path) -> None:
    api.service.errors["it"] = errors.ContextOverflow("too long", hint="shorter")
    for text in ("!raise it", "!break it"):
        with pytest.raises(errors.ContextOverflow) as caught:
            await aclient.chat(text, model="assistant")
        assert caught.value.hint == "shorter"
    with pytest.raises(Timeout):
        await AsyncClient(timeout=0.3).chat("!stuck", model="assistant")
    with pytest.raises(ServiceUnavailable):
        await AsyncClient(socket=tmp_path / "none.sock").health()
    with pytest.raises(errors.AIAssistantError) as refused:
        await aclient.chat("x" * 80_000_000, model="assistant")
    assert not isinstance(refused.value, ServiceUnavailable | InternalError)


async def test_many_at_once(aclient: AsyncClient) -> None:
    answers = await asyncio.gather(*(aclient.chat(f"number {i}", model="assistant") for i in range(20)))
    assert [each.content for each in answers] == [f"number {i} " for i in range(20)]


def test_a_wish_for_devices_goes_along(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service = api.service
    monkeypatch.delenv("HETERO_COMPUTE", raising=False)
    with Client() as client:
        assert client.embed(["one"], model="assistant").devices == ()
        monkeypatch.setenv("HETERO_COMPUTE", "npu,cpu")
        found = client.embed(["one"], model="assistant")
        assert (len(found), found.devices) == (1, ("npu", "cpu"))
        assert client.embed(["one"], model="assistant", hetero_compute="OFF").devices == ("cpu",)
        assert client.generate("x", model="assistant").usage.devices == ("cpu",)
        client.generate("x", model="assistant", hetero_compute="latency")
        client.generate("x", model="assistant", n=2)
        assert [each.hetero_compute for each in service.requests] == ["npu,cpu", "latency", "npu,cpu", "npu,cpu"]
        monkeypatch.setenv("HETERO_COMPUTE", "")
        client.embed(["one"], model="assistant")
        assert service.wishes == [None, "npu,cpu", "OFF", None]
    with Client(hetero_compute="gpu") as client:
        monkeypatch.setenv("HETERO_COMPUTE", "npu")
        assert client.embed(["one"], model="assistant").devices == ("gpu",)
        assert client.embed(["one"], model="assistant", hetero_compute="cpu").devices == ("cpu",)


def test_a_wish_that_is_none_is_not_sent(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client() as client:
        monkeypatch.setenv("HETERO_COMPUTE", "on,off")
        for work in (
            lambda: client.embed(["one"], model="assistant"),
            lambda: client.rerank("one", ["two"], model="assistant"),
            lambda: client.classify(["one"], model="assistant"),
            lambda: client.generate("x", model="assistant"),
            lambda: client.chat("x", model="assistant", n=2),
        ):
            with pytest.raises(InvalidArgument) as caught:
                work()
            assert caught.value.param == "hetero_compute"
        with pytest.raises(InvalidArgument) as caught:
            client.generate("x", model="assistant", hetero_compute="a b")
        assert caught.value.param == "hetero_compute"
    assert api.service.requests == []
    assert api.service.wishes == []


async def test_a_wish_of_the_asynchronous_client(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETERO_COMPUTE", "cpu")
    async with AsyncClient() as client:
        assert (await client.embed(["one"], model="assistant")).devices == ("cpu",)
        assert (await client.embed(["one"], model="assistant", hetero_compute="npu")).devices == ("npu",)
        assert (await client.generate("x", model="assistant")).usage.devices == ("cpu",)
    async with AsyncClient(hetero_compute="gpu") as client:
        assert (await client.embed(["one"], model="assistant")).devices == ("gpu",)
