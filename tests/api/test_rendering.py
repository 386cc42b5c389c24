"""Events to answers: whole and streamed forms say the same, and are JSON whatever the tokens hold."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from ai_assistant.daemon.api.openai import StreamOptions, sse, whole
from ai_assistant.engines.contract import Chunk, Event, Finished, FinishReason, TokenLogprob, ToolCall, Usage
from ai_assistant.errors import InternalError, WorkerCrashed

USAGE = Usage(5, 3, 2, 0.1, 0.2, 0.3, None)
STOP = Finished(FinishReason.STOP, USAGE)
TEXTS = ["Hello", ' "quoted" \\ ', "\n\t\u0000\u2028", "世界🙂", "</script>", "data: [DONE]\n\n", "\x7f"]
CALLS = Finished(FinishReason.TOOL_CALLS, USAGE, (ToolCall("a", '{"x": "\\n"}'), ToolCall("b", "{}")))
CHAT = StreamOptions(chat=True, stream=True)
TEXT = StreamOptions(chat=False, stream=True)


class Source:
    """An event source that knows whether it was closed."""

    def __init__(self, events: Sequence[Event | BaseException]) -> None:
        self.events = events
        self.closed = False

    async def run(self) -> AsyncGenerator[tuple[int, Event]]:
        try:
            for each in self.events:
                if isinstance(each, BaseException):
                    raise each
                yield 0, each
        finally:
            self.closed = True


def one(events: Sequence[Event], options: StreamOptions) -> dict[str, Any]:
    """The only answer, whole."""
    return whole("m:1", [(0, each) for each in events], options)


async def stream(events: Sequence[Event | BaseException], options: StreamOptions) -> list[Any]:
    """The stream's events, parsed; the text "[DONE]" as itself."""
    source = Source(events)
    data = b"".join([piece async for piece in sse("m:1", source.run(), options)])
    assert source.closed
    assert data.endswith(b"\n\n")
    out: list[Any] = []
    for block in data.decode().removesuffix("\n\n").split("\n\n"):
        assert block.startswith("data: ")
        assert "\n" not in block
        payload = block.removeprefix("data: ")
        out.append(payload if payload == "[DONE]" else json.loads(payload))
    return out


async def test_a_streamed_chat_has_role_text_reason_and_end() -> None:
    chunks = await stream([*map(Chunk, TEXTS), STOP], CHAT)
    assert chunks[-1] == "[DONE]"
    deltas = [each["choices"][0]["delta"] for each in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert [each["content"] for each in deltas[1:-1]] == TEXTS
    assert deltas[-1] == {}
    assert [each["choices"][0]["finish_reason"] for each in chunks[:-1]] == [None] * (len(TEXTS) + 1) + ["stop"]
    assert len({each["id"] for each in chunks[:-1]}) == 1
    assert {each["object"] for each in chunks[:-1]} == {"chat.completion.chunk"}
    assert {each["model"] for each in chunks[:-1]} == {"m:1"}
    assert not any("usage" in each for each in chunks[:-1])


async def test_a_streamed_text_has_no_role() -> None:
    chunks = await stream([*map(Chunk, TEXTS), STOP], TEXT)
    assert [each["choices"][0]["text"] for each in chunks[:-1]] == [*TEXTS, ""]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert {each["object"] for each in chunks[:-1]} == {"text_completion"}


@pytest.mark.parametrize("chat", [True, False])
async def test_usage_comes_last_and_only_when_asked(chat: bool) -> None:
    chunks = await stream([Chunk("hi"), STOP], StreamOptions(chat=chat, stream=True, include_usage=True))
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
        "energy_j": None,
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "decode_s": 0.3,
    }
    assert all(each["usage"] is None for each in chunks[:-2])


async def test_pieces_without_text_are_not_sent() -> None:
    chunks = await stream([Chunk(""), Chunk(""), Chunk("世"), STOP], CHAT)
    assert [each["choices"][0]["delta"].get("content") for each in chunks[:-1]] == ["", "世", None]


