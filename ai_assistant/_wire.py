"""The OpenAI-compatible JSON of the API socket: requests out, events and errors in. No input or output here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai_assistant import errors
from ai_assistant._results import Ranked
from ai_assistant.engines.contract import (
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    TokenLogprob,
    ToolCall,
    Usage,
)
from ai_assistant.errors import AIAssistantError, InternalError, from_name

_AS_IS = (
    "max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "typical_p", "repeat_penalty", "repeat_last_n", "mirostat", "mirostat_tau", "mirostat_eta", "logit_bias",
    "priority", "ignore_eos",
)  # fmt: skip
_FOREIGN = "the service answered something that this version does not understand"
_VERSIONS = "do the SDK and the appliance have the same version? See ai-assistant version"


def generation(
    model: str,
    request: GenerateRequest,
    *,
    n: int = 1,
    keep_alive: float | str | None = None,
    hetero_compute: str | None = None,
) -> tuple[str, bytes]:
    """The target and the body of the streamed request that `request` becomes."""
    given = request.to_dict()
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body.update({key: given[key] for key in _AS_IS if key in given})
    if n != 1:
        body["n"] = n
    if keep_alive is not None:
        body["keep_alive"] = keep_alive
    if hetero_compute is not None:
        body["hetero_compute"] = hetero_compute
    if request.stop:
        body["stop"] = list(request.stop)
    chat = request.messages is not None
    if not chat:
        _refuse_chat_only(request)
    if chat:
        body["messages"] = [dict(each) for each in request.messages or ()]
    else:
        body["prompt"] = request.prompt
    if request.tools:
        body["tools"] = [dict(each) for each in request.tools]
    if chat and not request.parallel_tool_calls:
        body["parallel_tool_calls"] = False
    if "tool_choice" in given:
        fixed = request.tool_choice in ("none", "auto", "required")
        function = {"type": "function", "function": {"name": request.tool_choice}}
        body["tool_choice"] = request.tool_choice if fixed else function
    if request.response_schema is not None:
        schema = dict(request.response_schema)
        body["response_format"] = (
            {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
            if schema
            else {"type": "json_object"}
        )
    if request.response_regex is not None:
        body["response_format"] = {"type": "regex", "regex": request.response_regex}
    if request.logprobs is not None:
        body.update({"logprobs": True, "top_logprobs": request.logprobs} if chat else {"logprobs": request.logprobs})
    return ("/v1/chat/completions" if chat else "/v1/completions"), dump(body)


def _refuse_chat_only(request: GenerateRequest) -> None:
    if request.tools:
        raise errors.NotSupported("tools does not go with a raw prompt", hint="use chat", param="tools")


def dump(body: Any) -> bytes:
    """JSON as UTF-8.

    Raises:
        InvalidArgument: something in it has no JSON form, or half of a surrogate pair has no UTF-8 form.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise errors.InvalidArgument("a text in the request is not valid Unicode", hint="was it UTF-8?") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidArgument(f"the request cannot be written as JSON: {error}") from error


