"""A service that answers by a script, for tests of what stands in front of the real one.

It keeps to `daemon/contract.py`, and counts what a test wants to know: generations begun, ended and closed
early. What it says is steered by the request, so that one server serves a whole test file.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ai_assistant.daemon.contract import Counters, ModelRecord, ModelState
from ai_assistant.engines.contract import (
    Chunk,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Queued,
    TokenLogprob,
    ToolCall,
    Usage,
)
from ai_assistant.engines.hetero import Wish
from ai_assistant.engines.memory import MemoryEstimate
from ai_assistant.errors import NoSuchModel

RECORD = ModelRecord(
    name="assistant:1",
    state=ModelState.LOADED,
    size_bytes=4_000_000,
    format="gguf",
    architecture="llama",
    parameters=2_300_000,
    quantization="Q8_0",
    context_length=2048,
    memory_estimate_bytes=9_000_000,
    created=1_750_000_000,
    builtin=True,
    capabilities=("generate", "embed"),
    memory=MemoryEstimate(weights_bytes=4_000_000, kv_bytes=3_000_000, compute_bytes=2_000_000),
)


class FakeService:
    """Words of the last message or the prompt come back one by one, within `max_tokens`.

    The text steers: "!forever" never ends, "!stuck" never begins, "!long" sends 64 KiB pieces without end,
    "!big" 4 MB at once, "!raise NAME" raises the error in `self.errors[NAME]` before anything, "!break NAME"
    after two pieces, "!empty" ends without a result, "!queue" waits behind others first, "!line" does so for ever.
    """

    def __init__(self) -> None:
        self.counters = Counters()
        self.records = [RECORD, replace(RECORD, name="writer:2", state=ModelState.UNLOADED, builtin=False)]
        self.state: dict[str, Any] = {"state": "running", "version": "0.0-test"}
        self.problem = "ok"
        self.errors: dict[str, BaseException] = {}
        self.requests: list[GenerateRequest] = []
        self.kept: list[float | None] = []
        """The `keep_alive_s` of each request that may say it."""
        self.wishes: list[str | None] = []
        """The `hetero_compute` of each request that reads texts."""
        self.engine_stats = EngineStats(running=1, sequences=4, kv_cells=8192, kv_used=100, decode_tokens_per_s=12.5)
        self.begun = 0
        self.finished = 0
        self.closed_early = 0
        self.sent = 0
        self.pause_s = 0.0
        self.closed = asyncio.Event()
        """Set when a generation was closed before its end."""

    def models(self) -> Sequence[ModelRecord]:
        return self.records

    def model(self, name: str) -> ModelRecord:
        for each in self.records:
            if name in (each.name, each.name.partition(":")[0]):
                return each
        raise NoSuchModel(f"there is no model {name!r}", hint="see ai-assistant model list", param="model")

    async def generate(
        self, name: str, request: GenerateRequest, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Event]:
        self.requests.append(request)
        self.kept.append(keep_alive_s)
        self.begun += 1
        try:
            async for event in self._events(request):
                self.sent += 1
                yield event
            self.finished += 1
        except Exception:
            self.finished += 1
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.closed_early += 1
            self.closed.set()
            raise

    async def embed(
        self, name: str, texts: Sequence[str], keep_alive_s: float | None = None, wish: Wish | None = None
    ) -> tuple[list[list[float]], int]:
        self._maybe_raise(texts[0])
        self._grant(wish)
        self.kept.append(keep_alive_s)
        vectors = [[math.sin(len(text) + k) for k in range(4)] for text in texts]
        return vectors, sum(len(text.split()) for text in texts)

    async def tokenize(self, name: str, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    async def detokenize(self, name: str, tokens: Sequence[int]) -> str:
        return " ".join("x" * each for each in tokens)

    async def rerank(
        self,
        name: str,
        query: str,
        documents: Sequence[str],
        keep_alive_s: float | None = None,
        wish: Wish | None = None,
    ) -> tuple[list[float], int]:
        """The share of the query's words that a document has."""
        self._maybe_raise(query)
        self._grant(wish)
        self.kept.append(keep_alive_s)
        wanted = set(query.split())
        return [len(wanted & set(each.split())) / len(wanted) for each in documents], len(documents) * len(wanted)

    async def classify(
        self, name: str, texts: Sequence[str], keep_alive_s: float | None = None, wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        self._maybe_raise(texts[0])
        self._grant(wish)
        self.kept.append(keep_alive_s)
        return [[("long", 0.75), ("short", 0.25)] for _ in texts], sum(len(text.split()) for text in texts)

    async def stats(self) -> Mapping[str, EngineStats]:
        return {each.name: self.engine_stats for each in self.records if each.state is ModelState.LOADED}

    def estimate(self, name: str, context_length: int = 0, sequences: int = 0) -> MemoryEstimate:
        return replace(self.model(name).memory, kv_bytes=1024 * (context_length or 2048) * (sequences or 4))

    async def pin(self, name: str, pinned: bool) -> None:
        wanted = self.model(name).name
        self.records = [replace(each, pinned=pinned) if each.name == wanted else each for each in self.records]

    async def drain(self, name: str) -> None:
        wanted = self.model(name).name
        self.records = [
            replace(each, state=ModelState.UNLOADED) if each.name == wanted else each for each in self.records
        ]

    def health(self) -> str:
        return self.problem

    def _grant(self, wish: Wish | None) -> None:
        """Every wish for devices comes true."""
        self.wishes.append(None if wish is None else wish.text)
        if wish is not None:
            wish.devices = wish.intent.devices or ("cpu",)

    def status(self) -> Mapping[str, Any]:
        return self.state

    async def _events(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        text = request.prompt if request.prompt is not None else str((request.messages or ({},))[-1]["content"])
        self._maybe_raise(text)
        if text.startswith("!empty"):
            return
        if text.startswith("!forever"):
            while True:
                yield Chunk("tick ")
                await asyncio.sleep(0.01)
        if text.startswith(("!queue", "!line")):
            yield Queued(3, 41.5)
            if text.startswith("!line"):
                await asyncio.Event().wait()
            yield Queued(1)
        if text.startswith("!stuck"):
            await asyncio.Event().wait()
        if text.startswith("!long"):
            while True:
                yield Chunk("x" * 65536)
                await asyncio.sleep(0)
        if text.startswith("!big"):
            yield Chunk("x" * 4_000_000)
        if text.startswith("!break"):
            yield Chunk("one ")
            yield Chunk("two ")
            raise self.errors[text.split()[1]].with_traceback(None)
        usage = Usage(len(text.split()), 0, 1, 0.25, 0.5, 0.75, 1.5)
        if request.hetero_compute is not None:
            usage = replace(usage, devices=("cpu",))
        if request.tools and request.tool_choice != "none":
            names = [each["function"]["name"] for each in request.tools]
            wanted = names if request.tool_choice in ("auto", "required") else [request.tool_choice]
            calls = tuple(ToolCall(each, json.dumps({"said": text})) for each in wanted)
            yield Finished(FinishReason.TOOL_CALLS, replace(usage, completion_tokens=3), calls)
            return
        words = text.split()
        if request.response_schema is not None:
            words = [json.dumps(dict.fromkeys(request.response_schema.get("properties", {"text": {}}), text))]
        limit = len(words) if request.max_tokens is None else request.max_tokens
        for word in words[:limit]:
            yield Chunk(word + " ", _logprobs(word + " ", request.logprobs))
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
        reason = FinishReason.LENGTH if limit < len(words) else FinishReason.STOP
        yield Finished(reason, replace(usage, completion_tokens=min(limit, len(words))))

    def _maybe_raise(self, text: str) -> None:
        if text.startswith("!raise"):
            raise self.errors[text.split()[1]].with_traceback(None)


def _logprobs(token: str, top: int | None) -> tuple[TokenLogprob, ...]:
    if top is None:
        return ()
    others = tuple(TokenLogprob(f"{token}{k}", tuple(f"{token}{k}".encode()), -1.0 - k) for k in range(top))
    return (TokenLogprob(token, tuple(token.encode()), -0.5, others),)
