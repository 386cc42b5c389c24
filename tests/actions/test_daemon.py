"""Questions all the way: the socket of the real daemon, the built-in model in its worker, and actions on a real bus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ai_assistant.actions import Asker, SystemBus
from ai_assistant.errors import AIAssistantError, NotAuthorized, NotSupported, ServiceUnavailable, Unsure
from tests.bus import world as worlds
from tests.bus.world import World
from tests.support import gguf_writer

pytestmark = pytest.mark.bus
BUILT_IN = Path(__file__).parents[2] / "models" / "assistant-1.gguf"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    import os

    assert not worlds.missing(), worlds.missing()
    (engine,) = {each for each in os.environ["PYTHONPATH"].split(":") if (Path(each) / "llama_cpp").is_dir()}
    tiny = gguf_writer.write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", context=512)
    with worlds.temporary_directory() as directory:
        made = World(directory)
        made.prepare()
        made.add_builtin("assistant", "1", BUILT_IN)
        made.add_builtin("writer", "2", tiny)
        try:
            made.start_bus()
            made.start_polkit()
            made.start_workers(engine)
            made.start_daemon()
            yield made
        finally:
            made.stop()


@pytest_asyncio.fixture
async def asker(world: World) -> AsyncIterator[Asker]:
    import httpx

    transport = httpx.AsyncHTTPTransport(uds=str(world.api))
    async with httpx.AsyncClient(transport=transport, base_url="http://socket", timeout=60) as client:

        async def complete(body: dict[str, Any]) -> Mapping[str, Any]:
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            choice: Mapping[str, Any] = reply.json()["choices"][0]
            return choice

        async with SystemBus(world.address) as bus:
            yield Asker(complete, bus)


async def ask(asker: Asker, question: str, *, confirm: bool = False) -> str:
    return await asker.perform(await asker.propose(question), confirm=confirm)


async def test_reading(asker: Asker) -> None:
    assert await ask(asker, "which version of the software is installed?") == "AI Assistant OS 0.1.0."
    assert "GiB" in await ask(asker, "how much RAM is free")
    assert "剩余" in await ask(asker, "硬盘还剩多少空间")
    models = await ask(asker, "which models are installed?")
    assert "assistant:1" in models
    assert "writer:2" in models


async def test_a_model_is_loaded_and_unloaded_with_consent(asker: Asker) -> None:
    proposal = await asker.propose("load writer:2")
    assert (proposal.action, proposal.arguments, proposal.changes) == ("load_model", {"model": "writer:2"}, True)
    with pytest.raises(NotAuthorized):
        await asker.perform(proposal)
    assert await asker.perform(proposal, confirm=True) == "writer:2 is loaded."
    assert "writer:2" in await ask(asker, "which model is loaded right now?")
    assert await ask(asker, "unload writer", confirm=True) == "writer:2 is no longer in memory."
    assert "writer:2" not in await ask(asker, "which model is loaded right now?")


async def test_the_self_test_runs(asker: Asker) -> None:
    assert "✓" in await ask(asker, "run a self test")


async def test_what_is_not_there_is_said_so(asker: Asker) -> None:
    with pytest.raises(NotSupported, match="this image has no power profile service"):
        await ask(asker, "switch to power saver mode", confirm=True)
    with pytest.raises(NotSupported, match="这个镜像没有更新服务"):
        await ask(asker, "检查更新")
    with pytest.raises(Unsure):
        await ask(asker, "who won the world cup in 2018?")


async def test_errors_of_the_daemon_keep_their_names(asker: Asker) -> None:
    # The built-in model belongs to the image.
    with pytest.raises(AIAssistantError) as caught:
        await ask(asker, "delete assistant:1", confirm=True)
    assert caught.value.name in ("NotSupported", "InvalidArgument", "NotAuthorized", "Busy")
    assert "assistant:1" in caught.value.message


async def test_no_bus_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable):
        async with SystemBus(f"unix:path={tmp_path}/nothing"):
            pass
