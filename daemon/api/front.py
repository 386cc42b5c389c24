"""What every request passes before an endpoint sees it: headers that mean one thing only, and a login.

On the unix socket the kernel has said who asks. Over the network a key does, and without one there is nothing
to see, not even which paths exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from ai_assistant.daemon.api.errors import HttpError
from ai_assistant.daemon.api.exchange import Exchange, Held
from ai_assistant.daemon.api.keys import KeyStore, Login
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.contract import Peer
from ai_assistant.errors import InvalidArgument, NotAuthorized

log = logging.getLogger(__name__)

_ONCE = frozenset({b"host", b"content-length", b"transfer-encoding", b"authorization", b"content-type", b"expect"})
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_FORGET_S = 900.0
_MOST_SOURCES = 1024
_CHALLENGE = 'Bearer realm="ai-assistant"'


class Failures:
    """Logins that failed, by where they came from: each makes the next answer slower."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def delay_s(self, source: str) -> float:
        """Count a failure; how long its answer is to be held back."""
        now = self._clock()
        count, at = self._seen.pop(source, (0, now))
        count = 1 if now - at > _FORGET_S else count + 1
        self._seen[source] = (count, now)
        while len(self._seen) > _MOST_SOURCES:
            self._seen.popitem(last=False)
        return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * float(2 ** min(count - 1, 16)))

    def forget(self, source: str) -> None:
        self._seen.pop(source, None)


class Front:
    def __init__(self, app: ASGIApp, keys: KeyStore | None, limits: Limits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._failures = Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            check_headers(scope["headers"])
            if not isinstance(scope["state"].get("peer"), Peer):
                scope["state"]["key"] = await self._login(scope)
        except HttpError as wrong:
            exchange = Exchange(scope, receive, send, self._limits, Held(0))
            await exchange.fail(wrong.error, wrong.status, close=wrong.close, headers=wrong.headers)
        except asyncio.CancelledError:
            await Exchange(scope, receive, send, self._limits, Held(0)).stopping()
        else:
            await self._app(scope, receive, send)

    async def _login(self, scope: Scope) -> Login:
        source = str(scope["state"].get("source", "?"))
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            error = NotAuthorized("a key is needed here", hint="send Authorization: Bearer and the key")
            raise HttpError(401, error, headers={"www-authenticate": _CHALLENGE})
        kind, _, secret = given[0].decode("latin-1").partition(" ")
        found = self._keys.login(secret.strip()) if self._keys is not None and kind.lower() == "bearer" else None
        if found is None:
            delay = self._failures.delay_s(source)
            # Never what was sent: a mistyped key is nearly one.
            log.info("a login from %s failed", source)
            await asyncio.sleep(delay)
            raise HttpError(
                401,
                NotAuthorized("this key is not good here", hint="ai-assistant api key list shows those that are"),
                headers={"www-authenticate": f'{_CHALLENGE}, error="invalid_token"'},
            )
        self._failures.forget(source)
        found.admit()
        return found


def check_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse what another program in between might read in another way.

    Raises:
        HttpError: 400, and the connection ends.
    """
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in _ONCE:
            if name in seen:
                error = InvalidArgument(f"the header {name.decode()} is given twice")
                raise HttpError(400, error, close=True)
            seen.add(name)
    if {b"content-length", b"transfer-encoding"} <= seen:
        error = InvalidArgument("give Content-Length or Transfer-Encoding, not both")
        raise HttpError(400, error, close=True)
