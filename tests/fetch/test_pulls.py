"""From a wish to a registered model, with the real process and a hub that misbehaves."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.fetch.client import Fetcher
from ai_assistant.daemon.jobs import Job, JobState, JobTable
from ai_assistant.daemon.parts import Parts
from ai_assistant.daemon.pulls import PullOptions, Pulls, _Meter
from ai_assistant.daemon.registry import MODEL_FILE, Registry
from ai_assistant.daemon.residency import load_options
from ai_assistant.daemon.space import DiskSpace
from ai_assistant.errors import (
    AlreadyExists,
    Busy,
    Cancelled,
    DownloadFailed,
    InvalidArgument,
    InvalidModel,
    NoSpace,
    NoSuchModel,
)
from tests.support import hub_server
from tests.support.fetch_unit import Unit
from tests.support.hub_server import Hub

SOURCE = "hf:o/n:Q8_0"
PATIENCE = {"attempts": 3, "first_wait_s": 0.0, "stall_s": 20.0}


class Lab:
    """Pulls with a registry in a folder; `restart` makes them anew on the same disk."""

    def __init__(self, folder: Path, unit: Unit, hub: Hub) -> None:
        self.folder = folder
        self.unit = unit
        self.config = dataclasses.replace(configuration.load(folder), pull_endpoint=hub.url)
        self.added: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.registry = Registry(self.folder / "image", self.folder / "models", load_options(self.config))
        self.registry.scan()
        self.space = DiskSpace(self.registry.state, self.config.models_disk_reserve_bytes)
        self.jobs = JobTable()
        fetcher = Fetcher(self.unit.path, patience=PATIENCE)
        self.pulls = Pulls(self.config, self.registry, self.jobs, self.space, fetcher, self.added.append)
        self.pulls.sweep()

    def start(self, source: str = SOURCE, name: str = "", *, uid: int = 7, **options: str) -> Job:
        return self.pulls.start(source, name, PullOptions(**options), ":1.1", uid)

    async def pull(self, source: str = SOURCE, name: str = "", **options: str) -> Job:
        job = self.pulls.start(source, name, PullOptions(**options), ":1.1", 7)
        await asyncio.wait_for(job.wait(), 60)
        return job

    def parts(self) -> list[Path]:
        return sorted((self.registry.state / ".pulls").glob("*/part-*"))


@pytest.fixture
def lab(tmp_path: Path, unit: Unit, hub: Hub, model: bytes) -> Lab:
    hub.files["o/n"] = {"tiny-Q8_0.gguf": model, "tiny-Q4_0.gguf": b"GGUF that is none" * 100}
    return Lab(tmp_path, unit, hub)


async def begun(job: Job) -> None:
    """Until bytes have come."""
    while not job.details.get("bytes"):
        assert job.state is not JobState.FAILED, job.error
        await asyncio.sleep(0.01)


async def test_a_model_from_a_hub(lab: Lab, model: bytes) -> None:
    job = await lab.pull()
    assert job.result == {"name": "tiny-q8_0:1"}
    assert lab.added == ["tiny-q8_0:1"]
    entry = lab.registry.get("tiny-q8_0")
    assert entry.sha256 == hashlib.sha256(model).hexdigest()
    assert entry.path is not None
    assert entry.path.read_bytes() == model
    assert entry.path.stat().st_nlink == 1
    assert entry.path.stat().st_mode & 0o777 == 0o600
    assert lab.parts() == []
    assert lab.space.kept_bytes == lab.config.models_disk_reserve_bytes
    # A restart knows it, too.
    lab.restart()
    assert lab.registry.get("tiny-q8_0").sha256 == entry.sha256


async def test_a_model_that_is_there_is_not_fetched(lab: Lab, hub: Hub) -> None:
    await lab.pull()
    fetched = len(hub.bodies())
    assert (await lab.pull()).result == {"name": "tiny-q8_0:1"}
    assert len(hub.bodies()) == fetched
    hub.files["o/n"]["tiny-Q8_0.gguf"] = b"GGUF another"
    with pytest.raises(AlreadyExists) as caught:
        await lab.pull()
    assert "--name" in caught.value.hint
    assert len(hub.bodies()) == fetched


async def test_parallel_pulls_are_one_job(lab: Lab, hub: Hub) -> None:
    hub.faults.append(hub_server.paced(20, 0.05))
    job = lab.start(uid=1)
    assert all(lab.start(f"{SOURCE}@main", uid=uid) is job for uid in range(2, 30))
    assert lab.start("hf:o/n:Q4_0") is not job
    with pytest.raises(Busy, match="under another name"):
        lab.start(name="other")
    await asyncio.wait_for(job.wait(), 60)
    assert len([each for each in hub.bodies() if "Q8_0" in each.path]) == 1
    assert lab.start() is not job
    await lab.jobs.close()


async def test_a_cancelled_pull_goes_on_later(lab: Lab, hub: Hub, model: bytes) -> None:
    hub.faults.append(hub_server.paced(50, 0.1))
    job = lab.start()
    await asyncio.wait_for(begun(job), 60)
    job.cancel()
    with pytest.raises(Cancelled):
        await job.wait()
    (part,) = lab.parts()
    # The process that filled it has gone, or goes now.
    await asyncio.to_thread(lab.unit.processes[-1].wait, 20)
    have = part.stat().st_size
    assert 0 < have < len(model)
    lab.restart()
    again = await lab.pull()
    assert hub.bodies()[-1].headers["Range"] == f"bytes={have}-"
    assert again.details["resumed_bytes"] == have
    assert lab.registry.get("tiny-q8_0").info.size_bytes == len(model)


async def test_a_killed_process_is_no_loss(lab: Lab, hub: Hub) -> None:
    hub.faults.append(hub_server.paced(50, 0.1))
    job = lab.start()
    await asyncio.wait_for(begun(job), 60)
    lab.unit.processes[-1].kill()
    with pytest.raises(DownloadFailed, match="died"):
        await job.wait()
    assert lab.parts() != []
    await lab.pull()


async def test_a_file_that_was_exchanged_is_begun_anew(lab: Lab, hub: Hub, model: bytes) -> None:
    hub.faults.extend([hub_server.drop_after(20_000), *[hub_server.status(404)]])
    with pytest.raises(NoSuchModel):
        await lab.pull()
    assert [each.stat().st_size for each in lab.parts()] == [20_000]
    hub.files["o/n"]["tiny-Q8_0.gguf"] = model + bytes(64)
    await lab.pull()
    assert "Range" not in hub.bodies()[-1].headers
    assert lab.registry.get("tiny-q8_0").info.size_bytes == len(model) + 64


async def test_what_is_no_model_is_not_kept(lab: Lab) -> None:
    with pytest.raises(InvalidModel):
        await lab.pull("hf:o/n:Q4_0")
    assert lab.parts() == []
    assert lab.registry.all() == []


async def test_a_wrong_hash(lab: Lab, hub: Hub) -> None:
    hub.lies["tiny-Q8_0.gguf"] = "3" * 64
    with pytest.raises(DownloadFailed, match="hash"):
        await lab.pull()
    assert [each.stat().st_size for each in lab.parts()] == [0]
    assert lab.registry.all() == []


async def test_a_part_that_was_damaged_after_it_came(lab: Lab, hub: Hub, model: bytes) -> None:
    """As by a power cut: what the disk holds is what counts."""
    hub.faults.extend([hub_server.drop_after(20_000), hub_server.status(404)])
    with pytest.raises(NoSuchModel):
        await lab.pull()
    (part,) = lab.parts()
    part.write_bytes(bytes(20_000))
    await lab.pull()
    path = lab.registry.get("tiny-q8_0").path
    assert path is not None
    assert path.read_bytes() == model


async def test_an_address(lab: Lab, hub: Hub, model: bytes) -> None:
    right = hashlib.sha256(model).hexdigest()
    url = f"{hub.url}/o/n/resolve/main/tiny-Q8_0.gguf"
    assert (await lab.pull(url, "mine:3", sha256=right)).result == {"name": "mine:3"}
    with pytest.raises(DownloadFailed, match="hash"):
        await lab.pull(url, "other", sha256="4" * 64)
    assert (await lab.pull(url, "other:2")).result == {"name": "other:2"}
    with pytest.raises(DownloadFailed, match="you expect"):
        await lab.pull(SOURCE, "third", sha256="4" * 64)


async def test_a_full_disk_is_seen_first(lab: Lab, hub: Hub, monkeypatch: pytest.MonkeyPatch, model: bytes) -> None:
    monkeypatch.setattr(DiskSpace, "_free", lambda self: self.reserve_bytes + len(model) - 1)
    with pytest.raises(NoSpace, match=f"{len(model)} bytes are needed"):
        await lab.pull()
    assert hub.bodies() == []
    monkeypatch.setattr(DiskSpace, "_free", lambda self: self.reserve_bytes + len(model))
    await lab.pull()


async def test_a_part_counts_as_there(lab: Lab, hub: Hub, monkeypatch: pytest.MonkeyPatch, model: bytes) -> None:
    hub.faults.extend([hub_server.drop_after(20_000), hub_server.status(404)])
    with pytest.raises(NoSuchModel):
        await lab.pull()
    monkeypatch.setattr(DiskSpace, "_free", lambda self: self.reserve_bytes + len(model) - 20_000)
    await lab.pull()


async def test_a_disk_that_fills_up_stops_it_above_the_reserve(
    lab: Lab, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.append(hub_server.paced(50, 0.1))
    job = lab.start()
    await asyncio.wait_for(begun(job), 60)
    monkeypatch.setattr(DiskSpace, "_free", lambda self: self.reserve_bytes - 1)
    with pytest.raises(NoSpace, match="stay free for updates"):
        await job.wait()
    assert lab.parts() != []


def test_downloads_do_not_count_on_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskSpace, "_free", lambda self: 1000)
    space = DiskSpace(tmp_path, 100)
    with space.promise(600) as first:
        assert (space.room(), space.kept_bytes) == (300, 700)
        with pytest.raises(NoSpace, match="1000 are free, of which 700 stay free"), space.promise(301):
            pass
        first.left = 100
        with space.promise(800):
            assert space.room() == 0
        first.left = -5  # it came to more than was announced
        assert space.room() == 900
    assert space.room() == 900


def make_part(lab: Lab, name: str, days: float) -> Path:
    folder = lab.registry.state / ".pulls" / name
    folder.mkdir(parents=True)
    (folder / "part-0").write_bytes(b"x" * 1000)
    then = time.time() - days * 86_400
    for each in (folder / "part-0", folder):
        os.utime(each, (then, then))
    return folder


def test_old_parts_go(lab: Lab) -> None:
    old, new = make_part(lab, "old", 15), make_part(lab, "new", 13)
    lab.restart()
    assert (old.exists(), new.exists()) == (False, True)


def test_parts_give_way_oldest_first(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_part(lab, name, days) for name, days in (("a", 1), ("b", 3), ("c", 2))]
    left = [100]
    monkeypatch.setattr(DiskSpace, "room", lambda self: left[0] * (4 - sum(each.exists() for each in folders)))
    lab.pulls.make_room(250)
    assert [each.exists() for each in folders] == [True, False, False]


def test_a_strange_folder_is_begun_anew(tmp_path: Path) -> None:
    from ai_assistant.daemon.fetch.client import RemoteFile

    files = (RemoteFile("a", "https://h/a", 5, "", ""),)
    for content in (b"", b"[" * 100_000, b"[]", b"{}", b'{"files": 3}', b"\xff"):
        folder = tmp_path / "x"
        folder.mkdir(exist_ok=True)
        (folder / "pull.json").write_bytes(content)
        (folder / "part-0").write_bytes(b"old")
        made = Parts(folder)
        made.prepare(files)
        assert made.size(0) == 0
        assert json.loads((folder / "pull.json").read_text())["files"][0]["path"] == "a"
    (folder / "part-0").write_bytes(b"new")
    # The address changes with each signature; the file is the same.
    Parts(folder).prepare((dataclasses.replace(files[0], url="https://h/b"),))
    assert made.size(0) == 3
    Parts(folder).prepare((dataclasses.replace(files[0], size_bytes=6),))
    assert made.size(0) == 0


def test_a_link_in_place_of_a_part_is_not_followed(tmp_path: Path) -> None:
    made = Parts(tmp_path / "x")
    made.prepare(())
    (tmp_path / "victim").write_bytes(b"keep")
    made.path(0).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        made.open(0)
    assert (tmp_path / "victim").read_bytes() == b"keep"


async def test_names_of_the_hub_are_no_names_of_files(lab: Lab, hub: Hub, model: bytes) -> None:
    hub.files["o/n"] = {"a b/$(reboot) Ünïcode ;x.gguf": model, "../../../up.gguf": b"x"}
    job = await lab.pull("hf:o/n")
    assert job.result == {"name": "reboot-n-code-x:1"}
    below = {str(each.relative_to(lab.registry.state)) for each in lab.registry.state.rglob("*")}
    assert below == {".pulls", "reboot-n-code-x", "reboot-n-code-x/1", f"reboot-n-code-x/1/{MODEL_FILE}",
                     "reboot-n-code-x/1/model.json"}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("o/n", "", {}), ("hf:o/n", "Bad Name", {}), ("hf:o/n", "", {"endpoint": "ftp://h"}),
        ("hf:o/n", "", {"endpoint": "http://192.0.2.1"}), ("hf:o/n", "", {"token": "a b"}),
        ("hf:o/n", "", {"token": "a\r\nHost: x"}), ("hf:o/n", "", {"token": "x" * 5000}),
        ("hf:o/n", "", {"token": "ünicode"}), ("hf:o/n", "", {"sha256": "abc"}), ("hf:o/n", "", {"sha256": "G" * 64}),
    ],
)  # fmt: skip
async def test_bad_input(lab: Lab, source: str, name: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        lab.pulls.start(source, name, PullOptions(**options), ":1.1", 7)


async def test_the_token_is_in_no_log(lab: Lab, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    hub.token = "hf_right"
    for token, state in (("hf_wrong", JobState.FAILED), ("hf_right", JobState.DONE)):
        job = lab.start(token=token)
        assert job.task is not None
        await asyncio.wait([job.task])
        assert job.state is state
        assert token not in job.message + str(job.details) + str(job.error and job.error.to_dict())
    assert "hf_" not in caplog.text
    assert all(b"hf_" not in each.read_bytes() for each in lab.registry.state.rglob("*") if each.suffix == ".json")


def test_rates() -> None:
    now = [0.0]
    meter = _Meter(lambda: now[0])
    assert meter.rate(100) == 0.0
    for second in range(1, 30):
        now[0] = second
        rate = meter.rate(100 + 50 * second)
    assert rate == pytest.approx(50)
    now[0] = 31
    assert meter.rate(0) == 0.0
