# ruff: noqa: ASYNC240 - the test may wait for its files
from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.importer import Source, copy_in
from ai_assistant.daemon.inspection import inspect, inspect_here
from ai_assistant.daemon.registry import Registry
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.errors import AlreadyExists, InvalidModel, NoSpace


@pytest.fixture
def source(tiny_model: Path) -> Iterator[Source]:
    fd = os.open(tiny_model, os.O_RDONLY)
    yield Source(fd, inspect_here(fd, LoadOptions()), os.fstat(fd))
    os.close(fd)


def files(registry: Registry) -> list[str]:
    return sorted(str(each.relative_to(registry.state)) for each in registry.state.rglob("*"))


async def test_a_copy_is_complete_and_described(registry: Registry, source: Source, tiny_model: Path) -> None:
    told: list[float] = []
    entry = await copy_in(registry, "mine:2", source, 0, told.append)
    assert files(registry) == ["mine", "mine/2", "mine/2/model.gguf", "mine/2/model.json"]
    assert (registry.state / "mine/2/model.gguf").read_bytes() == tiny_model.read_bytes()
    values = json.loads((registry.state / "mine/2/model.json").read_text())
    assert values["sha256"] == entry.sha256
    again = Registry(registry.builtin, registry.state, LoadOptions())
    again.scan()
    assert again.get("mine") == entry
    # The caller's position in the file is his.
    assert os.lseek(source.fd, 0, os.SEEK_CUR) == 0


async def test_the_same_content_twice_is_no_error(registry: Registry, source: Source) -> None:
    first = await copy_in(registry, "mine:1", source, 0, lambda value: None)
    assert await copy_in(registry, "mine:1", source, 0, lambda value: None) is first
    both = [copy_in(registry, "both:1", source, 0, lambda value: None) for _ in range(2)]
    one, two = await asyncio.gather(*both)
    assert one is two
    assert not [each for each in files(registry) if ".partial" in each]


async def test_what_is_no_usable_model_is_replaced(
    registry: Registry, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    broken = registry.state / "mine" / "1"
    broken.mkdir(parents=True)
    (broken / "model.gguf").write_bytes(b"not a model")
    registry.scan()
    assert registry.all() == []
    entry = await copy_in(registry, "mine:1", source, 0, lambda value: None)
    assert registry.get("mine") is entry
    assert "no usable model" in caplog.text
    # The old folder goes in a thread, and may go while it is listed.
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            if len(files(registry)) == 4:
                break
        await asyncio.sleep(0.01)
    assert files(registry) == ["mine", "mine/1", "mine/1/model.gguf", "mine/1/model.json"]


async def test_weights_are_nobody_elses(registry: Registry, source: Source) -> None:
    before = os.umask(0)
    try:
        await copy_in(registry, "mine:1", source, 0, lambda value: None)
    finally:
        os.umask(before)
    for each in registry.state.rglob("*"):
        assert each.stat().st_mode & 0o077 == 0, each


async def test_another_content_is_an_error(
    registry: Registry, source: Source, tiny_model: Path, tmp_path: Path
) -> None:
    await copy_in(registry, "mine:1", source, 0, lambda value: None)
    before = files(registry)
    data = bytearray(tiny_model.read_bytes())
    data[-1] ^= 1
    path = tmp_path / "other"
    path.write_bytes(data)
    with path.open("rb") as file:
        found = inspect_here(file.fileno(), LoadOptions())
        other = Source(file.fileno(), found, os.fstat(file.fileno()))
        with pytest.raises(AlreadyExists):
            await copy_in(registry, "mine:1", other, 0, lambda value: None)
    assert files(registry) == before


async def test_too_little_space_is_said_before(registry: Registry, source: Source) -> None:
    with pytest.raises(NoSpace, match="bytes are free"):
        await copy_in(registry, "mine:1", source, 1 << 62, lambda value: None)
    assert files(registry) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
async def test_a_disk_that_fills_up(
    registry: Registry, source: Source, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.write
    written = 0

    def write(fd: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(number, os.strerror(number))
        return real(fd, data[:20_000])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(NoSpace):
        await copy_in(registry, "mine:1", source, 0, lambda value: None)
    assert files(registry) == []
    monkeypatch.undo()
    await copy_in(registry, "mine:1", source, 0, lambda value: None)


async def test_cancelling_leaves_nothing_and_stops_the_thread(
    registry: Registry, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    reads = 0

    def slow(fd: int, buffers: Any, offset: int) -> int:
        nonlocal reads
        reads += 1
        import time

        time.sleep(0.05)
        return real(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", slow)
    task = asyncio.ensure_future(copy_in(registry, "mine:1", source, 0, lambda value: None))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(registry) == []
    seen = reads
    await asyncio.sleep(0.15)
    assert reads == seen


async def test_a_file_that_changes(registry: Registry, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "changing"
    path.write_bytes(tiny_model.read_bytes())
    with path.open("rb") as file:
        changing = Source(file.fileno(), inspect_here(file.fileno(), LoadOptions()), os.fstat(file.fileno()))
        os.truncate(path, 1000)
        with pytest.raises(InvalidModel, match="changed"):
            await copy_in(registry, "mine:1", changing, 0, lambda value: None)
    assert files(registry) == []


async def test_inspection_in_a_child(tiny_model: Path, tmp_path: Path) -> None:
    with tiny_model.open("rb") as file:
        assert await inspect(file.fileno(), LoadOptions()) == inspect_here(file.fileno(), LoadOptions())
    bad = tmp_path / "bad"
    bad.write_bytes(tiny_model.read_bytes()[:500])
    with bad.open("rb") as file:
        with pytest.raises(InvalidModel, match="truncated") as caught:
            await inspect(file.fileno(), LoadOptions())
        assert type(caught.value) is InvalidModel
