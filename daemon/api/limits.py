"""Every bound of the interface in one place. Sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    body_bytes: int = 8 * 1024 * 1024
    """One request's body. Longer than any model's context as text."""
    bodies_bytes: int = 32 * 1024 * 1024
    """All bodies being read at one time."""
    header_bytes: int = 32 * 1024
    """Request line and headers; also how much may be sent ahead of an answer."""
    connections: int = 256
    connections_per_user: int = 128
    """One user's, so that nobody can keep the others out."""
    network_connections: int = 128
    """Of `connections`, those that may come from the network, handshakes included."""
    connections_per_source: int = 32
    """From one address, or one /64 of IPv6."""
    header_s: float = 10.0
    """From connecting, or from a request's first byte, to the end of its headers."""
    body_s: float = 30.0
    """From the end of the headers to the end of the body."""
    keep_alive_s: float = 65.0
    """An idle connection; longer than clients keep theirs, so that they close first."""
    shutdown_s: float = 2.0
    """For the other side to confirm the end of TLS."""
    write_s: float = 30.0
    """For a reader that has stopped to make room for more."""
    grace_s: float = 5.0
    """At a stop: for running answers to end by themselves."""
