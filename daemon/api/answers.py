"""What the endpoints answer beside generated text: models, vectors, ranks, labels; and how much may be kept."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from ai_assistant.daemon.api.choices import Numbered
from ai_assistant.daemon.contract import ModelRecord
from ai_assistant.engines.contract import Chunk, Finished, GenerateRequest
from ai_assistant.engines.hetero import Wish
from ai_assistant.errors import ContextOverflow, InvalidArgument, NotSupported

# Between vectors the loop gets its turn: two thousand of them are a second's work.
_VECTORS_PER_TURN = 8
MAX_COLLECTED = 64 << 20
"""Bytes, about, that an answer takes while it is put together because it is not streamed."""
_EVENT_BYTES = 128
_JOINED = 4096
LONGEST_TOKEN_BYTES = 256
"""No vocabulary has longer tokens than runs of 128 spaces or so."""

_CANNOT = {
    "generate": ("does not generate text", "it embeds, ranks or classifies"),
    "embed": ("gives no vectors", "use a model that has embed among its capabilities, see /v1/models"),
    "rerank": ("does not rank documents", "use a model that has rerank among its capabilities, see /v1/models"),
    "classify": ("does not classify", "use a model that has classify among its capabilities, see /v1/models"),
}


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")


def require(record: ModelRecord, capability: str) -> None:
    """Refuse what the model cannot do before it is loaded for it.

    Raises:
        NotSupported
    """
    if record.capabilities and capability not in record.capabilities:
        what, hint = _CANNOT[capability]
        raise NotSupported(f"{record.name} {what}", hint=hint, param="model")


def check_length(record: ModelRecord, request: GenerateRequest) -> None:
    """Refuse a prompt that cannot fit, however it is split, before anybody spends time on splitting it.

    Raises:
        ContextOverflow
    """
    if request.prompt is not None:
        size, param = len(request.prompt), "prompt"
    else:
        size, param = sum(len(str(each.get("content", ""))) for each in request.messages or ()), "messages"
    # Characters, of which a token has no more than bytes.
    if record.context_length and size > record.context_length * LONGEST_TOKEN_BYTES:
        raise ContextOverflow(
            f"{param} has {size} characters, which is more than {record.context_length} tokens in any case",
            hint="shorten it",
            param=param,
        )


def model_row(record: ModelRecord) -> dict[str, Any]:
    """One model of /v1/models. Sizes in bytes, context in tokens."""
    return {
        "id": record.name,
        "object": "model",
        "created": record.created,
        "owned_by": "ai-assistant" if record.builtin else "user",
        "state": str(record.state),
        "format": record.format,
        "architecture": record.architecture,
        "parameters": record.parameters,
        "quantization": record.quantization,
        "context_length": record.context_length,
        "size_bytes": record.size_bytes,
        "memory_estimate_bytes": record.memory_estimate_bytes,
        "memory": record.memory.to_dict(),
        "resident_bytes": record.resident_bytes,
        "pinned": record.pinned,
        "capabilities": list(record.capabilities),
        "transient": record.transient,
        "error": record.error,
    }


async def collected(events: AsyncIterator[Numbered]) -> list[Numbered]:
    """All events, neighbouring pieces of plain text of an answer joined.

    Raises:
        InvalidArgument: they are more than one answer may keep here.
    """
    found: list[Numbered] = []
    latest: dict[int, int] = {}
    held = 0
    async for index, event in events:
        if isinstance(event, Chunk):
            held += len(event.text) + sum(_EVENT_BYTES * (2 + len(each.top)) for each in event.logprobs)
            place = latest.get(index)
            last = None if place is None else found[place][1]
            if (
                place is not None
                and isinstance(last, Chunk)
                and not last.logprobs
                and not event.logprobs
                and len(last.text) < _JOINED
            ):
                found[place] = (index, Chunk(last.text + event.text))
                held += 1
            else:
                latest[index] = len(found)
                found.append((index, event))
                held += _EVENT_BYTES
        elif isinstance(event, Finished):
            found.append((index, event))
        if held > MAX_COLLECTED:
            raise InvalidArgument(
                f"the answer takes more than {MAX_COLLECTED >> 20} MiB", hint="stream it, or lower max_tokens",
                param="stream",
            )  # fmt: skip
    return found


async def vectors(found: Sequence[Sequence[float]], as_base64: bool) -> str:
    """The members of `data` in an embeddings answer, as JSON text."""
    out = []
    for index, vector in enumerate(found):
        if as_base64:
            packed = array("f", vector)
            if sys.byteorder != "little":
                packed.byteswap()
            text = '"' + base64.b64encode(packed.tobytes()).decode() + '"'
        else:
            text = json.dumps(vector, separators=(",", ":"), allow_nan=False)
        out.append(f'{{"object":"embedding","index":{index},"embedding":{text}}}')
        if index % _VECTORS_PER_TURN == _VECTORS_PER_TURN - 1:
            await asyncio.sleep(0)
    return ",".join(out)


def usage(tokens: int, wish: Wish | None) -> dict[str, Any]:
    """What reading texts took, and where, if that was asked."""
    told = {} if wish is None else {"devices": list(wish.devices)}
    return {"prompt_tokens": tokens, "total_tokens": tokens, **told}


def ranks(
    model: str,
    documents: Sequence[str],
    scores: Sequence[float],
    usage: dict[str, Any],
    top_n: int | None,
    texts: bool,
) -> dict[str, Any]:
    """A rerank answer: best first, equals in the order of the documents."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
    results = []
    for index in order:
        row: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if texts:
            row["document"] = {"text": documents[index]}
        results.append(row)
    return {
        "id": "rerank-" + os.urandom(12).hex(),
        "object": "list",
        "model": model,
        "results": results,
        "usage": usage,
    }


def labels(model: str, found: Sequence[Sequence[tuple[str, float]]], usage: dict[str, Any]) -> dict[str, Any]:
    """A classification answer: for each text its likeliest label, and all with their probabilities."""
    data = []
    for index, each in enumerate(found):
        row: dict[str, Any] = {"object": "classification", "index": index, "prediction": None, "score": None}
        if each:
            row["prediction"], row["score"] = each[0]
        row["predictions"] = [{"label": label, "score": score} for label, score in each]
        data.append(row)
    return {
        "id": "classify-" + os.urandom(12).hex(),
        "object": "list",
        "model": model,
        "data": data,
        "usage": usage,
    }