def load(body: bytes | str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InternalError(_FOREIGN, hint=_VERSIONS) from error


def error_from(body: Any, status: int = 0) -> AIAssistantError:
    """The error in a parsed error body `{"error": {"code", "message", "param", "hint"}}`."""
    inner = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(inner, Mapping):
        if status == 503:
            return errors.ServiceUnavailable("the service is not ready", hint="try again in a moment")
        return InternalError(f"the service answered with status {status} and no reason", hint=_VERSIONS)
    code, param, hint = inner.get("code"), inner.get("param"), inner.get("hint")
    return from_name(
        code if isinstance(code, str) else "InternalError",
        str(inner.get("message") or "the service gave no reason"),
        hint=hint if isinstance(hint, str) else "",
        param=param if isinstance(param, str) else None,
    )


class EventDecoder:
    """Turns the data of server-sent events into the engine's events; knows when the answer is complete."""

    def __init__(self) -> None:
        self.done = False
        self._reason: FinishReason | None = None
        self._usage = Usage()
        self._calls: dict[int, list[str]] = {}

    def feed(self, data: str) -> list[Event]:
        """
        Raises:
            AIAssistantError: the error that the service reported in mid-stream.
            InternalError: this is not the protocol.
        """
        if data == "[DONE]":
            self.done = True
            if self._reason is None:
                raise InternalError("the service ended an answer without saying why", hint=_VERSIONS)
            calls = tuple(ToolCall(name, arguments) for _, (name, arguments) in sorted(self._calls.items()))
            return [Finished(self._reason, self._usage, calls)]
        return self.take(load(data))

    def take(self, body: Any, only: int | None = None) -> list[Event]:
        """The events in the parsed data; of one answer only, where there are several."""
        try:
            return self._decode(body, only)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InternalError(_FOREIGN, hint=_VERSIONS) from error

    def _decode(self, body: Any, only: int | None) -> list[Event]:
        if body.get("error"):
            raise error_from(body)
        if body.get("usage"):
            self._usage = usage_from(body["usage"])
        events: list[Event] = []
        for choice in body.get("choices") or ():
            if only is not None and choice.get("index") != only:
                continue
            delta = choice.get("delta") or {}
            text = delta.get("content") or choice.get("text") or ""
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                entry = self._calls.setdefault(int(call.get("index", 0)), ["", ""])
                entry[0] += function.get("name") or ""
                entry[1] += function.get("arguments") or ""
            logprobs = _logprobs(choice.get("logprobs"))
            if text or logprobs:
                events.append(Chunk(text, logprobs))
            if choice.get("finish_reason"):
                self._reason = FinishReason(choice["finish_reason"])
        return events


@dataclass(frozen=True, slots=True)
class Answer:
    """One of several answers to a request."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    end: Finished


class ChoicesDecoder:
    """Puts several answers together that come in one stream; `answers` has them when `done`."""

    def __init__(self, n: int) -> None:
        self.done = False
        self._decoders = [EventDecoder() for _ in range(n)]
        self._events: list[list[Event]] = [[] for _ in range(n)]

    def feed(self, data: str) -> list[Event]:
        """As `EventDecoder.feed`; gives nothing before all is there."""
        body = None if data == "[DONE]" else load(data)
        for index, decoder in enumerate(self._decoders):
            if body is None:
                self._events[index] += decoder.feed(data)
            else:
                self._events[index] += decoder.take(body, index)
        self.done = body is None
        return []

    def answers(self) -> list[Answer]:
        return [answer(each) for each in self._events]


def answer(events: Sequence[Event]) -> Answer:
    """All events of one answer, of which the last is `Finished`."""
    end = events[-1]
    assert isinstance(end, Finished)
    chunks = [each for each in events if isinstance(each, Chunk)]
    logprobs = tuple(token for each in chunks for token in each.logprobs)
    return Answer("".join(each.text for each in chunks), logprobs, end)


def usage_from(values: Mapping[str, Any]) -> Usage:
    details = values.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=values.get("prompt_tokens") or 0,
        completion_tokens=values.get("completion_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or values.get("cached_tokens") or 0,
        queue_s=values.get("queue_s") or 0.0,
        prefill_s=values.get("prefill_s") or 0.0,
        decode_s=values.get("decode_s") or 0.0,
        energy_j=values.get("energy_j"),
        devices=tuple(map(str, values.get("devices") or ())),
    )


def _logprobs(values: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    if not values:
        return ()
    if values.get("content") is not None:
        return tuple(_chat_logprob(each) for each in values["content"])
    tops = values.get("top_logprobs") or []
    return tuple(
        TokenLogprob(token, tuple(token.encode()), logprob, _legacy_top(tops[index] if index < len(tops) else None))
        for index, (token, logprob) in enumerate(
            zip(values.get("tokens") or (), values.get("token_logprobs") or (), strict=True)
        )
    )


def _chat_logprob(values: Mapping[str, Any]) -> TokenLogprob:
    raw = values.get("bytes")
    return TokenLogprob(
        values["token"],
        tuple(values["token"].encode() if raw is None else raw),
        values["logprob"],
        tuple(_chat_logprob(each) for each in values.get("top_logprobs") or ()),
    )


def _legacy_top(values: Mapping[str, float] | None) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token, tuple(token.encode()), logprob) for token, logprob in (values or {}).items())


def labels_from(body: Any) -> list[list[tuple[str, float]]]:
    """For each text its labels with their probabilities, likeliest first."""
    try:
        rows = sorted(body["data"], key=lambda row: row["index"])
        return [[(str(each["label"]), float(each["score"])) for each in row["predictions"]] for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InternalError(_FOREIGN, hint=_VERSIONS) from error


def ranks_from(body: Any) -> list[Ranked]:
    try:
        return [Ranked(int(each["index"]), float(each["relevance_score"])) for each in body["results"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InternalError(_FOREIGN, hint=_VERSIONS) from error


def devices_from(body: Any) -> tuple[str, ...]:
    """Where an answer was computed, if it says so."""
    usage = body.get("usage") if isinstance(body, dict) else None
    found = usage.get("devices") if isinstance(usage, dict) else None
    return tuple(map(str, found)) if isinstance(found, list) else ()


def member(body: Any, name: str) -> Any:
    """What an answer of one member holds."""
    if not isinstance(body, dict) or name not in body:
        raise InternalError(_FOREIGN, hint=_VERSIONS)
    return body[name]


def vectors_from(body: Any) -> tuple[list[list[float]], int]:
    """Vectors in the order of the texts, and the number of tokens read, out of an embeddings answer."""
    try:
        rows = sorted(body["data"], key=lambda row: row["index"])
        tokens = int((body.get("usage") or {}).get("prompt_tokens") or 0)
        return [[float(x) for x in row["embedding"]] for row in rows], tokens
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InternalError(_FOREIGN, hint=_VERSIONS) from error
