"""The endpoints: each reads its request, asks the service, and answers in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import sys
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from ai_assistant.daemon.api import metrics, params
from ai_assistant.daemon.api.auth import Allowed, check
from ai_assistant.daemon.api.errors import HttpError, error_bytes, error_headers
from ai_assistant.daemon.api.exchange import ClientGone, Exchange, Held
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.api.openai import (
    StreamOptions,
    parse_chat,
    parse_completion,
    parse_embeddings,
    renderer,
    sse,
)
from ai_assistant.daemon.api.rendering import error_event
from ai_assistant.daemon.contract import ModelRecord, Peer, Scope, Service
from ai_assistant.engines.contract import Chunk, Event, Finished, GenerateRequest
from ai_assistant.errors import (
    AIAssistantError,
    InternalError,
    InvalidArgument,
    NotSupported,
    ServiceUnavailable,
)

_log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]
_SERVING = ("running", "degraded")
# Between vectors the loop gets its turn: two thousand of them are a second's work.
_VECTORS_PER_TURN = 8
MAX_COLLECTED = 64 << 20
"""Bytes, about, that an answer takes while it is put together because it is not streamed."""
_EVENT_BYTES = 128
_JOINED = 4096


def create_app(service: Service, allowed: Allowed, *, limits: Limits | None = None) -> Starlette:
    """The application; `scope["state"]["peer"]` must say who asks, as `protocol.Connection` does."""
    limits = limits or Limits()
    held = Held(limits.bodies_bytes)
    api = _Api(service)

    def route(path: str, method: str, handler: Handler, scope: Scope) -> Route:
        return Route(path, _Endpoint(handler, scope, allowed, limits, held), methods=[method])

    return Starlette(
        routes=[
            route("/v1/chat/completions", "POST", api.chat, Scope.INFER),
            route("/v1/completions", "POST", api.completions, Scope.INFER),
            route("/v1/embeddings", "POST", api.embeddings, Scope.INFER),
            route("/v1/models", "GET", api.models, Scope.READ),
            route("/v1/models/{name:path}", "GET", api.model, Scope.READ),
            route("/tokenize", "POST", api.tokenize, Scope.INFER),
            route("/health", "GET", api.health, Scope.READ),
            route("/metrics", "GET", api.metrics, Scope.READ),
        ],
        exception_handlers={HTTPException: _http_exception},
    )


class _Api:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, *parse_chat(await exchange.json()))

    async def completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, *parse_completion(await exchange.json()))

    async def _generate(self, exchange: Exchange, model: str, request: GenerateRequest, options: StreamOptions) -> None:
        name = self._service.model(model).name
        events = self._service.generate(name, request)
        async with contextlib.aclosing(events), exchange.while_waiting():
            if not options.stream:
                answer = _json(renderer(name, options).whole(await _collected(events)))
            else:
                # Until the first event comes there is no status yet, so a refusal can still be a plain error.
                try:
                    first = await anext(events)
                except StopAsyncIteration:
                    raise InternalError("the generation ended without a result") from None
                await exchange.stream(sse(name, events, options, first=first))
                return
        await exchange.respond(answer)

    async def embeddings(self, exchange: Exchange) -> None:
        asked = parse_embeddings(await exchange.json())
        name = self._service.model(asked.model).name
        async with exchange.while_waiting():
            vectors, tokens = await self._service.embed(name, asked.texts)
            data = await _vectors(vectors, asked.base64)
        usage = f'{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}'
        body = f'{{"object":"list","data":[{data}],"model":{json.dumps(name)},"usage":{usage}}}'
        await exchange.respond(Response(body, media_type="application/json"))

    async def tokenize(self, exchange: Exchange) -> None:
        body = await exchange.json()
        params.check_names(body, frozenset({"model", "content"}), frozenset())
        name = self._service.model(params.text(body, "model")).name
        content = body.get("content")
        if not isinstance(content, str):
            raise InvalidArgument("content must be a string", param="content")
        async with exchange.while_waiting():
            tokens = await self._service.tokenize(name, content)
        await exchange.respond(_json({"tokens": tokens, "count": len(tokens)}))

    async def models(self, exchange: Exchange) -> None:
        data = [_model(each) for each in self._service.models()]
        await exchange.respond(_json({"object": "list", "data": data}))

    async def model(self, exchange: Exchange) -> None:
        await exchange.respond(_json(_model(self._service.model(exchange.path_params["name"]))))

    async def health(self, exchange: Exchange) -> None:
        status = self._service.status()
        state = str(status.get("state"))
        serving = state in _SERVING
        body: dict[str, Any] = {"status": "ok" if state == "running" else state, "version": status.get("version")}
        if state != "running":
            health = self._service.health()
            body["reason"] = health if health != "ok" else f"the daemon is {state}"
        headers = {} if serving else {"retry-after": "2"}
        await exchange.respond(_json(body, 200 if serving else 503, headers))

    async def metrics(self, exchange: Exchange) -> None:
        await exchange.respond(Response(metrics.render(self._service), headers={"content-type": metrics.CONTENT_TYPE}))


class _Endpoint:
    """Runs a handler for those who may, and turns whatever goes wrong into one answer."""

    def __init__(self, handler: Handler, scope: Scope, allowed: Allowed, limits: Limits, held: Held) -> None:
        self._handler = handler
        self._scope = scope
        self._allowed = allowed
        self._limits = limits
        self._held = held

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        begin = time.monotonic()
        exchange = Exchange(scope, receive, send, self._limits, self._held)
        try:
            # Before the body: strangers get nothing read for them.
            check(scope.get("state", {}), self._scope, self._allowed)
            await self._handler(exchange)
        except ClientGone:
            exchange.status = 499
        except asyncio.CancelledError:
            await _stopping(exchange)
        except HttpError as wrong:
            await _fail(exchange, wrong.error, wrong.status, close=wrong.close)
        except AIAssistantError as error:
            await _fail(exchange, error)
        except Exception:
            _log.exception("%s %s failed", scope["method"], ascii(scope["path"]))
            await _fail(exchange, InternalError("the request failed", hint="details are in the journal"))
        finally:
            exchange.close()
        if _log.isEnabledFor(logging.DEBUG):
            _trace(exchange, time.monotonic() - begin)


async def _fail(exchange: Exchange, error: AIAssistantError, status: int = 0, *, close: bool = False) -> None:
    if exchange.streaming:
        await exchange.finish(error_event(error))
    elif not exchange.started:
        await exchange.respond(_error_response(error, status, close=close))


async def _stopping(exchange: Exchange) -> None:
    """The server cancels what has not ended in time; the client is told why, and the task ends here."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
    await _fail(exchange, ServiceUnavailable("the daemon is stopping", hint="try again in a moment"))


