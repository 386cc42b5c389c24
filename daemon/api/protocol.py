"""One connection: HTTP/1.1 by uvicorn and h11, with who is there and the bounds they leave out.

uvicorn bounds an idle connection between requests. Added here: a time for headers to arrive, a time for a
reader to make room, a number of connections in all and per user, errors as JSON, and a connection that is
still watched for its end while an answer is being made.
"""

from __future__ import annotations

import asyncio
import sys
import time
from email.utils import formatdate
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from ai_assistant.daemon.api.auth import peer_of
from ai_assistant.daemon.api.errors import error_bytes
from ai_assistant.daemon.api.gate import Gate, source_of
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.contract import Peer
from ai_assistant.errors import AIAssistantError, Busy, InvalidArgument, Timeout

_EVICTABLE_AFTER_S = 1.0


class State(ServerState):
    """What all connections share."""

    def __init__(self, limits: Limits) -> None:
        self._date = (0, b"")
        self.limits = limits
        self.gates: set[Gate] = set()
        """Connections whose handshake goes on."""
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """The date, made when it is asked for: a clock that ticks for it would wake an idle machine."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return [(b"date", self._date[1])]

    @default_headers.setter
    def default_headers(self, value: object) -> None:
        """uvicorn sets an empty list once."""

    def of(self, owner: object) -> list[Connection]:
        """One user's, or those from one place in the network."""
        return [each for each in cast("set[Connection]", self.connections) if each.owner == owner]

    def admit(self, gate: Gate) -> bool:
        """Count a connection from the network before its handshake, unless there are too many."""
        network = [each for each in cast("set[Connection]", self.connections) if isinstance(each.owner, str)]
        mine = sum(each.owner == gate.source for each in network) + sum(
            each.source == gate.source for each in self.gates
        )
        if mine >= self.limits.connections_per_source:
            among = [each for each in network if each.owner == gate.source]
        elif len(network) + len(self.gates) >= self.limits.network_connections:
            among = network
        else:
            among = None
        if among is not None and not self.make_room(among):
            return False
        self.gates.add(gate)
        return True

    def leave(self, gate: Gate) -> None:
        self.gates.discard(gate)

    def make_room(self, among: list[Connection]) -> bool:
        """End the one of them that has been idle for longest; False when none is."""
        idle = [each for each in among if each.evictable]
        if not idle:
            return False
        min(idle, key=lambda each: each.idle_since).transport.abort()
        return True


class Connection(H11Protocol):
    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(server_state, State)
        self._shared = server_state
        self._limits = server_state.limits
        self.timeout_keep_alive = self._limits.keep_alive_s  # type: ignore[assignment]
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0
        self.owner: object = None
        """User id on the unix socket, `source_of` in the network."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer: Peer | None = None
        try:
            peer = peer_of(transport.get_extra_info("socket"))
        except OSError:
            transport.abort()
            return
        self.owner = source_of(transport) if peer is None else peer.uid
        self.app_state = {**self.app_state, "peer": peer, "source": self.owner}
        self.idle_since = self.loop.time()
        if not self._admitted():
            self._refuse(503, Busy("too many connections", hint="close some, or try again in a moment"), retry_s=1)
            return
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)
        # uvicorn leaves this timer running after an error.
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        most = self._limits.header_bytes
        if self.conn.their_state is h11.IDLE and len(data) > most:
            # h11 bounds headers only while they are incomplete: show it no more than they may have.
            super().data_received(data[: most + 1])
            data = data[most + 1 :]
            if self.transport.is_closing():
                self._stop_timers()
                return
        super().data_received(data)
        if self.transport.is_closing():
            self._stop_timers()
        elif self.conn.their_state is h11.IDLE and not self._busy:
            self._expect_headers()
        else:
            self._got_headers()
            if self._busy and self.conn.their_state is not h11.SEND_BODY:
                self._watch_while_busy()

    def send_400_response(self, msg: str) -> None:
        """h11 could not read the request; called while its exception is being handled."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        detail = str(error).splitlines()[0][:200] if error else msg
        self._refuse(status, InvalidArgument(f"not a valid HTTP request: {detail}"))

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if unread:
            # The answer did not need the rest of the body, which may have no end.
            self.transport.close()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            # Closing waits for the reader to take the rest, which may be never.
            self._expect_reader()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_while_busy(self) -> None:
        """Keep reading while an answer is made, since the end of the connection is seen only by reading.

        uvicorn stops reading when more comes than the request; what may come is the next request's head.
        """
        ahead, _ = self.conn.trailing_data
        if len(ahead) > self._limits.header_bytes:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _admitted(self) -> bool:
        """Whether there is room; if not, the longest idle connection of the same user makes some."""
        mine = self._shared.of(self.owner)
        most = self._limits.connections_per_user if isinstance(self.owner, int) else self._limits.connections_per_source
        if len(mine) <= most and len(self.connections) <= self._limits.connections:
            return True
        return self._shared.make_room(mine)

    @property
    def evictable(self) -> bool:
        """Idle for so long that nothing is on its way."""
        old = self.loop.time() - _EVICTABLE_AFTER_S
        return not self._busy and self.idle_since < old and not self.transport.is_closing()

    def _refuse(self, status: int, error: AIAssistantError, *, retry_s: int = 0) -> None:
        """Answer by ourselves and close."""
        self._stop_timers()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = error_bytes(error, status)
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if retry_s:
            headers.append(("retry-after", str(retry_s)))
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        out = (self.conn.send(response) or b"") + (self.conn.send(h11.Data(data=body)) or b"")
        self.transport.write(out + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_s, self._headers_late)

    def _got_headers(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if not self.conn.trailing_data[0]:
            # Nothing was asked, so there is nothing to answer.
            self.transport.close()
        elif not self.transport.is_closing():
            self._refuse(408, Timeout(f"no request came within {self._limits.header_s:g} s"))

    def _expect_reader(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._write_timer = None
