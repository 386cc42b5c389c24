"""Workers that were taken over: what they can make the daemon hold, and for how long they can keep it busy."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from typing import Any

import pytest

from ai_assistant.daemon.worker import protocol
from ai_assistant.daemon.worker.frames import MAX_EVENT, MAX_FRAME
from ai_assistant.daemon.worker.server import _event_frame
from ai_assistant.engines.contract import Chunk, GenerateRequest
from ai_assistant.errors import InternalError, WorkerCrashed
from tests.worker.test_protocol import _END, _REQUEST, Fake, _all, _pair


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


async def _ends(fake: Fake, task: asyncio.Task[Any], frame: bytes) -> None:
    """The frame ends the connection, with little memory and in little time."""
    tracemalloc.start()
    begin = time.process_time()
    with_frame = asyncio.create_task(fake.raw(frame))
    with pytest.raises(WorkerCrashed):
        await task
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with_frame.cancel()
    await asyncio.gather(with_frame, return_exceptions=True)
    assert seconds < 3
    assert peak < 128 << 20


_NESTED = b"[" * 500 + b"]" * 500 + b","


@pytest.mark.parametrize(
    "inside",
    [b"[]," * 1_300_000, _NESTED * 4000, b'"",' * 1_300_000, b'{"a":1},' * 500_000],
    ids=["lists", "nested", "strings", "objects"],
)
@pytest.mark.parametrize("op", ["generate", "embed"])
async def test_a_frame_of_many_values_is_not_built(op: str, inside: bytes) -> None:
    async with _pair() as (client, fake):
        call = client.embed(["x"]) if op == "embed" else _all(client)
        task: asyncio.Task[Any] = asyncio.create_task(call)
        await fake.receive()
        body = b'{"id":1,"event":"result","value":[' + inside[:-1] + b"]}"
        await _ends(fake, task, _frame(body))
        assert "frame" in await client.died


async def test_only_results_may_be_large() -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        await fake.receive()
        await fake.raw((MAX_EVENT + 1).to_bytes(4, "big"))
        with pytest.raises(WorkerCrashed):
            await task
    async with _pair() as (client, fake):
        embedding = asyncio.create_task(client.embed(["x"] * 600))
        await fake.receive()
        vectors = [[0.123456789] * 2000] * 600
        body = json.dumps(
            {"id": 1, "event": "result", "value": {"vectors": vectors, "tokens": 600}}, separators=(",", ":")
        )
        assert MAX_EVENT < len(body) < MAX_FRAME
        await fake.raw(_frame(body.encode()))
        assert (await embedding)[0] == vectors


def test_a_worker_does_not_send_what_the_daemon_would_refuse() -> None:
    with pytest.raises(ValueError, match="larger"):
        _event_frame(1, Chunk("x" * MAX_EVENT))


@pytest.mark.parametrize("number", [99, 2, -1, 0, "1", None, 1.0, True])
async def test_answers_to_nothing_end_the_connection(number: Any) -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        await fake.receive()
        await fake.send({"id": number, "event": "chunk", "text": "?"})
        with pytest.raises(WorkerCrashed):
            await task
        assert "protocol" in await client.died


async def test_a_request_ends_once() -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        await fake.receive()
        await fake.send({**_END, "id": 1})
        await task
        await fake.send({**_END, "id": 1})
        assert "has ended" in await client.died


async def _cancelled(client: protocol.WorkerClient, fake: Fake) -> int:
    """A generation that was given up after its first piece; the worker has seen that."""
    events = client.generate(_REQUEST)
    first = asyncio.create_task(anext(events))
    number: int = (await fake.receive())["id"]
    await fake.send({"id": number, "event": "chunk", "text": "a"})
    await first
    await events.aclose()
    assert await fake.receive() == {"op": "cancel", "id": number}
    return number


async def test_what_comes_after_a_cancellation_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_LATE", 10_000)
    async with _pair() as (client, fake):
        # Those that end are forgotten, however many there are.
        for _ in range(30):
            number = await _cancelled(client, fake)
            await fake.send({"id": number, "event": "chunk", "text": "x" * 1000}, {**_END, "id": number})
        assert not client.died.done()
        number = await _cancelled(client, fake)
        await fake.send(*({"id": number, "event": "chunk", "text": "x" * 1000} for _ in range(12)))
        assert "do not end" in await client.died


async def test_an_answer_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_ANSWER", 50_000)
    async with _pair() as (client, fake):
        task = asyncio.create_task(_all(client))
        number = (await fake.receive())["id"]
        await fake.send(*({"id": number, "event": "chunk", "text": "x" * 1000} for _ in range(60)))
        with pytest.raises(InternalError, match="absurdly long"):
            await task
        # The worker is told, and the connection goes on.
        assert await fake.receive() == {"op": "cancel", "id": number}
        more = asyncio.create_task(_with_logprobs(client))
        number = (await fake.receive())["id"]
        await fake.send(*({"id": number, "event": "chunk", "text": "x" * 1000} for _ in range(60)))
        await fake.send({**_END, "id": number})
        assert await more == 60_000


async def _with_logprobs(client: protocol.WorkerClient) -> int:
    request = GenerateRequest(prompt="x", logprobs=2)
    return sum([len(each.text) async for each in client.generate(request) if isinstance(each, Chunk)])


async def test_what_is_not_read_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_assistant.daemon.worker.pending.MAX_UNREAD", 5000)
    async with _pair() as (client, fake):
        events = client.generate(_REQUEST)
        first = asyncio.create_task(anext(events))
        number = (await fake.receive())["id"]
        await fake.send(*({"id": number, "event": "chunk", "text": "x" * 1000} for _ in range(7)))
        assert await fake.receive() == {"op": "cancel", "id": number}
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        assert not client.died.done()
