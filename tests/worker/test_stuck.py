"""Workers that stand still: whoever waits for them gets an error in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.engines.contract import Event, Finished, GenerateRequest, LoadOptions
from ai_assistant.errors import InternalError, InvalidArgument, WorkerCrashed


@contextlib.asynccontextmanager
async def scripted_worker(
    *, every_s: float = 15.0, timeout_s: float = 15.0, rounds: int = 20, stall_s: float = 60.0
) -> AsyncIterator[tuple[WorkerClient, subprocess.Popen[bytes]]]:
    """A loaded worker that runs `tests.worker.scripted`, and its process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = _spawn(theirs.fileno(), stall_s)
    client = WorkerClient(ours, ping_every_s=every_s, ping_timeout_s=timeout_s, stalled_rounds=rounds)
    try:
        # Any descriptor will do.
        await client.load(ours.fileno(), LoadOptions(sequences=2))
        yield client, process
    finally:
        await client.close()
        process.kill()
        await asyncio.to_thread(process.wait)


def _spawn(fd: int, stall_s: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.worker.scripted", str(fd), str(stall_s)],
        pass_fds=[fd],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )


async def all_events(client: WorkerClient, prompt: str) -> list[Event]:
    return [each async for each in client.generate(GenerateRequest(prompt=prompt))]


async def test_a_stopped_worker_is_given_up() -> None:
    async with scripted_worker(every_s=0.1, timeout_s=0.3) as (client, process):
        process.send_signal(signal.SIGSTOP)
        calls: list[Coroutine[Any, Any, Any]] = [
            all_events(client, "do nothing"), client.embed(["x"]), client.tokenize("x"), client.ping(),
        ]  # fmt: skip
        async with asyncio.timeout(10):
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert "does not answer" in await client.died
        assert all(isinstance(each, WorkerCrashed) and "does not answer" in each.message for each in found)
        with pytest.raises(WorkerCrashed):
            await client.tokenize("x")


async def test_a_worker_that_answers_but_does_nothing_is_given_up() -> None:
    async with scripted_worker(every_s=0.05, rounds=4) as (client, process):
        async with asyncio.timeout(10):
            with pytest.raises(WorkerCrashed, match="no progress"):
                await all_events(client, "do nothing")
        # Its reader still runs, and sees the end of the connection.
        assert await asyncio.to_thread(process.wait, 10) == 0


async def test_slow_work_is_not_given_up() -> None:
    async with scripted_worker(every_s=0.05, rounds=6) as (client, _process):
        events = await all_events(client, "work 30")
        assert isinstance(events[-1], Finished)
        assert not client.died.done()


async def test_nothing_is_asked_while_nothing_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted_worker(every_s=0.05) as (client, _process):
        await client.tokenize("x")
        await asyncio.sleep(0.2)
        asked: list[str] = []
        monkeypatch.setattr(client, "_request", lambda op, _values: asked.append(op))
        await asyncio.sleep(0.3)
        assert not asked
        assert not [each for each in asyncio.all_tasks() if each.get_name() == "worker-guard"]


async def test_a_worker_whose_interpreter_is_held_ends_itself() -> None:
    async with scripted_worker(stall_s=1.0) as (client, process):
        begin = time.monotonic()
        async with asyncio.timeout(20):
            with pytest.raises(WorkerCrashed):
                await all_events(client, "hold the lock")
        assert await asyncio.to_thread(process.wait, 10) == 1
        assert 0.5 < time.monotonic() - begin < 15


async def test_an_idle_or_busy_worker_does_not_end_itself() -> None:
    async with scripted_worker(stall_s=0.6) as (client, process):
        await all_events(client, "work 30")
        await asyncio.sleep(1.5)
        assert process.poll() is None
        assert isinstance((await all_events(client, "work 1"))[-1], Finished)


async def test_a_driver_that_ends_the_worker_is_known_by_name() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = _spawn(theirs.fileno(), 60.0)
    client = WorkerClient(ours)
    try:
        with pytest.raises(WorkerCrashed):
            await client.load(ours.fileno(), LoadOptions(extra={"dies_with": "ggml:Vulkan0"}))
        assert client.placement.devices == ("ggml:Vulkan0",)
    finally:
        await client.close()
        process.kill()
        await asyncio.to_thread(process.wait)


async def test_a_broken_engine_ends_the_worker() -> None:
    async with scripted_worker() as (client, process):
        with pytest.raises(InternalError, match="the engine failed"):
            await all_events(client, "break")
        async with asyncio.timeout(10):
            await client.died
        assert await asyncio.to_thread(process.wait, 10) == 3


async def test_a_failed_request_alone_does_not_end_the_worker() -> None:
    async with scripted_worker() as (client, _process):
        with pytest.raises(InvalidArgument):
            await client.embed([])
        assert await client.tokenize("x") == [120]


async def test_an_embedding_that_nobody_waits_for_ends() -> None:
    async with scripted_worker() as (client, _process):
        tasks = [asyncio.create_task(client.embed(["slow"])) for _ in range(2)]
        await asyncio.sleep(0.1)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Both threads for embeddings were taken.
        async with asyncio.timeout(5):
            assert await client.embed(["x"]) == ([[1.0]], 1)


async def test_embeddings_do_not_keep_generations_waiting() -> None:
    async with scripted_worker() as (client, _process):
        tasks = [asyncio.create_task(client.embed(["slow"])) for _ in range(40)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert isinstance((await all_events(client, "work 1"))[-1], Finished)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