async def test_tool_calls_are_deltas_with_an_index() -> None:
    chunks = await stream([CALLS], CHAT)
    calls = [each["choices"][0]["delta"]["tool_calls"][0] for each in chunks[1:3]]
    assert [each["index"] for each in calls] == [0, 1]
    assert [each["function"] for each in calls] == [
        {"name": "a", "arguments": '{"x": "\\n"}'},
        {"name": "b", "arguments": "{}"},
    ]
    assert len({each["id"] for each in calls}) == 2
    assert chunks[3]["choices"][0]["finish_reason"] == "tool_calls"


async def test_without_parallel_calls_there_is_one() -> None:
    chunks = await stream([CALLS], StreamOptions(chat=True, stream=True, one_call=True))
    assert [each["choices"][0]["delta"].get("tool_calls", [{}])[0].get("index") for each in chunks[:-1]] == [
        None,
        0,
        None,
    ]
    answer = one([CALLS], StreamOptions(chat=True, one_call=True))
    assert [each["function"]["name"] for each in answer["choices"][0]["message"]["tool_calls"]] == ["a"]


async def test_log_probabilities_of_a_chat() -> None:
    token = TokenLogprob("世", (228, 184, 150), -0.5, (TokenLogprob("x", (120,), float("-inf")),))
    want = {
        "content": [
            {
                "token": "世", "logprob": -0.5, "bytes": [228, 184, 150],
                "top_logprobs": [{"token": "x", "logprob": -9999.0, "bytes": [120]}],
            }
        ],
        "refusal": None,
    }  # fmt: skip
    events: list[Event] = [Chunk("世", (token,)), STOP]
    assert (await stream(events, CHAT))[1]["choices"][0]["logprobs"] == want
    assert one(events, StreamOptions(chat=True))["choices"][0]["logprobs"] == want


async def test_log_probabilities_of_a_text_count_offsets_over_chunks() -> None:
    tokens = [
        TokenLogprob(each, tuple(each.encode()), -1.0, (TokenLogprob("o", (111,), -2.0),)) for each in ("ab", "c")
    ]
    events: list[Event] = [*[Chunk(each.token, (each,)) for each in tokens], STOP]
    chunks = await stream(events, TEXT)
    assert [each["choices"][0]["logprobs"]["text_offset"] for each in chunks[:2]] == [[0], [2]]
    assert one(events, StreamOptions(chat=False))["choices"][0]["logprobs"] == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"o": -2.0}, {"o": -2.0}],
        "text_offset": [0, 2],
    }


def test_a_whole_chat() -> None:
    answer = one([*map(Chunk, TEXTS), STOP], StreamOptions(chat=True))
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(TEXTS), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["total_tokens"] == 8
    assert one([CALLS], StreamOptions(chat=True))["choices"][0]["message"]["content"] is None


def test_an_answer_without_an_end_is_a_defect() -> None:
    with pytest.raises(InternalError):
        one([Chunk("x")], StreamOptions(chat=True))


async def test_a_named_error_in_the_middle_is_an_event_and_the_end() -> None:
    chunks = await stream([Chunk("a"), WorkerCrashed("the worker died", hint="try again")], CHAT)
    assert chunks[-1] == {
        "error": {
            "message": "the worker died", "type": "server_error", "param": None,
            "code": "WorkerCrashed", "hint": "try again",
        }
    }  # fmt: skip
    assert "[DONE]" not in chunks


async def test_a_defect_in_the_middle_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    chunks = await stream([Chunk("a"), ZeroDivisionError("secret")], CHAT)
    assert chunks[-1]["error"]["code"] == "InternalError"
    assert "secret" not in json.dumps(chunks)
    assert "secret" in caplog.text


async def test_a_stream_that_just_ends_says_so() -> None:
    assert (await stream([Chunk("a")], CHAT))[-1]["error"]["code"] == "InternalError"
    assert (await stream([], CHAT))[-1]["error"]["code"] == "InternalError"


async def test_closing_a_stream_closes_its_source() -> None:
    source = Source([Chunk("a"), Chunk("b"), STOP])
    pieces = sse("m:1", source.run(), CHAT)
    await anext(pieces)
    await pieces.aclose()
    assert source.closed


async def test_half_a_character_from_an_engine_is_no_crash() -> None:
    chunks = await stream([Chunk("a\ud800b"), STOP], CHAT)
    assert chunks[1]["choices"][0]["delta"]["content"] == "a?b"
