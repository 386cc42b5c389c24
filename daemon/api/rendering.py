"""Answers in the OpenAI shapes: whole objects, and the chunks of a stream.

A stream's chunks differ in a few characters, so everything constant is encoded once per request; a token
costs one string encoding and a concatenation.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from ai_assistant.daemon.api.choices import Numbered
from ai_assistant.daemon.api.errors import error_bytes
from ai_assistant.engines.contract import Chunk, Event, Finished, Queued, TokenLogprob, ToolCall, Usage
from ai_assistant.engines.usage import together
from ai_assistant.errors import AIAssistantError, InternalError

_log = logging.getLogger(__name__)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

DONE = b"data: [DONE]\n\n"
# What OpenAI sends for a token that cannot occur; JSON has no infinity.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How an answer is to be sent, beside what is generated."""

    chat: bool
    """/v1/chat/completions, else /v1/completions."""
    stream: bool = False
    include_usage: bool = False
    """A last chunk with the usage; the others then carry "usage": null."""
    one_call: bool = False
    """parallel_tool_calls is false: the first tool call only."""
    n: int = 1
    """Answers to the one request."""
    keep_alive_s: float | None = None
    """For `Service.generate`."""


class Renderer(ABC):
    """One answer. Streamed: `start`, then `event` for each event. Whole: `whole` with all events."""

    _object = ""
    _chunk_object = ""
    _id_prefix = ""

    def __init__(self, model: str, options: StreamOptions, index: int = 0, like: Renderer | None = None) -> None:
        self.id: str = like.id if like else self._id_prefix + os.urandom(12).hex()
        self.created: int = like.created if like else int(time.time())
        self.model = model
        self.options = options
        self.index = index
        """Which of the request's answers this is; `like` is another of them."""
        head = {"id": self.id, "object": self._chunk_object, "created": self.created, "model": model}
        self._head = "data: " + _encode(head)[:-1]
        self._tail = (',"usage":null' if options.include_usage else "") + "}\n\n"

    @abstractmethod
    def start(self) -> bytes:
        """What goes before the first event; may be empty."""

    @abstractmethod
    def chunk(self, event: Chunk) -> bytes:
        """One piece of the answer; empty when there is nothing to send yet."""

    @abstractmethod
    def last(self, event: Finished) -> bytes:
        """The tool calls and the finish reason."""

    @abstractmethod
    def choice(self, text: str, logprobs: Sequence[TokenLogprob], event: Finished) -> dict[str, Any]:
        """This answer, whole."""

    def event(self, event: Event) -> bytes:
        """The bytes for one event; after `Finished` this answer is complete."""
        if isinstance(event, Chunk):
            return self.chunk(event)
        if isinstance(event, Queued):
            eta = "" if event.eta_s is None else f", {max(0.0, event.eta_s):.1f} s to wait"
            return _bytes(f": {event.position} before you{eta}\n\n")
        return self.last(event)

    def end(self, usage: Usage) -> bytes:
        """What ends a stream when all its answers are complete."""
        if not self.options.include_usage:
            return DONE
        return _bytes(f'{self._head},"choices":[],"usage":{_encode(usage_dict(usage))}}}\n\n') + DONE

    def head(self) -> dict[str, Any]:
        """What a whole answer begins with."""
        return {"id": self.id, "object": self._object, "created": self.created, "model": self.model}

    def _calls(self, event: Finished) -> list[dict[str, Any]]:
        calls = event.tool_calls[:1] if self.options.one_call else event.tool_calls
        return [_call(each) for each in calls]


class ChatRenderer(Renderer):
    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"
    _id_prefix = "chatcmpl-"

    def __init__(self, model: str, options: StreamOptions, index: int = 0, like: Renderer | None = None) -> None:
        super().__init__(model, options, index, like)
        self._before = f'{self._head},"choices":[{{"index":{index},"delta":'
        self._after = ',"finish_reason":null}]' + self._tail
        self._before_text = self._before + '{"content":'
        self._after_text = '},"logprobs":null' + self._after

    def start(self) -> bytes:
        return _bytes(f'{self._before}{{"role":"assistant","content":"","refusal":null}},"logprobs":null{self._after}')

    def chunk(self, event: Chunk) -> bytes:
        if event.logprobs:
            logprobs = _encode(_chat_logprobs(event.logprobs))
            return _bytes(f'{self._before_text}{_encode(event.text)}}},"logprobs":{logprobs}{self._after}')
        if not event.text:
            return b""
        return _bytes(self._before_text + _encode(event.text) + self._after_text)

    def last(self, event: Finished) -> bytes:
        out = ""
        for index, call in enumerate(self._calls(event)):
            delta = _encode({"tool_calls": [{"index": index, **call}]})
            out += f'{self._before}{delta},"logprobs":null{self._after}'
        return _bytes(f'{out}{self._before}{{}},"logprobs":null,"finish_reason":"{event.reason}"}}]{self._tail}')

    def choice(self, text: str, logprobs: Sequence[TokenLogprob], event: Finished) -> dict[str, Any]:
        calls = self._calls(event)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        return {
            "index": self.index,
            "message": message,
            "logprobs": _chat_logprobs(logprobs) if logprobs else None,
            "finish_reason": str(event.reason),
        }


