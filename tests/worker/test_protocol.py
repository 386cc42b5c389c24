"""The daemon's side of the connection against workers that lie, flood, stall and die. No engine is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.worker import pending as pending_requests
from ai_assistant.daemon.worker import protocol
from ai_assistant.daemon.worker.frames import MAX_FRAME, FrameReader, ProtocolError, encode
from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.engines.contract import (
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    Placement,
    TokenLogprob,
    ToolCall,
    Usage,
    event_to_dict,
)
from ai_assistant.errors import Busy, ContextOverflow, InternalError, InvalidModel, WorkerCrashed

_INFO = {
    "format": "gguf", "architecture": "llama", "parameters": 1, "size_bytes": 2, "quantization": "F32",
    "context_length": 3, "has_chat_template": True, "can_embed": False, "name": "n", "can_generate": True,
    "can_rerank": False, "can_classify": False,
}  # fmt: skip
_REQUEST = GenerateRequest(prompt="x")
_END = {"event": "finished", "reason": "stop", "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0,
        "queue_s": 0.0, "prefill_s": 0.1, "decode_s": 0.2, "energy_j": None}, "tool_calls": []}  # fmt: skip


class Fake:
    """The far end, under the test's control."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = FrameReader()
        self._waiting: list[dict[str, Any]] = []
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> dict[str, Any]:
        while not self._waiting:
            data = await self._loop.sock_recv(self._sock, 1 << 16)
            if not data:
                raise EOFError
            self._waiting += self._reader.feed(data)
        return self._waiting.pop(0)

    async def send(self, *messages: dict[str, Any]) -> None:
        await self.raw(b"".join(map(encode, messages)))

    async def raw(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def loaded(self) -> None:
        message = await self.receive()
        assert message["op"] == "load"
        await self.send({"id": 0, "event": "loaded", "info": _INFO})

    def close(self) -> None:
        self._sock.close()


@contextlib.asynccontextmanager
async def _pair(*, load: bool = True) -> AsyncIterator[tuple[WorkerClient, Fake]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    client, fake = WorkerClient(ours), Fake(theirs)
    try:
        if load:
            await asyncio.gather(client.load(0, LoadOptions()), fake.loaded())
        yield client, fake
    finally:
        await client.close()
        fake.close()


async def _all(client: WorkerClient) -> list[Event]:
    return [event async for event in client.generate(_REQUEST)]


async def test_a_generation_from_end_to_end() -> None:
    logprob = TokenLogprob("a", (97,), -0.5, (TokenLogprob("b", (98,), -1.0),))
    end = Finished(FinishReason.TOOL_CALLS, Usage(1, 2, 0, 0.1, 0.2, 0.3, 4.5), (ToolCall("f", "{}"),))
    sent: list[Event] = [Chunk("温"), Chunk("", (logprob,)), end]
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        request = await fake.receive()
        assert request == {"op": "generate", "id": 1, "request": {"prompt": "x"}}
        await fake.send(*({"id": 1, **event_to_dict(each)} for each in sent))
        assert await task == sent


async def test_progress_and_the_model_arrive() -> None:
    async with _pair(load=False) as (client, fake):
        steps: list[float] = []
        task = asyncio.create_task(client.load(0, LoadOptions(sequences=2), steps.append))
        message = await fake.receive()
        assert message["options"]["sequences"] == 2
        await fake.send(*({"id": 0, "event": "progress", "value": each} for each in (0, 0.5, 7)))
        await fake.send({"id": 0, "event": "loaded", "info": _INFO})
        assert (await task).architecture == "llama"
        assert steps == [0.0, 0.5, 1.0]
        with pytest.raises(InternalError):
            await client.load(0, LoadOptions())


async def test_where_the_layers_are_arrives() -> None:
    async with _pair(load=False) as (client, fake):
        assert client.placement == Placement()
        seen: list[Placement] = []
        task = asyncio.create_task(client.load(0, LoadOptions(), lambda _: seen.append(client.placement)))
        await fake.receive()
        first = Placement((("cpu", 3), ("ggml:V", 2)), {"cpu": 5, "ggml:V": 7}, 5)
        await fake.send({"id": 0, "event": "placing", "placement": asdict(first)})
        await fake.send({"id": 0, "event": "progress", "value": 0})
        last = Placement(warning="ggml:V not used")
        await fake.send({"id": 0, "event": "loaded", "info": _INFO, "placement": asdict(last)})
        await task
        assert (seen, client.placement) == ([first], last)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": 5}, {"parts": [["a"]]}, {"parts": [["a", -1]]}, {"parts": [[5, 1]]}, {"parts": [["a", 1]] * 18},
        {"parts": ["ab"]}, {"memory_bytes": []}, {"memory_bytes": {"a": -1}}, {"memory_bytes": {"a": "x"}},
        {"memory_bytes": {str(each): 1 for each in range(18)}}, {"host_bytes": -1}, {"host_bytes": 1.5},
        {"host_bytes": True}, {"warning": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
async def test_a_worker_that_lies_about_devices(change: dict[str, Any]) -> None:
    async with _pair(load=False) as (client, fake):
        task = asyncio.create_task(client.load(0, LoadOptions()))
        await fake.receive()
        await fake.send({"id": 0, "event": "placing", "placement": {**asdict(Placement()), **change}})
        with pytest.raises(WorkerCrashed):
            await asyncio.wait_for(task, 5)
        assert client.placement == Placement()


async def test_errors_come_back_by_name() -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        number = (await fake.receive())["id"]
        error = ContextOverflow("too long", hint="shorten", param="prompt")
        await fake.send({"id": number, "event": "error", **error.to_dict()})
        with pytest.raises(ContextOverflow) as caught:
            await task
        assert (caught.value.message, caught.value.hint, caught.value.param) == ("too long", "shorten", "prompt")


async def test_a_refused_model() -> None:
    async with _pair(load=False) as (client, fake):
        task = asyncio.create_task(client.load(0, LoadOptions()))
        await fake.receive()
        await fake.send({"id": 0, "event": "error", **InvalidModel("no").to_dict()})
        with pytest.raises(InvalidModel, match="no"):
            await task


async def test_closing_the_generator_cancels() -> None:
    async with _pair() as (client, fake):
        events = client.generate(_REQUEST)
        first = asyncio.create_task(anext(events))
        number = (await fake.receive())["id"]
        await fake.send({"id": number, "event": "chunk", "text": "a"})
        assert await first == Chunk("a")
        await events.aclose()
        assert await fake.receive() == {"op": "cancel", "id": number}
        # What was under way is ignored, and the connection goes on.
        await fake.send({"id": number, "event": "chunk", "text": "late"})
        ping = asyncio.create_task(client.ping())
        await fake.send({"id": (await fake.receive())["id"], "event": "result", "value": 7})
        assert await ping == 7


async def test_the_end_of_a_worker_ends_every_request() -> None:
    async with _pair() as (client, fake):
        calls: list[Coroutine[Any, Any, Any]] = [_all(client), _all(client), client.tokenize("x"), client.ping()]
        tasks = [asyncio.create_task(each) for each in calls]
        for _ in tasks:
            await fake.receive()
        fake.close()
        for each in tasks:
            with pytest.raises(WorkerCrashed):
                await each
        assert "gone" in await client.died
        with pytest.raises(WorkerCrashed):
            await client.ping()


async def test_a_worker_that_dies_while_it_loads() -> None:
    async with _pair(load=False) as (client, fake):
        task = asyncio.create_task(client.load(0, LoadOptions()))
        await fake.receive()
        fake.close()
        with pytest.raises(WorkerCrashed):
            await task


async def test_no_worker_at_all(tmp_path: Path) -> None:
    with pytest.raises(WorkerCrashed, match="no worker"):
        await WorkerClient.connect(str(tmp_path / "none"))


def _broken() -> list[bytes]:
    good = {"id": 1, "event": "chunk", "text": "a"}
    messages: list[Any] = [
        {**good, "text": 5}, {**good, "text": None}, {**good, "logprobs": 5}, {**good, "logprobs": [5]},
        {**good, "logprobs": [{"token": "a", "bytes": [300], "logprob": 0}]},
        {**good, "logprobs": [{"token": "a", "bytes": [1], "logprob": "x"}]},
        {**good, "logprobs": [{"token": "a", "bytes": [1], "logprob": 0, "top": [[]] * 30}]},
        {**good, "event": "progress", "value": 1}, {**good, "event": "loaded", "info": _INFO}, {**good, "event": 5},
        {**good, "event": "result", "value": None}, {"id": 1}, {**_END, "id": 1, "reason": "x"},
        {**_END, "id": 1, "usage": {}}, {**_END, "id": 1, "tool_calls": [{"name": 1}]}, {"id": 1, "event": "error"},
        {"id": 1, "event": "error", "name": "X", "message": [1]}, [], 5, "text", None,
    ]  # fmt: skip
    bodies = [json.dumps(each).encode() for each in messages]
    bodies += [b"{", b'{"id":1,"event":"chunk","text":"\xff"}', b'{"a":NaN}', b"[" * 100_000, b'{"a":' * 50_000]
    frames = [len(body).to_bytes(4, "big") + body for body in bodies]
    return [*frames, bytes(4), (MAX_FRAME + 1).to_bytes(4, "big"), b"\xff\xff\xff\xff"]


@pytest.mark.parametrize("data", _broken(), ids=lambda data: repr(data[:40]))
async def test_nonsense_ends_the_connection_and_nothing_else(data: bytes) -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        await fake.receive()
        await fake.raw(data)
        with pytest.raises(WorkerCrashed):
            await task
        assert "protocol" in await client.died


async def test_random_bytes_never_raise_anything_else() -> None:
    rng = random.Random(9)
    template = encode({"id": 1, "event": "chunk", "text": "hello", "logprobs": []})
    for _ in range(300):
        reader = FrameReader()
        data = bytearray(template * 3)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            for message in reader.feed(bytes(data)):
                assert isinstance(message, dict)
        except ProtocolError:
            pass


def test_frames_cut_anywhere() -> None:
    messages = [{"id": n, "text": "语" * n} for n in range(30)]
    data = b"".join(map(encode, messages))
    rng = random.Random(1)
    reader, found = FrameReader(), []
    while data:
        size = rng.randint(1, 50)
        found += list(reader.feed(data[:size]))
        data = data[size:]
    assert found == messages
    assert list(FrameReader().feed(encode({"text": "\ud800"}))) == [{"text": "\ud800"}]
    with pytest.raises(ValueError, match="larger"):
        encode({"text": "x" * MAX_FRAME})


async def test_a_flood_is_joined_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_requests, "MAX_UNREAD", 200_000)
    async with _pair() as (client, fake):
        events = client.generate(_REQUEST)
        first = asyncio.create_task(anext(events))
        number = (await fake.receive())["id"]
        await fake.send(*({"id": number, "event": "chunk", "text": "ab"} for _ in range(1000)))
        await first
        await asyncio.sleep(0.05)
        pending = client._pending[number]
        assert len(pending._items) < 200
        got = [await anext(events) for _ in range(len(pending._items))]
        assert "".join(each.text for each in got if isinstance(each, Chunk)) == "ab" * 999
        flood = ({"id": number, "event": "chunk", "text": "x" * 1000} for _ in range(2000))
        sender = asyncio.create_task(fake.send(*flood))
        await asyncio.sleep(0.3)
        with pytest.raises(Busy):
            await _drain(events)
        await sender


async def _drain(events: AsyncGenerator[Event]) -> None:
    async for _ in events:
        pass


async def test_a_stalled_worker_does_not_collect_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_UNSENT", 4 << 20)
    async with _pair() as (client, _fake):
        tasks = [asyncio.create_task(client.tokenize("x" * 1_000_000)) for _ in range(20)]
        done, _ = await asyncio.wait(tasks, timeout=1)
        assert any(isinstance(each.exception(), Busy) for each in done)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_strange_results() -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(client.embed(["x"]))
        number = (await fake.receive())["id"]
        await fake.send({"id": number, "event": "result", "value": {"vectors": [[0.5, 1]], "tokens": 3}})
        assert await task == ([[0.5, 1.0]], 3)
        other = asyncio.create_task(client.tokenize("x"))
        number = (await fake.receive())["id"]
        await fake.send({"id": number, "event": "result", "value": [1, "2"]})
        with pytest.raises(WorkerCrashed):
            await other


def test_the_client_brings_no_heavy_module_into_the_daemon() -> None:
    import subprocess

    program = (
        "import sys, ai_assistant.daemon.worker.protocol\n"
        "print([m for m in ('numpy', 'jinja2', 'llama_cpp', 'httpx', 'typer', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
