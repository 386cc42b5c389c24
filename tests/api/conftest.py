"""The real server on a real unix socket, with a scripted service behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from ai_assistant.daemon.api.auth import Allowed
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.api.network import Network
from ai_assistant.daemon.api.server import serve
from tests.support.fake_service import FakeService


@dataclass
class Api:
    path: Path
    service: FakeService
    stop: asyncio.Event
    task: asyncio.Task[None]
    client: httpx.AsyncClient
    before: set[asyncio.Task[Any]] = field(default_factory=set)

    async def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def chat(self, text: str, **more: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", chat_body(text, **more))

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(str(self.path))

    async def send(self, *pieces: bytes, pause_s: float = 0.0) -> bytes:
        """Everything the server says to these bytes until it closes, which may be before it has read them."""
        return (await self.push(*pieces, pause_s=pause_s))[0]

    async def push(self, *pieces: bytes, pause_s: float = 0.0) -> tuple[bytes, int]:
        """As `send`, and how many of the pieces could be sent.

        With a plain socket in a thread: asyncio's streams forget what has arrived when writing fails.
        """

        def talk() -> tuple[bytes, int]:
            sent, out = 0, b""
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(str(self.path))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for piece in pieces:
                        sock.sendall(piece)
                        sent += 1
                        time.sleep(pause_s)
                with contextlib.suppress(ConnectionResetError):
                    while piece := sock.recv(65536):
                        out += piece
            return out, sent

        return await asyncio.to_thread(talk)

    async def still_answers(self) -> None:
        response = await self.chat("are you there")
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == "are you there "

    def tasks(self) -> list[str]:
        """Tasks beyond those of a server that is asked nothing."""
        return [each.get_name() for each in asyncio.all_tasks() - self.before if each is not asyncio.current_task()]

    async def settled(self) -> None:
        """No task of a request is left, and no generation is open."""
        service = self.service
        await until(lambda: not self.tasks() and service.begun == service.finished + service.closed_early)


async def until(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    """Wait for something that nothing announces."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def chat_body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": text}], **more}


def request_bytes(body: Mapping[str, Any] | bytes, path: str = "/v1/chat/completions", *, close: bool = False) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    end = "Connection: close\r\n" if close else ""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{end}Content-Length: {len(data)}\r\n\r\n".encode() + data


Start = Callable[..., Awaitable[Api]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start a server: `await start(limits=…, allowed=…, network=…)`; all are stopped at the end."""
    async with AsyncExitStack() as stack:

        async def begin(
            limits: Limits | None = None,
            allowed: Allowed = lambda _peer, _scope: True,
            folder: Path = tmp_path,
            network: Network | None = None,
        ) -> Api:
            path = folder / "api.sock"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(path))
            listener.listen(1024)
            path.chmod(0o666)
            stop = asyncio.Event()
            service = FakeService()
            task = asyncio.create_task(serve(service, [listener], stop, allowed, limits=limits, network=network))
            client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://localhost", timeout=10
            )
            api = Api(path, service, stop, task, client)
            api.before = asyncio.all_tasks()

            async def end() -> None:
                await client.aclose()
                stop.set()
                async with asyncio.timeout(5):
                    await task

            stack.push_async_callback(end)
            return api

        yield begin


@pytest.fixture
async def api(start: Start) -> Api:
    return await start()