class TextRenderer(Renderer):
    _object = "text_completion"
    _chunk_object = "text_completion"
    _id_prefix = "cmpl-"

    def __init__(self, model: str, options: StreamOptions, index: int = 0, like: Renderer | None = None) -> None:
        super().__init__(model, options, index, like)
        self._before_text = f'{self._head},"choices":[{{"index":{index},"text":'
        self._after = ',"finish_reason":null}]' + self._tail
        self._after_text = ',"logprobs":null' + self._after
        self._offset = 0

    def start(self) -> bytes:
        return b""

    def chunk(self, event: Chunk) -> bytes:
        if event.logprobs:
            logprobs = _encode(self._logprobs(event.logprobs))
            return _bytes(f'{self._before_text}{_encode(event.text)},"logprobs":{logprobs}{self._after}')
        if not event.text:
            return b""
        return _bytes(self._before_text + _encode(event.text) + self._after_text)

    def last(self, event: Finished) -> bytes:
        return _bytes(f'{self._before_text}"","logprobs":null,"finish_reason":"{event.reason}"}}]{self._tail}')

    def choice(self, text: str, logprobs: Sequence[TokenLogprob], event: Finished) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": str(event.reason),
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for each in tokens:
            offsets.append(self._offset)
            self._offset += len(each.token)
        return {
            "tokens": [each.token for each in tokens],
            "token_logprobs": [_finite(each.logprob) for each in tokens],
            "top_logprobs": [{top.token: _finite(top.logprob) for top in each.top} for each in tokens],
            "text_offset": offsets,
        }


def renderers(model: str, options: StreamOptions) -> list[Renderer]:
    """One for each answer that was asked for; `model` is the name they carry."""
    kind = ChatRenderer if options.chat else TextRenderer
    first = kind(model, options)
    return [first, *(kind(model, options, index, first) for index in range(1, options.n))]


def whole(model: str, events: Sequence[Numbered], options: StreamOptions) -> dict[str, Any]:
    """All answers as one object.

    Raises:
        InternalError: one of them has no `Finished`.
    """
    made = renderers(model, options)
    choices, usages = [], []
    for out in made:
        mine = [event for index, event in events if index == out.index]
        end = mine[-1] if mine else None
        if not isinstance(end, Finished):
            raise InternalError("the generation ended without a result")
        chunks = [each for each in mine if isinstance(each, Chunk)]
        logprobs = [token for each in chunks for token in each.logprobs]
        choices.append(out.choice("".join(each.text for each in chunks), logprobs, end))
        usages.append(end.usage)
    return {**made[0].head(), "choices": choices, "usage": usage_dict(together(usages))}


async def sse(
    model: str, events: AsyncGenerator[Numbered], options: StreamOptions, *, first: Numbered | None = None
) -> AsyncGenerator[bytes]:
    """A whole answer as server-sent events; each item is to be written at once, and as it is.

    An error becomes an event {"error": …} and ends the stream without [DONE]. Closing this generator closes
    `events`, which cancels the work.

    Args:
        first: an event already taken from `events`, for callers that want to see errors before they answer.
    """
    made = renderers(model, options)
    usages: list[Usage] = []
    try:
        index, event = await anext(events) if first is None else first
        data = b"".join(each.start() for each in made)
        while True:
            # Where several wait, one tells how long.
            if not isinstance(event, Queued) or index == 0:
                data += made[index].event(event)
            if isinstance(event, Finished):
                usages.append(event.usage)
                if len(usages) == len(made):
                    yield data + made[0].end(together(usages))
                    return
            if data:
                yield data
            data = b""
            index, event = await anext(events)
    except StopAsyncIteration:
        _log.error("a generation of %s ended without a result", model)
        yield error_event(InternalError("the generation ended without a result"))
    except AIAssistantError as error:
        yield error_event(error)
    except Exception:
        _log.exception("a stream of %s failed", model)
        yield error_event(InternalError("the answer could not be completed", hint="details are in the journal"))
    finally:
        await events.aclose()


def error_event(error: AIAssistantError) -> bytes:
    return b"data: " + error_bytes(error) + b"\n\n"


def usage_dict(usage: Usage) -> dict[str, Any]:
    """OpenAI's counts, and what the answer cost: joules (null where nothing measures) and seconds."""
    told = {"devices": list(usage.devices)} if usage.devices else {}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "energy_j": usage.energy_j,
        "queue_s": usage.queue_s,
        "prefill_s": usage.prefill_s,
        "decode_s": usage.decode_s,
        **told,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": "call_" + os.urandom(12).hex(),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [{**_token(each), "top_logprobs": [_token(top) for top in each.top]} for each in tokens],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _IMPOSSIBLE


def _bytes(text: str) -> bytes:
    # An engine should never give half a surrogate pair; if it does, that is one character lost and no crash.
    return text.encode("utf-8", "replace")
