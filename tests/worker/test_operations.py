"""What a worker can be asked beside text: answers as they should be, and answers that are none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.daemon.worker.server import joined
from ai_assistant.engines.contract import (
    Chunk,
    EngineStats,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    TokenLogprob,
    Usage,
)
from ai_assistant.engines.hetero import Wish
from ai_assistant.errors import InternalError, InvalidArgument, NotSupported, WorkerCrashed
from tests.worker.test_protocol import _pair
from tests.worker.test_stuck import _spawn, scripted_worker

_STATS = {
    "running": 1, "waiting": 0, "sequences": 4, "kv_cells": 8, "kv_used": 2, "kv_untouched_bytes": 0,
    "prefix_hits": 0, "prefix_tokens": 0,
    "spilled_bytes": 0, "restored": 0, "draft_tokens": 0, "draft_accepted": 0, "prefill_tokens_per_s": 1.5,
    "decode_tokens_per_s": 2,
}  # fmt: skip


async def test_every_operation() -> None:
    async with scripted_worker() as (client, _):
        assert await client.detokenize([104, 105]) == "hi"
        assert await client.rerank("a", ["a", "b"]) == ([1.0, 0.0], 2)
        assert await client.classify(["2", "x"]) == ([[("label 0", 0.5), ("label 1", 0.5)]] * 2, 2)
        assert await client.trim() == 4096
        # The engine's own rates are no numbers here; the connection survives them.
        assert await client.stats() == EngineStats(running=1)
        with pytest.raises(InternalError, match="no numbers"):
            await client.rerank("a", ["nan"])
        with pytest.raises(InvalidArgument, match="labels"):
            await client.classify(["30000"])
        assert await client.tokenize("a") == [97]


async def test_a_model_that_stays_where_it_is_says_so() -> None:
    async with scripted_worker() as (client, _):
        wish = Wish("ON")
        assert (await client.embed(["a"], wish))[1] == 1
        assert wish.devices == ("cpu",)
        wish = Wish("cpu")
        await client.rerank("a", ["a"], wish)
        assert wish.devices == ("cpu",)
        for work in (client.embed(["a"], Wish("npu")), client.classify(["a"], Wish("npu,gpu"))):
            with pytest.raises(NotSupported, match="cannot move it") as caught:
                await work
            assert caught.value.param == "hetero_compute"
        events = [each async for each in client.generate(GenerateRequest(prompt="x", hetero_compute="efficiency"))]
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.devices == ("cpu",)
        with pytest.raises(NotSupported, match="cannot move it"):
            async for _ in client.generate(GenerateRequest(prompt="x", hetero_compute="npu")):
                pass
        assert (await client.embed(["a"]))[1] == 1


async def _asked(devices: Any) -> tuple[str, ...]:
    async with _pair() as (client, fake):
        wish = Wish("npu")
        task = asyncio.create_task(client.embed(["a"], wish))
        message = await fake.receive()
        assert message["hetero_compute"] == "npu"
        value = {"vectors": [[1.0]], "tokens": 1, "devices": devices}
        await fake.send({"id": message["id"], "event": "result", "value": value})
        await task
        return wish.devices


@pytest.mark.parametrize(
    "devices", ["cpu", {"cpu": 1}, [1], [""], ["a\0b"], ["a\nb"], ["\x1b[2J"], ["x" * 201], ["cpu"] * 18, None]
)
async def test_strange_devices_end_the_worker(devices: Any) -> None:
    with pytest.raises(WorkerCrashed):
        await _asked(devices)


async def test_many_devices_pass() -> None:
    names = [f"backend{number}:device" for number in range(17)]
    assert await _asked(names) == tuple(names)


async def test_files_come_by_name(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("model", "draft", "spill")}
    for name, path in paths.items():
        path.write_text(f"this is {name}")
    ours, theirs = socket.socketpair()
    with theirs:
        process = _spawn(theirs.fileno(), 60)
    client = WorkerClient(ours)
    files = [paths[name].open("rb") for name in ("model", "spill", "draft")]
    try:
        others = {"spill": files[1].fileno(), "draft": files[2].fileno()}
        await client.load(files[0].fileno(), LoadOptions(), files=others)
        assert await client.detokenize([]) == repr({"spill": b"this is spill", "draft": b"this is draft"})
    finally:
        for each in files:
            each.close()
        await client.close()
        await asyncio.to_thread(process.wait, 10)


@pytest.mark.parametrize("files", [{"model": 0}, {f"f{n}": 0 for n in range(32)}])
async def test_files_that_cannot_go_along(files: dict[str, int]) -> None:
    async with _pair(load=False) as (client, _):
        with pytest.raises(InternalError, match="files"):
            await client.load(0, LoadOptions(), files=files)


Ask = Callable[[WorkerClient], Coroutine[Any, Any, Any]]


@pytest.mark.parametrize(
    ("ask", "value"),
    [
        (lambda c: c.stats(), {**_STATS, "decode_tokens_per_s": "NaN"}),
        (lambda c: c.stats(), {**_STATS, "running": -1}),
        (lambda c: c.stats(), {**_STATS, "more": 1}), (lambda c: c.stats(), {}), (lambda c: c.stats(), None),
        (lambda c: c.stats(), {**_STATS, "prefill_tokens_per_s": -1.0}),
        (lambda c: c.stats(), {**_STATS, "kv_used": 1.5}),
        (lambda c: c.trim(), -1), (lambda c: c.trim(), 1.5), (lambda c: c.trim(), "much"),
        (lambda c: c.trim(), 1 << 63),
        (lambda c: c.detokenize([1]), 5), (lambda c: c.detokenize([1]), ["a"]),
        (lambda c: c.rerank("q", ["a", "b"]), {"scores": [1.0], "tokens": 1}),
        (lambda c: c.rerank("q", ["a"]), {"scores": ["1"], "tokens": 1}), (lambda c: c.rerank("q", ["a"]), [1.0]),
        (lambda c: c.classify(["a"]), {"labels": [], "tokens": 1}),
        (lambda c: c.classify(["a"]), {"labels": [[["x"]]], "tokens": 1}),
        (lambda c: c.classify(["a"]), {"labels": [[[1, 1.0]]], "tokens": 1}),
        (lambda c: c.embed(["a", "b"]), {"vectors": [[1.0]], "tokens": 1}),
    ],
)  # fmt: skip
async def test_a_worker_that_lies_is_ended(ask: Ask, value: Any) -> None:
    async with _pair() as (client, fake):
        task = asyncio.ensure_future(ask(client))
        number = (await fake.receive())["id"]
        await fake.send({"id": number, "event": "result", "value": value})
        with pytest.raises(WorkerCrashed):
            await task
        assert client.died.done()


async def test_numbers_that_json_has_not() -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(client.stats())
        number = (await fake.receive())["id"]
        body = f'{{"id":{number},"event":"result","value":{{"running":NaN}}}}'.encode()
        await fake.raw(len(body).to_bytes(4, "big") + body)
        with pytest.raises(WorkerCrashed):
            await task


async def test_statistics_as_they_should_be() -> None:
    async with _pair() as (client, fake):
        task = asyncio.create_task(client.stats())
        await fake.send({"id": (await fake.receive())["id"], "event": "result", "value": _STATS})
        found = await task
        assert (found.kv_cells, found.decode_tokens_per_s) == (8, 2.0)


def test_texts_of_one_write_are_one_chunk() -> None:
    entry = TokenLogprob("c", (99,), -0.5)
    end = Finished(FinishReason.STOP, Usage(1, 4))
    events: list[Event] = [Chunk("a"), Chunk("b"), Chunk("c", (entry,)), Chunk("d"), Chunk("é"), end]
    assert list(joined(events)) == [Chunk("ab"), Chunk("c", (entry,)), Chunk("dé"), end]
    assert list(joined([])) == []
    assert list(joined([Chunk("a")])) == [Chunk("a")]
