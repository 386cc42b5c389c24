"""Which path is which endpoint, and how whatever goes wrong in one becomes one answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from ai_assistant.daemon.api.auth import Allowed, check
from ai_assistant.daemon.api.endpoints import Endpoints
from ai_assistant.daemon.api.errors import HttpError, error_response
from ai_assistant.daemon.api.exchange import ClientGone, Exchange, Held
from ai_assistant.daemon.api.front import Front
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.api.network import Network, NetworkEndpoints
from ai_assistant.daemon.contract import Peer, Scope, Service
from ai_assistant.errors import AIAssistantError, InternalError, NotSupported

_log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]


def create_app(
    service: Service, allowed: Allowed, *, limits: Limits | None = None, network: Network | None = None
) -> ASGIApp:
    """The application; `scope["state"]["peer"]` must say who asks, as `protocol.Connection` does.

    Args:
        network: whose keys count for requests without a peer; None: there are none.
    """
    limits = limits or Limits()
    held = Held(limits.bodies_bytes)
    api = Endpoints(service)

    def route(path: str, method: str, handler: Handler, scope: Scope) -> Route:
        http = service.counters.metrics.http

        def count(status: int) -> None:
            http[(path, status)] += 1

        return Route(path, _Endpoint(handler, scope, allowed, limits, held, count), methods=[method])

    routes = [
        route("/v1/chat/completions", "POST", api.chat, Scope.INFER),
        route("/v1/completions", "POST", api.completions, Scope.INFER),
        route("/v1/embeddings", "POST", api.embeddings, Scope.INFER),
        route("/v1/rerank", "POST", api.rerank, Scope.INFER),
        route("/v1/classify", "POST", api.classify, Scope.INFER),
        route("/v1/models", "GET", api.models, Scope.READ),
        route("/v1/models/{name:path}", "GET", api.model, Scope.READ),
        route("/tokenize", "POST", api.tokenize, Scope.INFER),
        route("/detokenize", "POST", api.detokenize, Scope.INFER),
        route("/health", "GET", api.health, Scope.READ),
        route("/metrics", "GET", api.metrics, Scope.READ),
    ]
    if network is not None:
        more = NetworkEndpoints(network)
        routes += [
            route("/network", "GET", more.state, Scope.READ),
            route("/network/keys", "GET", more.keys, Scope.NETWORK_API),
            route("/network/keys", "POST", more.add, Scope.NETWORK_API),
            route("/network/keys/{key:path}", "DELETE", more.remove, Scope.NETWORK_API),
        ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_exception})
    return Front(app, network.keys if network is not None else None, limits)


class _Endpoint:
    """Runs a handler for those who may, and turns whatever goes wrong into one answer."""

    def __init__(
        self,
        handler: Handler,
        scope: Scope,
        allowed: Allowed,
        limits: Limits,
        held: Held,
        count: Callable[[int], None],
    ) -> None:
        self._handler = handler
        self._scope = scope
        self._allowed = allowed
        self._limits = limits
        self._held = held
        self._count = count

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
            await exchange.stopping()
        except HttpError as wrong:
            await exchange.fail(wrong.error, wrong.status, close=wrong.close, headers=wrong.headers)
        except AIAssistantError as error:
            await exchange.fail(error)
        except Exception:
            _log.exception("%s %s failed", scope["method"], ascii(scope["path"]))
            await exchange.fail(InternalError("the request failed", hint="details are in the journal"))
        finally:
            exchange.close()
            self._count(exchange.status)
        if _log.isEnabledFor(logging.DEBUG):
            _trace(exchange, time.monotonic() - begin)


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: no such path, or another method."""
    assert isinstance(error, HTTPException)
    path = ascii(request.scope["path"])[1:-1][:200]
    if error.status_code == 405:
        response = error_response(NotSupported(f"{path} does not take {request.method}"), 405)
        response.headers.update(error.headers or {})
        return response
    return error_response(NotSupported(f"there is no {path}", hint="docs/api.md lists the endpoints"), 404)


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
