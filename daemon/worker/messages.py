"""What a worker may say, checked field by field. Anything else is a `ProtocolError`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ai_assistant.daemon.worker.frames import ProtocolError
from ai_assistant.engines.contract import (
    MAX_LOGPROBS,
    Chunk,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    ModelInfo,
    Placement,
    Queued,
    TokenLogprob,
    ToolCall,
    Usage,
)
from ai_assistant.errors import AIAssistantError, from_name

_MAX_MESSAGE = 2000
_MAX_PER_CHUNK = 64
_MAX_CALLS = 128
_MAX_LABEL = 200
_MAX_DEVICES = 17
"""As many as an intent can name, and the processor."""
_MAX_NAME = 200
MAX_LABELS = 20_000
"""Labels of one classification, over all its texts; a worker refuses to send more."""


def event(message: dict[str, Any]) -> Event:
    if message["event"] == "chunk":
        logprobs = _list(message.get("logprobs", []), _MAX_PER_CHUNK)
        return Chunk(_text(message.get("text")), tuple(_logprob(each) for each in logprobs) if logprobs else ())
    if message["event"] == "queued":
        eta = message.get("eta_s")
        return Queued(_count(message.get("position")), None if eta is None else _number(eta))
    reason = message.get("reason")
    if reason not in ("stop", "length", "tool_calls"):
        raise ProtocolError("an unknown reason")
    calls = _list(message.get("tool_calls", []), _MAX_CALLS)
    return Finished(FinishReason(reason), _usage(message.get("usage")), tuple(_call(each) for each in calls))


def error(message: dict[str, Any]) -> AIAssistantError:
    name, hint, param = message.get("name"), message.get("hint"), message.get("param")
    return from_name(
        _text(name)[:80],
        _text(message.get("message"))[:_MAX_MESSAGE],
        hint=_text(hint)[:_MAX_MESSAGE] if hint is not None else "",
        param=_text(param)[:200] if param is not None else None,
    )


def progress(message: dict[str, Any]) -> float:
    return min(max(_number(message.get("value")), 0.0), 1.0)


def model_info(value: Any) -> ModelInfo:
    if not isinstance(value, dict) or set(value) != {each.name for each in fields(ModelInfo)}:
        raise ProtocolError("a strange description of a model")
    kinds: dict[str, Callable[[Any], Any]] = {"str": _text, "int": _count, "bool": _truth}
    return ModelInfo(**{each.name: kinds[str(each.type)](value[each.name]) for each in fields(ModelInfo)})


def placement(value: Any) -> Placement:
    """Of a load; an engine that does not say has none."""
    if value is None:
        return Placement()
    if not isinstance(value, dict) or set(value) != {each.name for each in fields(Placement)}:
        raise ProtocolError("a strange placement")
    memory = value["memory_bytes"]
    if not isinstance(memory, dict) or len(memory) > _MAX_DEVICES:
        raise ProtocolError("a strange placement")
    pairs = [_list(each, 2) for each in _list(value["parts"], _MAX_DEVICES)]
    if any(len(each) != 2 for each in pairs):
        raise ProtocolError("a strange placement")
    return Placement(
        parts=tuple((_text(name)[:_MAX_NAME], _count(layers)) for name, layers in pairs),
        memory_bytes={_text(name)[:_MAX_NAME]: _count(size) for name, size in memory.items()},
        host_bytes=_count(value["host_bytes"]),
        warning=_text(value["warning"])[:_MAX_MESSAGE],
    )


def _vectors(value: Any) -> tuple[list[list[float]], int, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ProtocolError("a strange answer")
    vectors = _list(value.get("vectors"), 1 << 16)
    found = [[_number(each) for each in _list(vector, 1 << 16)] for vector in vectors]
    return found, _count(value.get("tokens")), _devices(value)


def _tokens(value: Any) -> list[int]:
    return [_count(each) for each in _list(value, 1 << 24)]


def _scores(value: Any) -> tuple[list[float], int, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ProtocolError("a strange answer")
    scores = [_number(each) for each in _list(value.get("scores"), 1 << 20)]
    return scores, _count(value.get("tokens")), _devices(value)


def _labels(value: Any) -> tuple[list[list[tuple[str, float]]], int, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ProtocolError("a strange answer")
    texts = _list(value.get("labels"), MAX_LABELS)
    found = [[_label(each) for each in _list(text, MAX_LABELS)] for text in texts]
    return found, _count(value.get("tokens")), _devices(value)


def _devices(values: dict[str, Any]) -> tuple[str, ...]:
    """Names of devices; none where the request did not ask."""
    names = [_text(each) for each in _list(values.get("devices", []), _MAX_DEVICES)]
    # They go on to terminals, and to a bus that has no NUL.
    if not all(each.isprintable() and 0 < len(each) <= _MAX_NAME for each in names):
        raise ProtocolError("a strange name of a device")
    return tuple(names)


def _label(value: Any) -> tuple[str, float]:
    pair = _list(value, 2)
    if len(pair) != 2:
        raise ProtocolError("a strange label")
    return _text(pair[0])[:_MAX_LABEL], _number(pair[1])


def _stats(value: Any) -> EngineStats:
    kinds: dict[str, Callable[[Any], Any]] = {"int": _count, "float": _rate}
    known = {each.name: kinds[str(each.type)] for each in fields(EngineStats)}
    if not isinstance(value, dict) or set(value) != set(known):
        raise ProtocolError("strange statistics")
    return EngineStats(**{name: read(value[name]) for name, read in known.items()})


def _rate(value: Any) -> float:
    number = _number(value)
    if number < 0:
        raise ProtocolError("a negative rate")
    return number


def _usage(value: Any) -> Usage:
    if not isinstance(value, dict):
        raise ProtocolError("no usage")
    energy = value.get("energy_j")
    return Usage(
        prompt_tokens=_count(value.get("prompt_tokens")),
        completion_tokens=_count(value.get("completion_tokens")),
        cached_tokens=_count(value.get("cached_tokens")),
        queue_s=_number(value.get("queue_s")),
        prefill_s=_number(value.get("prefill_s")),
        decode_s=_number(value.get("decode_s")),
        energy_j=None if energy is None else _number(energy),
        devices=_devices(value),
    )


def _call(value: Any) -> ToolCall:
    if not isinstance(value, dict):
        raise ProtocolError("a strange tool call")
    return ToolCall(_text(value.get("name")), _text(value.get("arguments")))


def _logprob(value: Any, *, inner: bool = False) -> TokenLogprob:
    if not isinstance(value, dict):
        raise ProtocolError("a strange log-probability")
    raw = _list(value.get("bytes"), 1 << 16)
    if not all(isinstance(each, int) and 0 <= each < 256 for each in raw):
        raise ProtocolError("bytes that are none")
    top = [] if inner else _list(value.get("top", []), MAX_LOGPROBS)
    return TokenLogprob(
        _text(value.get("token")),
        tuple(raw),
        _number(value.get("logprob")),
        tuple(_logprob(each, inner=True) for each in top),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ProtocolError("something that is no text")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ProtocolError("something that is no count")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError("something that is neither true nor false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ProtocolError("something that is no number")
    return float(value)


def _list(value: Any, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        raise ProtocolError("something that is no list, or too long")
    return value


RESULTS: dict[str, Callable[[Any], Any]] = {
    "embed": _vectors,
    "rerank": _scores,
    "classify": _labels,
    "tokenize": _tokens,
    "detokenize": _text,
    "stats": _stats,
    "trim": _count,
    "ping": _count,
}
"""The reader of each operation's result."""
