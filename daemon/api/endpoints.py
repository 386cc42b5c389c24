"""The endpoints: each reads its request, asks the service, and answers in OpenAI's shapes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from ai_assistant.daemon.api import answers, metrics, texts
from ai_assistant.daemon.api.answers import json_response
from ai_assistant.daemon.api.choices import Numbered, numbered
from ai_assistant.daemon.api.errors import HttpError, retry_after
from ai_assistant.daemon.api.exchange import Exchange
from ai_assistant.daemon.api.openai import StreamOptions, parse_chat, parse_completion, parse_embeddings, sse, whole
from ai_assistant.daemon.api.waits import Waits
from ai_assistant.daemon.contract import Service
from ai_assistant.engines.contract import Chunk, Finished, GenerateRequest, Queued
from ai_assistant.errors import Busy, InternalError, InvalidArgument

_SERVING = ("running", "degraded")
_MAX_PIECES = 4096
"""Different tokens whose texts are told one by one."""


class Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._waits = Waits()

    async def chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, *parse_chat(await exchange.json()))

    async def completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, *parse_completion(await exchange.json()))

    async def _generate(self, exchange: Exchange, model: str, request: GenerateRequest, options: StreamOptions) -> None:
        record = self._service.model(model)
        answers.require(record, "generate")
        answers.check_length(record, request)
        name = record.name
        events = self._observed(exchange, name, request, options)
        try:
            async with contextlib.aclosing(events), exchange.while_waiting():
                # Until the first event comes there is no status yet, so a refusal can still be a plain error.
                try:
                    first = await anext(events)
                except StopAsyncIteration:
                    raise InternalError("the generation ended without a result") from None
                headers = _queue_headers(first)
                if options.stream:
                    await exchange.stream(sse(name, events, options, first=first), headers)
                    return
                found = await answers.collected(_with(first, events))
                answer = json_response(whole(name, found, options), headers=headers)
        except Busy as error:
            if exchange.started:
                raise
            # The queue is full: whoever waits in it knows how long that takes.
            seconds = self._waits.retry_after_s(name)
            raise HttpError(error.http_status, error, headers=retry_after(seconds) if seconds else {}) from error
        await exchange.respond(answer)

    async def _observed(
        self, exchange: Exchange, name: str, request: GenerateRequest, options: StreamOptions
    ) -> AsyncGenerator[Numbered]:
        """The events; who waits for how long is remembered, and tokens count for the key that asked."""
        waits, key = self._waits, exchange.key
        waiting: set[tuple[Exchange, int]] = set()
        counted = 0
        used: list[int] = []
        events = numbered(lambda each: self._service.generate(name, each, options.keep_alive_s), request, options.n)
        try:
            async with contextlib.aclosing(events):
                async for pair in events:
                    index, event = pair
                    if isinstance(event, Queued):
                        waiting.add((exchange, index))
                        waits.told(name, (exchange, index), event)
                    else:
                        if waiting and (exchange, index) in waiting:
                            waiting.discard((exchange, index))
                            waits.over(name, (exchange, index))
                        if isinstance(event, Chunk):
                            counted += 1
                        elif isinstance(event, Finished):
                            used.append(event.usage.prompt_tokens if not used else 0)
                            used.append(event.usage.completion_tokens)
                    yield pair
        finally:
            for who in waiting:
                waits.over(name, who)
            if key is not None:
                # Whoever leaves early pays for the pieces that were made.
                key.spend(max(counted, sum(used)))

    async def embeddings(self, exchange: Exchange) -> None:
        asked = parse_embeddings(await exchange.json())
        record = self._service.model(asked.model)
        answers.require(record, "embed")
        async with exchange.while_waiting():
            vectors, tokens = await self._service.embed(record.name, asked.texts, asked.keep_alive_s, asked.wish)
            exchange.spend(tokens)
            data = await answers.vectors(vectors, asked.base64)
        usage = json.dumps(answers.usage(tokens, asked.wish), separators=(",", ":"))
        body = f'{{"object":"list","data":[{data}],"model":{json.dumps(record.name)},"usage":{usage}}}'
        await exchange.respond(Response(body, media_type="application/json"))

    async def rerank(self, exchange: Exchange) -> None:
        asked = texts.parse_rerank(await exchange.json())
        record = self._service.model(asked.model)
        answers.require(record, "rerank")
        async with exchange.while_waiting():
            scores, tokens = await self._service.rerank(
                record.name, asked.query, asked.documents, asked.keep_alive_s, asked.wish
            )
            exchange.spend(tokens)
        usage = answers.usage(tokens, asked.wish)
        made = answers.ranks(record.name, asked.documents, scores, usage, asked.top_n, asked.return_documents)
        await exchange.respond(json_response(made))

    async def classify(self, exchange: Exchange) -> None:
        asked = texts.parse_classify(await exchange.json())
        record = self._service.model(asked.model)
        answers.require(record, "classify")
        async with exchange.while_waiting():
            found, tokens = await self._service.classify(record.name, asked.texts, asked.keep_alive_s, asked.wish)
            exchange.spend(tokens)
        await exchange.respond(json_response(answers.labels(record.name, found, answers.usage(tokens, asked.wish))))

    async def tokenize(self, exchange: Exchange) -> None:
        asked = texts.parse_tokenize(await exchange.json())
        name = self._service.model(asked.model).name
        async with exchange.while_waiting():
            tokens = await self._service.tokenize(name, asked.content)
            body: dict[str, Any] = {"tokens": tokens, "count": len(tokens)}
            if asked.with_pieces:
                body["pieces"] = await self._pieces(name, tokens)
        await exchange.respond(json_response(body))

    async def _pieces(self, name: str, tokens: list[int]) -> list[str]:
        different = dict.fromkeys(tokens, "")
        if len(different) > _MAX_PIECES:
            raise InvalidArgument(
                f"with_pieces takes a text of at most {_MAX_PIECES} different tokens", param="with_pieces"
            )
        for token in different:
            different[token] = await self._service.detokenize(name, [token])
        return [different[token] for token in tokens]

    async def detokenize(self, exchange: Exchange) -> None:
        model, tokens = texts.parse_detokenize(await exchange.json())
        name = self._service.model(model).name
        async with exchange.while_waiting():
            text = await self._service.detokenize(name, tokens)
        await exchange.respond(json_response({"content": text}))

    async def models(self, exchange: Exchange) -> None:
        data = [answers.model_row(each) for each in self._service.models()]
        await exchange.respond(json_response({"object": "list", "data": data}))

    async def model(self, exchange: Exchange) -> None:
        await exchange.respond(json_response(answers.model_row(self._service.model(exchange.path_params["name"]))))

    async def health(self, exchange: Exchange) -> None:
        status = self._service.status()
        state = str(status.get("state"))
        serving = state in _SERVING
        body: dict[str, Any] = {"status": "ok" if state == "running" else state, "version": status.get("version")}
        if state != "running":
            health = self._service.health()
            body["reason"] = health if health != "ok" else f"the daemon is {state}"
        headers = {} if serving else {"retry-after": "2"}
        await exchange.respond(json_response(body, 200 if serving else 503, headers))

    async def metrics(self, exchange: Exchange) -> None:
        accept = Headers(scope=exchange.scope).get("accept", "")
        text, kind = await metrics.page(self._service, accept)
        await exchange.respond(Response(text.encode("utf-8", "replace"), headers={"content-type": kind}))


def _queue_headers(first: Numbered) -> dict[str, str]:
    """Where the request stood when it came, if it had to wait."""
    event = first[1]
    if not isinstance(event, Queued):
        return {}
    headers = {"x-queue-position": str(event.position)}
    if event.eta_s is not None and math.isfinite(event.eta_s):
        headers["x-queue-eta-seconds"] = f"{max(0.0, event.eta_s):.1f}"
    return headers


async def _with(first: Numbered, events: AsyncGenerator[Numbered]) -> AsyncGenerator[Numbered]:
    yield first
    async for each in events:
        yield each
