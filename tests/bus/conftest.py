"""One daemon for each test file, and its log when a test fails."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.bus import world as worlds
from tests.bus.client import Client, connected
from tests.bus.world import World
from tests.support import gguf_writer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.bus)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    names = getattr(item, "funcargs", {})
    used = names.get("world") or names.get("serving")
    if report.failed and isinstance(used, World):
        report.sections.append(("logs of the world", used.log))
    return report


@pytest.fixture(scope="session")
def engine() -> str:
    """Folder of the compiled engine; without one nothing here can be tested, and that is a failure."""
    for each in os.environ.get("PYTHONPATH", "").split(":"):
        if each and (Path(each) / "llama_cpp").is_dir():
            return each
    pytest.fail("no compiled engine on PYTHONPATH")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real GGUF of random weights, small enough to load in a moment."""
    return gguf_writer.write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", context=4096)


@pytest.fixture(scope="module")
def serving(engine: str, tiny_model: Path) -> Iterator[World]:
    """Bus, polkit, workers, and a daemon whose built-in model is a tiny real one."""
    reason = worlds.missing()
    if reason:
        pytest.fail(reason)
    with worlds.temporary_directory() as directory:
        made = World(directory)
        made.prepare()
        made.add_builtin("assistant", "1", tiny_model)
        try:
            made.start_bus()
            made.start_polkit()
            made.start_workers(engine)
            made.start_daemon()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Bus, polkit and daemon, without workers."""
    reason = worlds.missing()
    if reason:
        pytest.fail(reason)
    with worlds.temporary_directory() as directory:
        made = World(directory, large_messages=True)
        made.prepare()
        try:
            made.start_bus()
            made.start_polkit()
            made.start_daemon()
            yield made
        finally:
            made.stop()


@pytest_asyncio.fixture
async def client(world: World) -> AsyncIterator[Client]:
    async with connected(world.address) as made:
        yield made


@pytest_asyncio.fixture
async def http(serving: World) -> AsyncIterator[httpx.AsyncClient]:
    """The socket API of `serving`."""
    transport = httpx.AsyncHTTPTransport(uds=str(serving.api))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost/v1/", timeout=240) as made:
        yield made
