"""Who is at the other end of the socket: on a unix socket the peer's credentials are the login."""

from __future__ import annotations

import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Mapping
from typing import Any

from ai_assistant.daemon.api.keys import Login
from ai_assistant.daemon.contract import Peer, Scope
from ai_assistant.errors import NotAuthorized

Allowed = Callable[[Peer, Scope], bool]
"""Whether a peer has a scope; the bus and the socket are given the same function."""

_PEER_GROUPS = 59  # SO_PEERGROUPS of asm-generic/socket.h; Python does not name it
_LONGEST_OPTION = 1024  # of Python's getsockopt: 256 groups
_CREDENTIALS = struct.Struct("iII")


def peer_of(connection: socket.socket | TransportSocket) -> Peer | None:
    """The process at the other end as the kernel saw it at connect time; None for anything but a unix socket.

    A member of more than 256 groups counts as a member of its primary group only: less than it has,
    never more.
    """
    if connection.family != socket.AF_UNIX:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    try:
        more = connection.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, _LONGEST_OPTION)
    except OSError:
        more = b""
    groups = struct.unpack(f"{len(more) // 4}I", more[: len(more) // 4 * 4])
    return Peer(uid=uid, gid=gid, groups=frozenset((gid, *groups)), pid=pid)


def check(state: Mapping[str, Any], scope: Scope, allowed: Allowed) -> None:
    """Let the request of `state["peer"]`, or of the key in `state["key"]`, through, or say what is missing.

    Raises:
        NotAuthorized
    """
    key = state.get("key")
    if isinstance(key, Login):
        if str(scope) not in key.scopes:
            raise NotAuthorized(f"this key is not for {scope}", hint=f"it is for {', '.join(sorted(key.scopes))}")
        return
    peer = state.get("peer")
    if not isinstance(peer, Peer) or not allowed(peer, scope):
        group = "ai-assistant-admin" if scope is Scope.NETWORK_API else "ai-assistant"
        raise NotAuthorized(
            f"you may not {scope} here", hint=f"join the group {group} (adduser NAME {group}) and log in again"
        )
