from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ai_assistant.daemon import registry as registries
from ai_assistant.daemon.inspection import Inspection, inspect_here
from ai_assistant.daemon.registry import Registry, check_descriptor, natural, parse_name
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.errors import InternalError, InvalidArgument, InvalidModel, NoSuchModel, NotSupported


def put(folder: Path, name: str, version: str, model: Path, **metadata: object) -> Path:
    place = folder / name / version
    place.mkdir(parents=True)
    shutil.copy(model, place / "model.gguf")
    if metadata:
        (place / "model.json").write_text(json.dumps(metadata))
    return place


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a", ("a", "1")), ("qwen3-0.6b:2", ("qwen3-0.6b", "2")), ("a:q4_0", ("a", "q4_0")), ("0:0", ("0", "0"))],
)
def test_names(text: str, parts: tuple[str, str]) -> None:
    assert parse_name(text) == parts


@pytest.mark.parametrize(
    "text", ["", ":", "a:", ":1", "A", "a b", "../x", "a/b", ".a", "a:b:c", "ä", "a\n", "a" * 65, "a:" + "1" * 33]
)
def test_names_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_name(text)
    assert caught.value.param == "name"


def test_versions_sort_as_people_count() -> None:
    assert sorted(["10", "9", "2b", "2a", "1.10", "1.9"], key=natural) == ["1.9", "1.10", "2a", "2b", "9", "10"]


def test_scan_finds_both_folders_and_skips_what_is_broken(tmp_path: Path, tiny_model: Path) -> None:
    put(tmp_path / "image", "assistant", "1", tiny_model)
    put(tmp_path / "state", "mine", "9", tiny_model, created=5)
    put(tmp_path / "state", "mine", "10", tiny_model)
    put(tmp_path / "state", "assistant", "1", tiny_model)
    put(tmp_path / "state", "Bad Name", "1", tiny_model)
    broken = put(tmp_path / "state", "broken", "1", tiny_model)
    os.truncate(broken / "model.gguf", 100)
    empty = put(tmp_path / "state", "json", "1", tiny_model)
    (empty / "model.json").write_text('["not an object"]')
    found = Registry(tmp_path / "image", tmp_path / "state", LoadOptions())
    found.scan()
    assert [each.name for each in found.all()] == ["assistant:1", "json:1", "mine:9", "mine:10"]
    assert found.get("assistant:1").builtin
    assert found.get("mine").name == "mine:10"
    assert found.get("mine:9").created == 5
    assert found.get("mine").info.architecture == "llama"
    assert found.get("mine").memory.weights_bytes > found.get("mine").info.parameters


def test_scan_removes_what_interrupted_imports_left(tmp_path: Path, tiny_model: Path) -> None:
    left = tmp_path / "state" / ".partial-abc"
    left.mkdir(parents=True)
    (left / "model.gguf").write_bytes(b"half")
    Registry(tmp_path / "image", tmp_path / "state", LoadOptions()).scan()
    assert not left.exists()


def test_what_is_known_of_a_model_is_not_read_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = put(tmp_path / "state", "mine", "1", tiny_model)
    with (place / "model.gguf").open("rb") as file:
        found = inspect_here(file.fileno(), LoadOptions())
        values = registries.metadata(found, "digest", 7, os.fstat(file.fileno()))
    (place / "model.json").write_text(json.dumps(values))
    calls: list[int] = []

    def count(fd: int, options: LoadOptions) -> Inspection:
        calls.append(fd)
        return found

    monkeypatch.setattr(registries, "inspect_here", count)
    made = Registry(tmp_path / "image", tmp_path / "state", LoadOptions())
    made.scan()
    assert calls == []
    assert (made.get("mine").sha256, made.get("mine").created) == ("digest", 7)
    with (place / "model.gguf").open("ab") as longer:
        longer.write(b"\0")
    Registry(tmp_path / "image", tmp_path / "state", LoadOptions()).scan()
    assert len(calls) == 1


