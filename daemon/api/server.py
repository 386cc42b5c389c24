"""The server on sockets that somebody else has made: no ticks, no signals, no log of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from ai_assistant.daemon.api.app import create_app
from ai_assistant.daemon.api.auth import Allowed
from ai_assistant.daemon.api.gate import Gate
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.api.network import Network
from ai_assistant.daemon.api.protocol import Connection, State
from ai_assistant.daemon.contract import Service

_log = logging.getLogger(__name__)

ANSWERS = "the API answers on its socket"
"""In the journal once it does; bench/boot.py looks for it."""
_ABORT_S = 2.0


async def serve(
    service: Service,
    sockets: Sequence[socket.socket],
    stop: asyncio.Event,
    allowed: Allowed,
    *,
    limits: Limits | None = None,
    network: Network | None = None,
    answering: Callable[[], None] = lambda: None,
) -> None:
    """Answer on `sockets`, which listen already and are closed at the end, until `stop` is set.

    Answers that are under way then have `limits.grace_s` to finish; what is left is told that the daemon
    stops. Sleeps while nobody asks: there is no periodic work.

    Args:
        network: what listens there, with TLS and keys.
        answering: called once, when the sockets are served.
    """
    limits = limits or Limits()
    config = uvicorn.Config(
        create_app(service, allowed, limits=limits, network=network),
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        # uvicorn's warnings are about clients' mistakes, which anybody may make as often as he likes.
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,  # `State` has it
        h11_max_incomplete_event_size=limits.header_bytes,
    )
    server = _Server(config, stop, limits, network, answering)
    service.counters.metrics.connections = lambda: len(server.server_state.connections)
    await server.serve(sockets=list(sockets))


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        stop: asyncio.Event,
        limits: Limits,
        network: Network | None,
        answering: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._state = State(limits)
        self.server_state = self._state
        self._network = network
        self._answering = answering
        self._stop = stop
        self._grace_s = limits.grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        _log.info(ANSWERS)
        self._answering()
        if self._network is None or self._network.context is None:
            return
        context = self._network.context
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self.config, self._state, self.lifespan.state)

        for each in self._network.sockets:
            server = await loop.create_server(lambda: Gate(self._state, context, connection), sock=each, backlog=128)
            self.servers.append(server)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the daemon."""
        yield

    async def main_loop(self) -> None:
        """uvicorn looks ten times a second whether it should stop; this is told."""
        await self._stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for each in sockets or []:
            each.close()
        for gate in list(self._state.gates):
            if gate.transport is not None:
                gate.transport.abort()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        running = set(self.server_state.tasks)
        if running:
            _, running = await asyncio.wait(running, timeout=self._grace_s)
        if running:
            _log.info("cancelling %d answers at the stop", len(running))
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=_ABORT_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        # Connections are closed in the loop's next round.
        await asyncio.sleep(0)
