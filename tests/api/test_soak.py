"""Nothing grows: after thousands of requests of every kind the process holds what it held before."""

from __future__ import annotations

import asyncio
import gc

from ai_assistant.errors import WorkerCrashed
from tests.api.conftest import Api, chat_body, descriptors, request_bytes, until


async def _vanish(api: Api) -> None:
    _, writer = await api.raw()
    writer.write(request_bytes(chat_body("!forever", stream=True)))
    await writer.drain()
    await asyncio.sleep(0.002)
    writer.close()


async def _round(api: Api, index: int) -> None:
    """One request of each kind."""
    await api.chat(f"hello {index}")
    async with api.client.stream("POST", "/v1/chat/completions", json=chat_body(f"a b {index}", stream=True)) as answer:
        await answer.aread()
    for body in (chat_body("!raise X"), chat_body("!break X", stream=True), chat_body("x", odd=index), {"model": 3}):
        await api.post("/v1/chat/completions", body)
    await api.post("/v1/completions", {"model": f"nobody-{index}", "prompt": "x"})
    await api.client.get(f"/nowhere/{index}")
    await api.client.get("/metrics")
    await _vanish(api)


async def test_memory_descriptors_and_tasks_stay_where_they_were(api: Api) -> None:
    api.service.errors["X"] = WorkerCrashed("died")

    async def many(count: int) -> tuple[int, int]:
        for index in range(count):
            await _round(api, index)
        await api.settled()
        api.service.requests.clear()
        await until(lambda: gc.collect() == 0)
        return len(gc.get_objects()), descriptors()

    await many(30)
    objects, fds = await many(30)
    objects_after, fds_after = await many(120)
    # 1,200 requests more: not one object for every ten of them.
    assert objects_after - objects < 120
    assert fds_after <= fds
