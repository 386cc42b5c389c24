"""The service with scripted workers: who may see what, what counts, and what ends."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ai_assistant.daemon import bus
from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.bus import ROOT
from ai_assistant.daemon.bus.model import ModelObject
from ai_assistant.daemon.contract import Counters, Scope, caller
from ai_assistant.daemon.devices import DeviceTable
from ai_assistant.daemon.inspection import Inspection
from ai_assistant.daemon.jobs import JobTable
from ai_assistant.daemon.pins import Pins
from ai_assistant.daemon.publish import Publisher
from ai_assistant.daemon.registry import Entry, Registry, check_descriptor
from ai_assistant.daemon.residency import Meters, Residency, load_options
from ai_assistant.daemon.service import DaemonService
from ai_assistant.daemon.status import Machine
from ai_assistant.engines.contract import GenerateRequest
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.errors import Busy, InvalidModel, NoSuchModel
from ai_assistant.services.connection import Call, Connection
from tests.daemon.test_registry import put
from tests.daemon.test_residency import INFO, Lab

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
    pins = Pins(tmp_path / "pins.json")
    residency = Residency(config, lab.connect, Meters(lambda: 1 << 40), counters, pinned=pins.__contains__)
    jobs = JobTable(per_owner=config.limits_jobs_per_caller)
    made = DaemonService(config, registry, residency, jobs, Machine(Path("/"), tmp_path), counters, pins)
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
    Publisher(connection, service, Mock(spec=Authority), DeviceTable(tuple, Mock(), Mock()))
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
    connection = Connection(map(bus.load, bus.NAMES), root=ROOT)

    class Good:
        def properties(self) -> dict[str, object]:
            if self is broken:
                raise NoSuchModel("gone")
            return {"Kind": "load", "State": "done", "Progress": 1.0, "Message": "", "Details": {}, "Error": ["", ""],
                    "Result": {}, "Created": 1}  # fmt: skip

        async def cancel(self, call: Call) -> None: ...

    broken = None
    handlers = [Good(), Good()]
    for index, each in enumerate(handlers):
        connection.export(f"{ROOT}/jobs/{index}", {"org.ai_assistant1.Job": each})
    broken = handlers[0]
    assert list(connection._managed()) == [f"{ROOT}/jobs/1"]
    assert "jobs/0" in caplog.text


async def test_transient_models_are_limited_per_user(service: DaemonService, tiny_model: Path) -> None:
    service.config = dataclasses.replace(service.config, limits_models_per_caller=2)

    async def pass_one(connection: int, uid: int) -> Entry:
        return await service.open_model(os.open(tiny_model, os.O_RDONLY), "x", 0, f":1.{connection}", uid)

    # All at once and from five connections: each is looked at before any is there.
    made = await asyncio.gather(*(pass_one(each, MINE) for each in range(5)), return_exceptions=True)
    assert sum(isinstance(each, Busy) for each in made) == 3
    await pass_one(9, OTHER)
    for connection in range(10):
        await service.drop_owner(f":1.{connection}")


async def test_a_stop_waits_for_embeddings_and_tokens(service: DaemonService, lab: Lab) -> None:
    lab.load_s = 0.2
    running: list[asyncio.Future[Any]] = [asyncio.ensure_future(service.embed("assistant", ["x"]))]
    running.append(asyncio.ensure_future(service.tokenize("assistant", "x")))
    await asyncio.sleep(0.05)
    await service.finish()
    assert all(each.done() and each.exception() is None for each in running)
    await service.residency.close()


async def test_a_load_job_takes_the_model_of_that_moment(service: DaemonService, tiny_model: Path) -> None:
    put(service.registry.state, "mine", "1", tiny_model)
    service.registry.scan()
    job = service.start_load("mine", ":1.5", MINE)
    await service.remove("mine:1")
    with pytest.raises(NoSuchModel):
        await job.wait()


async def test_a_state_folder_that_cannot_be_is_told(tmp_path: Path, service: DaemonService) -> None:
    (tmp_path / "file").write_text("")
    service.registry.state = tmp_path / "file" / "models"
    service.registry.scan()
    assert service.model("assistant").builtin
    assert "imported models cannot be used" in service.health()
    assert service.current_state() == "degraded"


def test_writable_descriptors_are_not_handed_on(tmp_path: Path, tiny_model: Path, registry: Registry) -> None:
    path = tmp_path / "copy"
    path.write_bytes(tiny_model.read_bytes())
    fd = os.open(path, os.O_RDWR)
    entry = registry.add_transient(fd, Inspection(INFO, MemoryShape(weights_bytes=1)), "x", ":1.5", MINE, 1)
    check_descriptor(fd)
    other = entry.open()
    assert fcntl.fcntl(other, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.close(other)
    with pytest.MonkeyPatch.context() as patch:
        # As for a file that only its owner may open.
        patch.setattr(os, "open", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(InvalidModel, match="may write"):
            check_descriptor(fd)
        with pytest.raises(InvalidModel, match="Permission denied"):
            entry.open()
    registry.remove(entry.name)
    with pytest.raises(InvalidModel, match="Bad file descriptor"):
        check_descriptor(fd)


async def test_a_busy_model_can_be_removed(service: DaemonService, lab: Lab, tiny_model: Path) -> None:
    entry = await service.open_model(os.open(tiny_model, os.O_RDONLY), "x", 0, ":1.5", MINE)
    lab.gate.clear()  # its worker never comes to an end
    events = service.generate(entry.name, GenerateRequest(prompt="x"))
    await anext(events)
    authority = Mock(spec=Authority)
    handler = ModelObject(service, authority, entry.name, lambda job: "")
    await handler.remove(Call(":1.7"))
    assert authority.require.await_args.args[1] is Scope.REMOVE
    assert lab.alive == []
    with pytest.raises(NoSuchModel):
        service.model(entry.name)
    await events.aclose()