def test_remove(tmp_path: Path, tiny_model: Path) -> None:
    put(tmp_path / "image", "assistant", "1", tiny_model)
    put(tmp_path / "state", "mine", "1", tiny_model)
    put(tmp_path / "state", "mine", "2", tiny_model)
    made = Registry(tmp_path / "image", tmp_path / "state", LoadOptions())
    made.scan()
    with pytest.raises(NotSupported):
        made.remove("assistant:1")
    grave = made.remove("mine:1")
    assert grave is not None
    assert (grave / "model.gguf").exists()
    assert (tmp_path / "state/mine/2").exists()
    other = made.remove("mine:2")
    assert set((tmp_path / "state").iterdir()) == {grave, other}
    Registry(tmp_path / "image", tmp_path / "state", LoadOptions()).scan()
    assert list((tmp_path / "state").iterdir()) == []
    with pytest.raises(NoSuchModel):
        made.get("mine")


def test_a_folder_that_cannot_be_moved_stays_a_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "state", "mine", "1", tiny_model)
    made = Registry(tmp_path / "image", tmp_path / "state", LoadOptions())
    made.scan()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InternalError, match="Read-only"):
        made.remove("mine:1")
    assert made.get("mine").path is not None
    monkeypatch.undo()
    # Somebody else has deleted it: it goes all the same.
    shutil.rmtree(tmp_path / "state" / "mine")
    assert made.remove("mine:1") is None
    with pytest.raises(NoSuchModel):
        made.get("mine")


def test_transient_files_are_never_mistaken(registry: Registry, tiny_model: Path) -> None:
    fd = os.open(tiny_model, os.O_RDONLY)
    entry = registry.add_transient(fd, inspect_here(fd, LoadOptions()), "transient", ":1.5", 1000, 1)
    assert entry.transient
    other = entry.open()
    assert os.path.sameopenfile(fd, other)
    os.lseek(other, 100, os.SEEK_SET)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    os.close(other)
    registry.remove(entry.name)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    reused = os.open(tiny_model, os.O_RDONLY)
    try:
        with pytest.raises(InvalidModel):
            entry.open()
    finally:
        os.close(reused)


def test_descriptors(tmp_path: Path, tiny_model: Path) -> None:
    read, write = os.pipe()
    empty = tmp_path / "empty"
    empty.touch()
    bad = [
        read,
        os.open(tmp_path, os.O_RDONLY),
        os.open(tiny_model, os.O_PATH),
        os.open(empty, os.O_RDONLY),
        os.open(tmp_path / "w", os.O_WRONLY | os.O_CREAT),
    ]
    good = os.open(tiny_model, os.O_RDONLY)
    try:
        for fd in bad:
            with pytest.raises(InvalidModel):
                check_descriptor(fd)
        assert check_descriptor(good).st_size == tiny_model.stat().st_size
    finally:
        for fd in (*bad, write, good):
            os.close(fd)


def test_a_transient_model_never_answers_for_a_bare_name(tmp_path: Path, tiny_model: Path) -> None:
    put(tmp_path / "image", "assistant", "1", tiny_model)
    made = Registry(tmp_path / "image", tmp_path / "state", LoadOptions())
    made.scan()
    with tiny_model.open("rb") as file:
        found = inspect_here(file.fileno(), LoadOptions())
    entries = [
        made.add_transient(os.open(tiny_model, os.O_RDONLY), found, prefix, ":1.5", 1000, 1)
        for prefix in ("assistant", "assistant", "alone")
    ]
    assert made.get("assistant").name == "assistant:1"
    with pytest.raises(NoSuchModel):
        made.get("alone")
    assert len({each.name for each in entries}) == 3
    for each in entries:
        assert made.get(each.name, 1000) is made.get(each.name, 0) is made.get(each.name) is each
        with pytest.raises(NoSuchModel):
            made.get(each.name, 1001)
        made.remove(each.name)
