"""The daemon's service with real worker processes, without a bus and without systemd.

A worker is started for each connection, as its socket unit does. For tests and benches of what lies between
the socket and the engine.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.contract import Counters
from ai_assistant.daemon.jobs import JobTable
from ai_assistant.daemon.pins import Pins
from ai_assistant.daemon.registry import Registry
from ai_assistant.daemon.residency import Meters, Residency, Worker, load_options
from ai_assistant.daemon.service import DaemonService
from ai_assistant.daemon.status import Machine
from ai_assistant.daemon.worker.protocol import WorkerClient


@asynccontextmanager
async def local_service(folder: Path) -> AsyncIterator[DaemonService]:
    """A running service whose configuration, models and state are in `folder`; it begins without models."""
    started: list[subprocess.Popen[bytes]] = []

    async def connect() -> Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        with theirs:
            started.append(_start(theirs.fileno()))
        return WorkerClient(ours)

    config = configuration.load(folder)
    counters = Counters()
    machine = Machine(Path("/"), folder)
    pins = Pins(folder / "pins.json")
    registry = Registry(folder / "builtin", folder / "models", load_options(config))
    residency = Residency(config, connect, Meters(machine.memory_available), counters, pinned=pins.__contains__)
    service = DaemonService(config, registry, residency, JobTable(per_owner=8), machine, counters, pins)
    service.set_state("running")
    try:
        yield service
    finally:
        await residency.close()
        for each in started:
            await asyncio.to_thread(each.wait, 10)


def _start(fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ai_assistant.daemon.worker", "--fd", str(fd)]
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL)
