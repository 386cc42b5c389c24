"""Real workers that are killed at random under many kinds of requests: each gets an answer or a named error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.contract import ModelState
from ai_assistant.daemon.service import DaemonService
from ai_assistant.engines.contract import Finished, GenerateRequest
from ai_assistant.errors import AIAssistantError, Busy, NotSupported, WorkerCrashed
from tests.support import gguf_writer
from tests.support.local_service import local_service

pytestmark = pytest.mark.engine

_REQUESTS = 200
_AT_ONCE = 8
_KILLS = 8


def _workers() -> list[int]:
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


async def _ask(service: DaemonService, name: str, dice: random.Random) -> Any:
    async def generate() -> Finished:
        request = GenerateRequest(prompt="word " * dice.randint(1, 60), max_tokens=dice.randint(1, 30), ignore_eos=True)
        events = [event async for event in service.generate(name, request, dice.choice((None, 0.0, 5.0)))]
        assert isinstance(events[-1], Finished)
        return events[-1]

    async def abandon() -> None:
        events = service.generate(name, GenerateRequest(prompt="word", max_tokens=400, ignore_eos=True))
        await anext(events)
        await events.aclose()

    async def count() -> int:
        return len(await service.tokenize(name, "some words"))

    async def text() -> str:
        return await service.detokenize(name, [40, 41])

    kinds: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        generate, generate, abandon, lambda: service.embed(name, ["a", "b c"]), count, text, service.stats,
        lambda: service.rerank(name, "q", ["d"]),
    ]  # fmt: skip
    return await dice.choice(kinds)()


async def test_every_request_ends_when_workers_are_killed(tmp_path: Path) -> None:
    folder = tmp_path / "etc/ai-assistant/config.d"
    folder.mkdir(parents=True)
    (folder / "quick.toml").write_text(
        "[worker]\nrestart_first_s = 0.05\nrestart_longest_s = 0.2\nrestart_attempts = 1000\n[models]\nthreads = 1\n"
    )
    dice = random.Random(7)
    async with local_service(tmp_path) as service:
        fd = os.open(gguf_writer.write_llama(tmp_path / "m.gguf"), os.O_RDONLY)
        name = (await service.open_model(fd, "victim", 0, ":1.1")).name
        outcomes: list[str] = []
        killed = asked = 0

        async def client() -> None:
            nonlocal asked
            # A fast machine has answered them all before the first kill.
            while asked < _REQUESTS or killed < _KILLS:
                asked += 1
                try:
                    await _ask(service, name, dice)
                    outcomes.append("answer")
                except (WorkerCrashed, Busy, NotSupported) as error:
                    outcomes.append(error.name)

        async def killer() -> None:
            nonlocal killed
            # Loaded first, mostly: on a slow machine a worker that is killed on a clock would never get that far.
            while killed < _KILLS:
                while service.model(name).state is not ModelState.LOADED and dice.random() > 0.02:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                await asyncio.sleep(dice.uniform(0.0, 0.5))
                for pid in _workers():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                await asyncio.sleep(0.1)

        killing = asyncio.create_task(killer())
        try:
            # No measure of speed: a request that hangs ends the test and not the machine's day.
            async with asyncio.timeout(900):
                await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
        finally:
            killing.cancel()
        assert len(outcomes) == asked
        assert outcomes.count("answer")
        assert outcomes.count("WorkerCrashed")
        # And afterwards it serves as if nothing had been.
        for _ in range(20):
            try:
                assert await service.tokenize(name, "some words")
                break
            except AIAssistantError:
                await asyncio.sleep(0.5)
        request = GenerateRequest(prompt="word", max_tokens=3, ignore_eos=True)
        events = [event async for event in service.generate(name, request)]
        assert isinstance(events[-1], Finished)
        assert service.counters.running == 0
