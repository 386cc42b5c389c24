"""The service with scripted workers: who may see what, what counts, and what ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.bus.connection import ROOT, Call, Connection
from ai_assistant.daemon.contract import Counters, caller
from ai_assistant.daemon.jobs import JobTable
from ai_assistant.daemon.publish import Publisher
from ai_assistant.daemon.registry import Registry
from ai_assistant.daemon.residency import Residency, load_options
from ai_assistant.daemon.service import DaemonService
from ai_assistant.daemon.status import Machine
from ai_assistant.engines.contract import GenerateRequest
from ai_assistant.errors import NoSuchModel
from tests.daemon.test_registry import put
from tests.daemon.test_residency import Lab

MINE, OTHER = 1000, 1001


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def service(tmp_path: Path, tiny_model: Path, lab: Lab) -> Iterator[DaemonService]:
    put(tmp_path / "image", "assistant", "1", tiny_model)
    config = configuration.load(tmp_path)
    registry = Registry(tmp_path / "image", tmp_path / "state", load_options(config))
    registry.scan()
    counters = Counters()
    residency = Residency(config, lab.connect, lambda: 1 << 40, counters)
    jobs = JobTable(per_owner=config.limits_jobs_per_caller)
    made = DaemonService(config, registry, residency, jobs, Machine(Path("/"), tmp_path), counters)
    made.set_state("running")
    yield made
    caller.set(None)


async def test_a_transient_model_is_its_users(service: DaemonService, tiny_model: Path) -> None:
    entry = await service.open_model(os.open(tiny_model, os.O_RDONLY), "assistant", 0, ":1.5", MINE)
    names = {}
    for uid in (MINE, OTHER, 0, None):
        caller.set(uid)
        names[uid] = [each.name for each in service.models()]
        assert service.model("assistant").name == "assistant:1"
    both = ["assistant:1", entry.name]
    assert names == {MINE: both, OTHER: ["assistant:1"], 0: both, None: both}
    caller.set(OTHER)
    with pytest.raises(NoSuchModel):
        service.model(entry.name)
    with pytest.raises(NoSuchModel):
        await anext(service.generate(entry.name, GenerateRequest(prompt="x")))
    with pytest.raises(NoSuchModel):
        await service.embed(entry.name, ["x"])
    with pytest.raises(NoSuchModel):
        await service.tokenize(entry.name, "x")
    with pytest.raises(NoSuchModel):
        service.start_load(entry.name, ":1.6", OTHER)
    caller.set(MINE)
    assert await service.tokenize(entry.name, "x") == [1]
    await asyncio.gather(service.drop_owner(":1.5"), service.residency.close())


async def test_two_imports_of_one_name_are_one_object(service: DaemonService, tiny_model: Path) -> None:
    exported: dict[str, object] = {}
    connection = Mock(spec=Connection)
    connection.on_vanished = []
    connection.export.side_effect = exported.setdefault
    connection.unexport.side_effect = exported.pop
    Publisher(connection, service, Mock(spec=Authority))
    before = len(exported)
    jobs = [await service.import_model(os.open(tiny_model, os.O_RDONLY), "two", f":1.{i}", MINE) for i in range(2)]
    for each in jobs:
        await each.wait()
    models = [path for path in exported if "/models/" in path]
    assert len(models) == 2
    assert len(exported) == before + 3  # one model, two jobs
    await service.remove("two:1")
    assert [path for path in exported if "/models/" in path] == models[:1]
    assert list(service.registry.state.iterdir()) == []


async def test_one_broken_object_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    connection = Connection()

    class Good:
        def properties(self) -> dict[str, object]:
            if self is broken:
                raise NoSuchModel("gone")
            return {"Kind": "load", "State": "done", "Progress": 1.0, "Message": "", "Error": ["", ""], "Result": {},
                    "Created": 1}  # fmt: skip

        async def cancel(self, call: Call) -> None: ...

    broken = None
    handlers = [Good(), Good()]
    for index, each in enumerate(handlers):
        connection.export(f"{ROOT}/jobs/{index}", {"org.ai_assistant1.Job": each})
    broken = handlers[0]
    assert list(connection._managed()) == [f"{ROOT}/jobs/1"]
    assert "jobs/0" in caplog.text
