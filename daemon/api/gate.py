"""What a connection from the network goes through before it is one: a bound on their number, and TLS.

asyncio's own TLS servers make the handshake first and tell nobody meanwhile, so strangers could hold as many
half-made connections as there are descriptors. Here each is counted from its first packet.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ai_assistant.daemon.api.protocol import Connection, State


def source_of(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end, as far as addresses tell: an IPv4 address, or the /64 that a household has."""
    peer = transport.get_extra_info("peername")
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except (ValueError, TypeError, IndexError):
        return "?"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Gate(asyncio.Protocol):
    """Makes the handshake, then hands over to a `Connection`."""

    def __init__(self, state: State, context: ssl.SSLContext, connection: Callable[[], Connection]) -> None:
        self._state = state
        self._context = context
        self._make = connection
        self._early = bytearray()
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        self.source = ""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._task is not None:  # the encrypted transport says so, too
            return
        self.transport = cast("asyncio.Transport", transport)
        self.source = source_of(transport)
        if not self._state.admit(self):
            # Without a word: an answer would cost the handshake that there is no room for.
            self.transport.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._open(), name="api: TLS handshake")

    async def _open(self) -> None:
        assert self.transport is not None
        limits = self._state.limits
        try:
            secure = await asyncio.get_running_loop().start_tls(
                self.transport,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=limits.header_s,
                ssl_shutdown_timeout=limits.shutdown_s,
            )
        except (OSError, ssl.SSLError, TimeoutError):
            self.transport.abort()
            return
        finally:
            self._state.leave(self)
        if secure is None or self._ended:
            self.transport.abort()
            return
        connection = self._make()
        secure.set_protocol(connection)
        connection.connection_made(secure)
        if self._early and not secure.is_closing():
            connection.data_received(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        """What came with the end of the handshake."""
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._state.leave(self)
