"""The built-in model in process, behind the product's own way from a question to a proposal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ai_assistant.actions.ask import Asker, Complete
from ai_assistant.actions.bus import BusFailure
from ai_assistant.engines.contract import Chunk, Engine, Finished, GenerateRequest, LoadOptions, TokenLogprob
from ai_assistant.models.recipe.cases import LIVE

MODEL = Path(__file__).parents[2] / "models" / "assistant-1.gguf"


class NamesOnly:
    """A bus that knows which names exist and does nothing."""

    async def call(
        self, name: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        if member == "GetStatus":
            return ({"models": [{"name": each, "state": "unloaded"} for each in LIVE["model"]]},)
        if member == "ListTimezones":
            return (list(LIVE["zone"]),)
        raise BusFailure("org.freedesktop.DBus.Error.ServiceUnknown", name)


@contextmanager
def engine() -> Iterator[Engine]:
    from ai_assistant.engines.llama import LlamaEngine

    loaded = LlamaEngine.open(MODEL, LoadOptions(sequences=1, threads=1))
    try:
        yield loaded
    finally:
        loaded.close()


def complete_with(loaded: Engine) -> Complete:
    """The engine as the socket API shows it: a request body in, ``choices[0]`` out."""

    def answer(body: Mapping[str, Any]) -> dict[str, Any]:
        request = GenerateRequest.from_dict({
            "messages": body["messages"], "tools": body["tools"], "tool_choice": body["tool_choice"],
            "temperature": body["temperature"], "max_tokens": body["max_tokens"],
            "logprobs": body["top_logprobs"] if body["logprobs"] else None,
        })  # fmt: skip
        logprobs: list[TokenLogprob] = []
        for event in loaded.generate(request):
            if isinstance(event, Chunk):
                logprobs += event.logprobs
            elif isinstance(event, Finished):
                calls = [{"function": {"name": each.name, "arguments": each.arguments}} for each in event.tool_calls]
                content = [{"token": each.token, "logprob": each.logprob} for each in logprobs]
                return {"message": {"tool_calls": calls}, "logprobs": {"content": content}}
        raise AssertionError("the generation ended without its last event")

    async def complete(body: dict[str, Any]) -> Mapping[str, Any]:
        return await asyncio.to_thread(answer, body)

    return complete


def asker(loaded: Engine) -> Asker:
    return Asker(complete_with(loaded), NamesOnly())
