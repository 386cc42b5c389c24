"""Bodies of the OpenAI interface to requests: every parameter, and every way to get it wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ai_assistant.daemon.api import params
from ai_assistant.daemon.api.openai import (
    COMPLETION_MAX_TOKENS,
    StreamOptions,
    parse_chat,
    parse_completion,
    parse_embeddings,
)
from ai_assistant.errors import InvalidArgument, NotSupported

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "warmth", "description": "how warm", "parameters": {"type": "object", "properties": {}}},
}
NAMED = {"type": "function", "function": {"name": "warmth"}}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", **more}


def test_the_least_that_a_chat_needs() -> None:
    model, request, options = parse_chat(chat())
    assert model == "m"
    assert request.messages == ({"role": "user", "content": "hi"},)
    assert request.to_dict() == {"messages": [{"role": "user", "content": "hi"}]}
    assert options == StreamOptions(chat=True)


def test_every_sampling_parameter_arrives() -> None:
    values = {
        "seed": 7, "temperature": 0.5, "top_p": 0.9, "frequency_penalty": -1, "presence_penalty": 1.5,
        "top_k": 40, "min_p": 0.1, "typical_p": 0.7, "repeat_penalty": 1.1, "repeat_last_n": 32, "mirostat": 2,
        "mirostat_tau": 4.0, "mirostat_eta": 0.2, "logit_bias": {"50256": -100.0}, "priority": "batch",
        "ignore_eos": True,
    }  # fmt: skip
    for request in (parse_chat(chat(**values))[1], parse_completion(text(**values))[1]):
        for name, value in values.items():
            assert getattr(request, name) == value


def test_null_means_not_given() -> None:
    names = ("seed", "temperature", "stop", "tools", "tool_choice", "response_format", "max_tokens", "logprobs",
             "stream", "stream_options", "n", "logit_bias", "audio", "user", "functions", "keep_alive",
             "priority")  # fmt: skip
    assert parse_chat(chat(**dict.fromkeys(names))) == parse_chat(chat())


def test_both_names_of_the_token_limit() -> None:
    assert parse_chat(chat(max_tokens=5))[1].max_tokens == 5
    assert parse_chat(chat(max_completion_tokens=6))[1].max_tokens == 6
    assert parse_chat(chat(max_tokens=7, max_completion_tokens=7))[1].max_tokens == 7
    assert parse_chat(chat())[1].max_tokens is None
    assert parse_completion(text())[1].max_tokens == COMPLETION_MAX_TOKENS
    assert parse_completion(text(max_tokens=300))[1].max_tokens == 300


def test_stop_is_a_string_or_a_list() -> None:
    assert parse_chat(chat(stop="END"))[1].stop == ("END",)
    assert parse_completion(text(stop=["a", "b"]))[1].stop == ("a", "b")
    assert parse_chat(chat(stop=[]))[1].stop == ()


def test_log_probabilities() -> None:
    assert parse_chat(chat(logprobs=True))[1].logprobs == 0
    assert parse_chat(chat(logprobs=True, top_logprobs=3))[1].logprobs == 3
    assert parse_chat(chat(logprobs=False, top_logprobs=0))[1].logprobs is None
    assert parse_completion(text(logprobs=4))[1].logprobs == 4


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert parse_chat(chat(response_format={"type": "text"}))[1].response_schema is None
    assert parse_chat(chat(response_format={"type": "json_object"}))[1].response_schema == {}
    assert parse_chat(chat(response_format=wrapped))[1].response_schema == schema


def test_a_regular_expression_and_a_schema_go_with_both_kinds() -> None:
    for _, request, _ in (
        parse_chat(chat(response_format={"type": "regex", "regex": "[0-9]+"})),
        parse_completion(text(response_format={"type": "regex", "regex": "[0-9]+"})),
    ):
        assert (request.response_regex, request.response_schema) == ("[0-9]+", None)
    assert parse_completion(text(response_format={"type": "json_object"}))[1].response_schema == {}


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None), (0, 0.0), (90, 90.0), (1.5, 1.5), (-1, math.inf), ("-1", math.inf), ("0", 0.0), ("45", 45.0),
        ("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0), ("2d", 172800.0), (" 5m ", 300.0),
    ],
)  # fmt: skip
def test_how_long_a_model_stays(given: Any, seconds: float | None) -> None:
    assert parse_chat(chat(keep_alive=given))[2].keep_alive_s == seconds
    assert parse_completion(text(keep_alive=given))[2].keep_alive_s == seconds
    assert parse_embeddings({"model": "m", "input": "x", "keep_alive": given}).keep_alive_s == seconds


def test_several_answers() -> None:
    assert parse_chat(chat(n=8))[2].n == 8
    assert parse_completion(text(n=1))[2] == StreamOptions(chat=False)


def test_tools_and_the_choice_among_them() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    request = parse_chat(chat(tools=[strict]))[1]
    assert request.tools == (TOOL,)
    assert request.tool_choice == "auto"
    for given, want in (("none", "none"), ("auto", "auto"), ("required", "required"), (NAMED, "warmth")):
        assert parse_chat(chat(tools=[TOOL], tool_choice=given))[1].tool_choice == want
    assert parse_chat(chat(tools=[TOOL], parallel_tool_calls=False))[2].one_call
    assert not parse_chat(chat(tools=[TOOL], parallel_tool_calls=True))[2].one_call


@pytest.mark.parametrize("name", ["none", "auto", "required"])
def test_a_tool_named_like_a_choice_can_be_offered_but_not_chosen_by_name(name: str) -> None:
    tools = [{"type": "function", "function": {"name": name}}]
    assert parse_chat(chat(tools=tools))[1].tool_choice == "auto"
    with pytest.raises(NotSupported) as caught:
        parse_chat(chat(tools=tools, tool_choice={"type": "function", "function": {"name": name}}))
    assert caught.value.param == "tool_choice.function.name"


def test_a_conversation_is_reduced_to_what_templates_read() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "warmth", "arguments": "{}"}}
    _, request, _ = parse_chat(
        chat(
            messages=[
                {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
                {"role": "user", "content": "how warm?", "name": "ann"},
                {
                    "role": "assistant", "content": None, "tool_calls": [{**call, "index": 0}],
                    "refusal": None, "annotations": [], "audio": None, "function_call": None,
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "41"},
                {"role": "assistant", "content": None, "refusal": "no"},
            ]
        )
    )  # fmt: skip
    assert request.messages == (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "how warm?", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "41", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "no"},
    )


def test_streaming_options() -> None:
    assert parse_chat(chat(stream=True))[2] == StreamOptions(chat=True, stream=True)
    more = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert parse_completion(text(**more))[2] == StreamOptions(chat=False, stream=True, include_usage=True)


def test_a_prompt_may_be_a_list_of_one() -> None:
    assert parse_completion(text(prompt=["hello"]))[1].prompt == "hello"


@pytest.mark.parametrize("name", sorted(params.HARMLESS))
def test_what_clients_send_and_does_nothing_is_accepted_but_typed(name: str) -> None:
    kind = params.HARMLESS[name][0][0]
    plain = parse_chat(chat())
    assert parse_chat(chat(**{name: kind()})) == plain
    with pytest.raises(InvalidArgument) as caught:
        parse_chat(chat(**{name: 3.5}))
    assert caught.value.param == name


@pytest.mark.parametrize("name", sorted(set(params.DEFAULT_ONLY) - {"best_of", "echo", "suffix"}))
def test_what_cannot_be_done_is_refused_unless_it_is_the_default(name: str) -> None:
    for default in params.DEFAULT_ONLY[name][0]:
        assert parse_chat(chat(**{name: default})) == parse_chat(chat())
    with pytest.raises(NotSupported) as caught:
        parse_chat(chat(**{name: {"something": "else"}}))
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": [], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "odd"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "hi", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "tool", "content": "41"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2.0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"stop": 3}, "stop"),
        ({"stop": [3]}, "stop[0]"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"every": 1}}, "stream_options.every"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": "3"}, "top_logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": []}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"tools": {}}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f\n"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice.function.name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"temprature": 1}, "temprature"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": -(10**9)}, "n"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias.the"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias.1"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias." + "9" * 20),
        ({"logit_bias": {str(k): 1 for k in range(2000)}}, "logit_bias"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"mirostat": 3}, "mirostat"),
        ({"mirostat": True}, "mirostat"),
        ({"mirostat_tau": -1}, "mirostat_tau"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_last_n": -1}, "repeat_last_n"),
        ({"typical_p": -0.1}, "typical_p"),
        ({"top_k": -1}, "top_k"),
        ({"keep_alive": -2}, "keep_alive"),
        ({"keep_alive": "5 minutes"}, "keep_alive"),
        ({"keep_alive": ""}, "keep_alive"),
        ({"keep_alive": "-5m"}, "keep_alive"),
        ({"keep_alive": "٥m"}, "keep_alive"),
        ({"keep_alive": 1e30}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"keep_alive": []}, "keep_alive"),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": 3}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": "a" * 5000}}, "response_format.regex"),
        ({"response_format": {"type": "regex", "regex": "a", "schema": {}}}, "response_format.schema"),
        ({"prompt": "hi"}, "prompt"),
        ({"echo": False}, "echo"),
    ],
)
def test_a_wrong_chat_parameter_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_chat(chat(**more))
    assert caught.value.param == param
    assert caught.value.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
         "messages[0].function_call"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ],
)  # fmt: skip
def test_what_no_model_here_can_do_is_not_supported(more: dict[str, Any], param: str) -> None:
    with pytest.raises(NotSupported) as caught:
        parse_chat(chat(**more))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("more", "param", "kind"),
    [
        ({"prompt": None}, "prompt", InvalidArgument),
        ({"prompt": 3}, "prompt", InvalidArgument),
        ({"prompt": []}, "prompt", InvalidArgument),
        ({"prompt": [None]}, "prompt", InvalidArgument),
        ({"prompt": [1, 2, 3]}, "prompt", NotSupported),
        ({"prompt": [[1, 2], [3]]}, "prompt", NotSupported),
        ({"prompt": ["a", "b"]}, "prompt", NotSupported),
        ({"echo": True}, "echo", NotSupported),
        ({"suffix": "end"}, "suffix", NotSupported),
        ({"best_of": 2}, "best_of", NotSupported),
        ({"n": 9}, "n", InvalidArgument),
        ({"logit_bias": {"50256": -101}}, "logit_bias.50256", InvalidArgument),
        ({"logprobs": True}, "logprobs", InvalidArgument),
        ({"logprobs": 21}, "logprobs", InvalidArgument),
        ({"messages": []}, "messages", InvalidArgument),
        ({"tools": []}, "tools", InvalidArgument),
        ({"max_completion_tokens": 3}, "max_completion_tokens", InvalidArgument),
    ],
)
def test_a_wrong_completion_parameter_is_named(more: dict[str, Any], param: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        parse_completion(text(**more))
    assert getattr(caught.value, "param", None) == param


def test_embeddings() -> None:
    one = parse_embeddings({"model": "m", "input": "hi", "user": "ann"})
    assert (one.model, one.texts, one.base64) == ("m", ("hi",), False)
    two = parse_embeddings({"model": "m", "input": ["a", "b"], "encoding_format": "base64"})
    assert (two.texts, two.base64) == (("a", "b"), True)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": {}}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": ["a", 2]}, "input"),
        ({"input": ["a", None]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"encoding_format": []}, "encoding_format"),
        ({"dimensions": 8}, "dimensions"),
        ({"stream": True}, "stream"),
    ],
)
def test_a_wrong_embeddings_parameter_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidArgument, NotSupported)) as caught:
        parse_embeddings({"model": "m", "input": "hi", **more})
    assert caught.value.param == param
