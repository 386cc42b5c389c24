"""The service with scripted workers: who may see what, what counts, and what ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.contract import Counters, caller
from ai_assistant.daemon.jobs import JobTable
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
