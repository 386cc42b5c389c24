"""What systemd and the daemon say to each other: readiness, the watchdog, and passed sockets.

The protocol is a datagram and a few variables, so this needs no library and runs anywhere.
"""

from __future__ import annotations

import asyncio
import os
import socket

LISTEN_FDS_START = 3


def notify(state: str) -> None:
    """Send lines such as ``READY=1`` to the service manager; nothing happens without one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            # The manager is restarting; its own timeouts decide what that means.
            return


def watchdog_interval() -> float | None:
    """Seconds between two signs of life: half of what the manager wants, at least 1 s; None: no watchdog."""
    try:
        wanted = int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
        owner = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return max(1.0, wanted / 2) if wanted > 0 and owner == os.getpid() else None


async def keep_alive(interval_s: float) -> None:
    """Tell the manager again and again that the event loop turns."""
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def passed_sockets(name: str) -> list[socket.socket]:
    """Listening sockets that the manager opened for us under that ``FileDescriptorName=``."""
    try:
        if int(os.environ.get("LISTEN_PID", "0")) != os.getpid():
            return []
        count = int(os.environ.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: list[socket.socket] = []
    for index in range(count):
        if index < len(names) and names[index] == name:
            fd = LISTEN_FDS_START + index
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            found.append(sock)
    return found
