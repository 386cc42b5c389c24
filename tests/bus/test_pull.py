"""A model over the network through the real daemon and the real downloading process; the hub is on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from dbus_fast import Variant

from tests.bus import world as worlds
from tests.bus.client import Client, Refused, connected
from tests.bus.world import World
from tests.support import hub_server
from tests.support.hub_server import COMMIT, Hub

SOURCE = "hf:o/n:Q8_0"


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with hub_server.serving() as made:
        made.files["o/n"] = {"tiny-Q8_0.gguf": tiny_model.read_bytes(), "tiny-Q4_0.gguf": b"GGUF that is none"}
        yield made


@pytest.fixture(scope="module")
def pulling() -> Iterator[World]:
    """Bus, polkit, the downloading process behind its socket, and the daemon."""
    reason = worlds.missing()
    if reason:
        pytest.fail(reason)
    with worlds.temporary_directory() as directory:
        made = World(directory)
        made.prepare()
        made.configure("[pull]\nattempts = 2\nretry_first_s = 0.1\n")
        try:
            made.start_bus()
            made.start_polkit()
            made.start_fetch(os.environ.get("PYTHONPATH", ""))
            made.start_daemon()
            yield made
        finally:
            made.stop()


@pytest_asyncio.fixture
async def client(pulling: World) -> AsyncIterator[Client]:
    async with connected(pulling.address) as made:
        yield made


async def pull(client: Client, hub: Hub, source: str = SOURCE, name: str = "", **options: str) -> str:
    values = {key: Variant("s", value) for key, value in {"endpoint": hub.url, **options}.items()}
    path: str = await client.call("Manager", "PullModel", "ssa{sv}", source, name, values)
    return path


async def begun(client: Client, job: str) -> dict[str, Any]:
    """The details of a job once bytes have come."""
    deadline = time.monotonic() + 60
    while True:
        details: dict[str, Variant] = await client.get(job, "Job", "Details")
        if "bytes" in details and details["bytes"].value > 0:
            return {key: each.value for key, each in details.items()}
        assert time.monotonic() < deadline, details
        await asyncio.sleep(0.02)


async def test_a_pull_that_is_cut_by_everything(pulling: World, client: Client, hub: Hub, tiny_model: Path) -> None:
    content = tiny_model.read_bytes()  # noqa: ASYNC240
    hub.token, hub.store = "hf_bus_secret", True
    before = pulling.state_files()

    # Two at once are one job, and who cancels leaves what has come.
    hub.faults.append(hub_server.paced(200, 0.1))
    job = await pull(client, hub, token="hf_bus_secret")
    assert await pull(client, hub, token="hf_bus_secret") == job
    details = await begun(client, job)
    assert details["phase"] == "download"
    assert details["total_bytes"] == len(content)
    await client.call("Job", "Cancel", path=job)
    assert (await client.job(job))["State"] == "cancelled"
    assert [each for each in pulling.state_files() if each.endswith("part-0")] != []

    # The daemon ends in the middle of the next one.
    hub.faults.append(hub_server.paced(200, 0.1))
    job = await pull(client, hub, token="hf_bus_secret")
    await begun(client, job)
    assert await asyncio.to_thread(pulling.stop_daemon) == 0
    await asyncio.to_thread(pulling.start_daemon)

    # The third goes on and ends well, with a connection that drops on the way.
    hub.faults.append(hub_server.drop_after(1000))
    job = await pull(client, hub, token="hf_bus_secret")
    values = await client.job(job)
    assert (values["State"], values["Error"]) == ("done", ["", ""])
    assert values["Result"]["name"].value == "tiny-q8_0:1"
    assert values["Details"]["resumed_bytes"].value > 0
    asked = [each for each in hub.bodies() if each.host == "store"]
    assert [("Range" in each.headers) for each in asked] == [False, True, True, True]
    assert all("Authorization" not in each.headers for each in asked)
    assert all(COMMIT in each.path for each in asked)

    path = Path(f"/proc/{pulling.daemon.pid}/root{pulling.state}/models/tiny-q8_0/1/model.gguf")  # type: ignore[union-attr]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256(content).hexdigest()  # noqa: ASYNC240
    assert [each for each in pulling.state_files() if "part-" in each] == []
    await client.call("Model", "Remove", path=values["Result"]["model"].value)
    assert [each for each in pulling.state_files() if each != ".pulls"] == before
    assert "hf_bus_secret" not in pulling.log


@pytest.mark.parametrize(
    ("source", "error", "hint"),
    [
        ("hf:o/none", "NoSuchModel", "check its name"),
        ("hf:o/n:Q5_0", "NoSuchModel", "tiny-Q8_0.gguf (Q8_0)"),
        ("hf:o/n:Q4_0", "InvalidModel", ""),
    ],
)
async def test_errors_of_the_job_have_hints(client: Client, hub: Hub, source: str, error: str, hint: str) -> None:
    values = await client.job(await pull(client, hub, source))
    assert values["State"] == "failed"
    assert values["Error"][0] == f"org.ai_assistant1.Error.{error}"
    assert hint in values["Error"][1]


async def test_a_server_that_stays_away(client: Client, hub: Hub) -> None:
    hub.listing_faults.extend([hub_server.status(503)] * 9)
    values = await client.job(await pull(client, hub))
    assert values["Error"][0] == "org.ai_assistant1.Error.DownloadFailed"
    hub.listing_faults.clear()
    assert (await client.job(await pull(client, hub, name="later:2")))["State"] == "done"


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("", "", {}),
        ("x" * 60_000, "", {}),
        ("hf:o/n", "Bad Name", {}),
        ("file:///etc/passwd", "", {}),
        ("hf:o/n", "", {"tokens": Variant("s", "x")}),
        ("hf:o/n", "", {"token": Variant("i", 3)}),
        ("hf:o/n", "", {"token": Variant("as", ["x"])}),
        ("hf:o/n", "", {"token": Variant("s", "a\nb")}),
        ("http://192.0.2.1/x.gguf", "", {}),
    ],
)
async def test_bad_input(client: Client, source: str, name: str, options: dict[str, Variant]) -> None:
    with pytest.raises(Refused) as caught:
        await client.call("Manager", "PullModel", "ssa{sv}", source, name, options)
    assert caught.value.name == "org.ai_assistant1.Error.InvalidArgument"


@pytest.mark.parametrize(("user", "may"), [("admin", True), ("member", False), ("outsider", False)])
def test_who_may(pulling: World, hub: Hub, user: str, may: bool) -> None:
    said = pulling.call("PullModel", "ssa{sv}", "hf:o/none", "", "1", "endpoint", "s", hub.url, user=user)
    assert said.startswith('o "/org/ai_assistant1/jobs/') is may
    assert ("not allowed: import" in said) is not may
