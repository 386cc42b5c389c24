"""Requests of the OpenAI interface, translated: no I/O, so the bus uses the same code for its streams.

    parse_chat(body)        POST /v1/chat/completions
    parse_completion(body)  POST /v1/completions
    parse_embeddings(body)  POST /v1/embeddings
    sse(…)                  events to the bytes of a stream

Bodies come from `jsonbody.parse_object`. Unknown parameters are errors; `params` has the two tables of
those that are accepted without effect, and the reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ai_assistant.daemon.api import params
from ai_assistant.daemon.api.choices import numbered
from ai_assistant.daemon.api.messages import messages
from ai_assistant.daemon.api.rendering import StreamOptions, sse, usage_dict, whole
from ai_assistant.engines.contract import GenerateRequest
from ai_assistant.engines.hetero import PARAM, Wish
from ai_assistant.errors import InvalidArgument, NotSupported

__all__ = [
    "EmbeddingsRequest",
    "StreamOptions",
    "numbered",
    "parse_chat",
    "parse_completion",
    "parse_embeddings",
    "sse",
    "usage_dict",
    "whole",
]

COMPLETION_MAX_TOKENS = 16
"""What /v1/completions has always meant by no max_tokens; raw text has no natural end."""
MAX_EMBEDDING_INPUTS = 2048

_FORMAT = {"response_regex": "response_format.regex", "response_schema": "response_format.json_schema.schema"}
# These mean the same in both endpoints and in `GenerateRequest`, which checks their types and ranges.
_SAME = (
    "seed", "temperature", "top_p", "frequency_penalty", "presence_penalty", "top_k", "min_p", "typical_p",
    "repeat_penalty", "repeat_last_n", "mirostat", "mirostat_tau", "mirostat_eta", "logit_bias", "priority",
    "ignore_eos", "hetero_compute",
)  # fmt: skip
_COMMON = frozenset(
    {"model", "stop", "stream", "stream_options", "max_tokens", "n", "keep_alive", "response_format", *_SAME}
)
_CHAT = _COMMON | {
    "messages", "tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens", "logprobs", "top_logprobs",
}  # fmt: skip
_COMPLETION = _COMMON | {"prompt", "logprobs"}
_BESIDE_COMPLETION = frozenset({"best_of", "echo", "suffix", *params.HARMLESS})
_BESIDE_CHAT = frozenset(params.DEFAULT_ONLY) - {"best_of", "echo", "suffix"} | set(params.HARMLESS)


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    model: str
    texts: tuple[str, ...]
    base64: bool
    """Vectors as base64 of little-endian 32-bit floats, not as lists of numbers."""
    keep_alive_s: float | None = None
    wish: Wish | None = None


def parse_chat(body: Mapping[str, Any]) -> tuple[str, GenerateRequest, StreamOptions]:
    """Read the body of a chat completion.

    Raises:
        InvalidArgument, NotSupported: with the parameter's name or path.
    """
    params.check_names(body, _CHAT, _BESIDE_CHAT)
    model = params.text(body, "model")
    found = params.tools(body.get("tools"))
    names = [each["function"]["name"] for each in found]
    choice = params.tool_choice(body.get("tool_choice"), names)
    values = _sampling(body)
    values["messages"] = messages(body.get("messages"))
    values["max_tokens"] = params.max_tokens(body)
    values["logprobs"] = params.chat_logprobs(body)
    if found:
        values["tools"] = found
        values["tool_choice"] = choice
        values["parallel_tool_calls"] = params.flag(body, "parallel_tool_calls", default=True)
    stream = params.flag(body, "stream")
    options = StreamOptions(
        chat=True,
        stream=stream,
        include_usage=params.include_usage(body, stream),
        one_call=not params.flag(body, "parallel_tool_calls", default=True),
        n=params.choices(body),
        keep_alive_s=params.keep_alive(body),
    )
    with _openai_names({"logprobs": "top_logprobs", "max_tokens": _given_limit(body), **_FORMAT}):
        return model, GenerateRequest.from_dict(values), options


def parse_completion(body: Mapping[str, Any]) -> tuple[str, GenerateRequest, StreamOptions]:
    """Read the body of a text completion.

    Raises:
        InvalidArgument, NotSupported: with the parameter's name.
    """
    params.check_names(body, _COMPLETION, _BESIDE_COMPLETION)
    model = params.text(body, "model")
    values = _sampling(body)
    values["prompt"] = _prompt(body.get("prompt"))
    given = body.get("max_tokens")
    values["max_tokens"] = COMPLETION_MAX_TOKENS if given is None else given
    values["logprobs"] = body.get("logprobs")
    stream = params.flag(body, "stream")
    options = StreamOptions(
        chat=False,
        stream=stream,
        include_usage=params.include_usage(body, stream),
        n=params.choices(body),
        keep_alive_s=params.keep_alive(body),
    )
    with _openai_names(_FORMAT):
        return model, GenerateRequest.from_dict(values), options


def parse_embeddings(body: Mapping[str, Any]) -> EmbeddingsRequest:
    """Read the body of an embeddings request.

    Raises:
        InvalidArgument, NotSupported: with the parameter's name.
    """
    known = frozenset({"model", "input", "encoding_format", "dimensions", "keep_alive", PARAM})
    params.check_names(body, known, frozenset(params.HARMLESS))
    model = params.text(body, "model")
    if body.get("dimensions") is not None:
        raise NotSupported("dimensions is not supported: vectors have the model's own length", param="dimensions")
    encoding = body.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise InvalidArgument("encoding_format must be float or base64", param="encoding_format")
    texts, wish = _inputs(body.get("input")), Wish.of(body.get(PARAM))
    return EmbeddingsRequest(model, texts, encoding == "base64", params.keep_alive(body), wish)


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: body[name] for name in _SAME if body.get(name) is not None}
    if body.get("stop") is not None:
        values["stop"] = params.stop(body["stop"])
    values.update(params.response_format(body.get("response_format")))
    return values


def _given_limit(body: Mapping[str, Any]) -> str:
    return "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"


@contextmanager
def _openai_names(names: Mapping[str, str]) -> Iterator[None]:
    """Name the parameter that the caller sent, where `GenerateRequest` has another name for it."""
    try:
        yield
    except InvalidArgument as error:
        theirs = names.get(error.param or "")
        if theirs is None or theirs == error.param:
            raise
        message = error.message.replace(str(error.param), theirs, 1)
        raise type(error)(message, hint=error.hint, param=theirs) from None


def _prompt(value: object) -> str:
    if value is None:
        raise InvalidArgument("prompt is missing", param="prompt")
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise NotSupported("prompt cannot be a list of tokens", hint="send the text", param="prompt")
    if isinstance(value, list) and len(value) > 1:
        raise NotSupported("prompt takes one text", hint="send one request for each", param="prompt")
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        raise InvalidArgument("prompt must be a string", param="prompt")
    return value


def _inputs(value: object) -> tuple[str, ...]:
    if value is None:
        raise InvalidArgument("input is missing", param="input")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise InvalidArgument("input must be a string or a list of strings", param="input")
    if len(texts) > MAX_EMBEDDING_INPUTS:
        raise InvalidArgument(f"input takes at most {MAX_EMBEDDING_INPUTS} texts", param="input")
    for index, each in enumerate(texts):
        if isinstance(each, int | list):
            raise NotSupported("input cannot be a list of tokens", hint="send the text", param="input")
        if not isinstance(each, str):
            raise InvalidArgument(f"input[{index}] must be a string", param=f"input[{index}]")
        if not each:
            raise InvalidArgument(f"input[{index}] is empty", param=f"input[{index}]")
    return tuple(texts)
