"""The real API server on a real socket, in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.daemon.api.network import Network
from ai_assistant.daemon.api.server import serve
from ai_assistant.daemon.contract import Peer, Scope
from tests.support.fake_service import FakeService


@dataclass
class Served:
    path: Path
    service: FakeService
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event
    thread: threading.Thread
    allowed: set[Scope]

    def end(self) -> None:
        """Stop the daemon, as a restart does; idempotent."""
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # another thread has ended it just now
                self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join(20)
            assert not self.thread.is_alive()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)


@contextmanager
def served(path: Path, network: Network | None = None) -> Iterator[Served]:
    service = FakeService()
    allowed = set(Scope)
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(64)

    def may(peer: Peer, scope: Scope) -> bool:
        return scope in allowed

    def body() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve(service, [listening], stop, may, network=network))
        loop.close()

    thread = threading.Thread(target=body, name="api-server", daemon=True)
    thread.start()
    running = Served(path, service, loop, stop, thread, allowed)
    try:
        yield running
    finally:
        running.end()