def _error_response(error: AIAssistantError, status: int = 0, *, close: bool = False) -> Response:
    headers = error_headers(error)
    if close:
        headers["connection"] = "close"
    status = status or error.http_status
    return Response(error_bytes(error, status), status, headers, media_type="application/json")


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: no such path, or another method."""
    assert isinstance(error, HTTPException)
    path = ascii(request.scope["path"])[1:-1][:200]
    if error.status_code == 405:
        response = _error_response(NotSupported(f"{path} does not take {request.method}"), 405)
        response.headers.update(error.headers or {})
        return response
    return _error_response(NotSupported(f"there is no {path}", hint="docs/api.md lists the endpoints"), 404)


def _trace(exchange: Exchange, seconds: float) -> None:
    scope = exchange.scope
    peer = scope.get("state", {}).get("peer")
    uid = peer.uid if isinstance(peer, Peer) else -1
    path = ascii(scope["path"])[1:-1]
    milliseconds = round(seconds * 1000, 1)
    _log.debug(
        "%s %s %d uid=%d %.1f ms", scope["method"], path, exchange.status, uid, milliseconds,
        extra={"HTTP_METHOD": scope["method"], "HTTP_PATH": path, "HTTP_STATUS": exchange.status,
               "PEER_UID": uid, "DURATION_MS": milliseconds},
    )  # fmt: skip


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")


def _model(record: ModelRecord) -> dict[str, Any]:
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
        "transient": record.transient,
        "error": record.error,
    }


async def _collected(events: AsyncIterator[Event]) -> list[Event]:
    """All events, neighbouring pieces of plain text joined.

    Raises:
        InvalidArgument: they are more than one answer may keep here.
    """
    found: list[Event] = []
    held = 0
    async for event in events:
        if isinstance(event, Chunk):
            held += len(event.text) + sum(_EVENT_BYTES * (2 + len(each.top)) for each in event.logprobs)
            last = found[-1] if found else None
            if isinstance(last, Chunk) and not last.logprobs and not event.logprobs and len(last.text) < _JOINED:
                found[-1] = Chunk(last.text + event.text)
                held += 1
            else:
                found.append(event)
                held += _EVENT_BYTES
        elif isinstance(event, Finished):
            found.append(event)
        if held > MAX_COLLECTED:
            raise InvalidArgument(
                f"the answer takes more than {MAX_COLLECTED >> 20} MiB", hint="stream it, or lower max_tokens",
                param="stream",
            )  # fmt: skip
    return found


async def _vectors(vectors: Sequence[Sequence[float]], as_base64: bool) -> str:
    out = []
    for index, vector in enumerate(vectors):
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
