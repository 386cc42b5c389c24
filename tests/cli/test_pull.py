"""`model pull` and `model suggest`: against a scripted daemon on a private bus, and sticks in a temporary folder."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from dbus_fast import Variant

from ai_assistant.cli.media import MAX_FILES, model_files, mounted
from ai_assistant.cli.pull import read_token
from tests.cli.conftest import Cli
from tests.cli.test_bus_commands import finish
from tests.sdk.bus_service import ERROR, ROOT, Scripted


def stick(root: Path) -> Path:
    """A root with one USB partition, one internal disk and one card that can be taken out, all mounted."""
    for number, device, removable in (
        ("8:17", "pci0/usb2/2-1/block/sdb/sdb1", None),
        ("8:1", "pci0/ata1/block/sda/sda1", "0"),
        ("179:1", "pci0/mmc/block/mmcblk0/mmcblk0p1", "1"),
    ):
        folder = root / "sys/devices" / device
        folder.mkdir(parents=True)
        if removable is not None:
            (folder.parent / "removable").write_text(removable + "\n")
        (root / "sys/dev/block").mkdir(parents=True, exist_ok=True)
        (root / "sys/dev/block" / number).symlink_to(folder)
    (root / "proc/self").mkdir(parents=True)
    rows = ["36 35 8:1 / / rw - ext4 /dev/sda1 rw", "40 35 8:17 / /media/my\\040stick rw - vfat /dev/sdb1 rw",
            "41 35 179:1 / /media/card rw - exfat /dev/mmcblk0p1 rw", "42 35 0:5 / /proc rw - proc proc rw", "",
            "short", "43 35 8:17 / /media/my\\040stick rw - vfat /dev/sdb1 rw",
            "44 35 ../../x / /x rw - x x rw"]  # fmt: skip
    (root / "proc/self/mountinfo").write_text("\n".join(rows) + "\n")
    found = root / "media/my stick"
    found.mkdir(parents=True)
    return found


def test_what_can_be_pulled_out(tmp_path: Path) -> None:
    folder = stick(tmp_path)
    assert mounted(tmp_path) == [folder, tmp_path / "media/card"]
    assert mounted(tmp_path / "nothing") == []


def test_model_files_on_a_stick(tmp_path: Path) -> None:
    folder = stick(tmp_path)
    (folder / "deep/er").mkdir(parents=True)
    (folder / ".Trash").mkdir()
    for name in ("a.gguf", "deep/er/B.GGUF", "notes.txt", ".Trash/old.gguf", "e.onnx"):
        (folder / name).write_bytes(b"x" * 7)
    (tmp_path / "secret.gguf").write_bytes(b"secret")
    (folder / "link.gguf").symlink_to(tmp_path / "secret.gguf")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.gguf")
    found = model_files([folder, tmp_path / "unplugged"])
    assert [(each.name, each.size_bytes) for each in found] == [("a.gguf", 7), ("deep/er/B.GGUF", 7), ("e.onnx", 7)]
    for index in range(MAX_FILES + 5):
        (folder / f"{index}.gguf").touch()
    assert len(model_files([folder])) == MAX_FILES


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("HF_TOKEN", " hf_env\n")
    assert read_token(None) == "hf_env"
    file = tmp_path / "token"
    file.write_text("hf_file\n")
    assert read_token(file) == "hf_file"
    for content in (b"", b"\n", b"two words", b"\xff\xfe", b"x" * 5000):
        file.write_bytes(content)
        with pytest.raises(Exception, match=r"no token|cannot be read"):
            read_token(file)
    with pytest.raises(Exception, match="No such file"):
        read_token(tmp_path / "none")
    with pytest.raises(Exception, match="directory"):
        read_token(tmp_path)


def test_no_token_in_an_argument(cli: Cli) -> None:
    refused = cli("model", "pull", "hf:o/n", "--token", "hf_secret")
    assert refused.status == 2
    refused = cli("model", "pull", "./m.gguf", "--sha256", "0" * 64)
    assert (refused.status, "network" in refused.err) == (2, True)


@pytest.mark.bus
def test_a_pull(cli: Cli, daemon: Scripted, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret\n")
    ending = finish(daemon, Result=Variant("a{sv}", {"name": Variant("s", "m:1")}))
    result = cli("model", "pull", "hf:o/n:Q8_0", "--name", "m", "--token-file", str(tmp_path / "token"))
    ending.join()
    assert (result.status, result.err) == (0, "")
    assert result.out == "m:1 is here; try it with: ai-assistant run m:1\n"
    source, name, options = next(body for called, body in daemon.calls if called == "PullModel")
    assert (source, name) == ("hf:o/n:Q8_0", "m")
    assert {key: each.value for key, each in options.items()} == {"token": "hf_secret"}


@pytest.mark.bus
def test_json_lines(cli: Cli, daemon: Scripted) -> None:
    details = {"phase": Variant("s", "download"), "bytes": Variant("x", 50), "total_bytes": Variant("x", 100),
               "bytes_per_s": Variant("d", 12.5), "eta_s": Variant("d", 4.0)}  # fmt: skip

    def body() -> None:
        path = f"{ROOT}/jobs/1"
        deadline = time.monotonic() + 20
        while path not in daemon.jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        daemon.change(path, Progress=Variant("d", 0.5), Details=Variant("a{sv}", details))
        time.sleep(0.6)
        daemon.change(path, State=Variant("s", "done"), Result=Variant("a{sv}", {"name": Variant("s", "m:1")}))

    thread = threading.Thread(target=body)
    thread.start()
    result = cli("model", "pull", "hf:o/n", "--json")
    thread.join()
    assert result.status == 0
    lines = [json.loads(each) for each in result.out.splitlines()]
    assert lines[-1] == {"phase": "done", "name": "m:1"}
    shown = next(each for each in lines if each["phase"] == "download")
    assert (shown["bytes"], shown["total_bytes"], shown["bytes_per_s"], shown["eta_s"]) == (50, 100, 12.5, 4.0)


@pytest.mark.bus
def test_a_pull_that_fails(cli: Cli, daemon: Scripted) -> None:
    error = Variant("(ss)", [ERROR + "NoSuchModel", "o/n has nothing that fits 'Q1' (hint: there is: a.gguf (Q8_0))"])
    ending = finish(daemon, "failed", Error=error)
    result = cli("model", "pull", "hf:o/n:Q1", "--json")
    ending.join()
    assert result.status == 1
    assert result.error == {
        "name": "NoSuchModel",
        "message": "o/n has nothing that fits 'Q1'",
        "hint": "there is: a.gguf (Q8_0)",
    }


@pytest.mark.bus
def test_a_file(cli: Cli, daemon: Scripted, tmp_path: Path) -> None:
    (tmp_path / "My Model.gguf").write_bytes(b"GGUF")
    ending = finish(daemon, Result=Variant("a{sv}", {"name": Variant("s", "my-model:1")}))
    result = cli("model", "pull", str(tmp_path / "My Model.gguf"))
    ending.join()
    assert result.out == "my-model:1 is here; try it with: ai-assistant run my-model:1\n"
    assert daemon.files == [b"GGUF"]


@pytest.mark.bus
def test_a_stick_that_is_not_there(cli: Cli, daemon: Scripted) -> None:
    result = cli("model", "pull", "usb:no-such-model-here.gguf", "--json")
    assert (result.status, result.error["name"]) == (1, "NoSuchModel")
    assert "PullModel" not in [name for name, _ in daemon.calls]


@pytest.mark.bus
def test_suggestions(cli: Cli, daemon: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cli("model", "suggest", "--json").json
    assert found["bandwidth_bytes_per_s"] > 0
    assert len(found["suggestions"]) >= 10
    assert all(each["slowest"] < each["fastest"] for each in found["suggestions"])
    assert [each["name"] for each in found["installed"]] == ["assistant:1", "writer:2"]
    # What was measured is remembered.
    assert cli("model", "suggest", "--json").json["bandwidth_bytes_per_s"] == found["bandwidth_bytes_per_s"]
    shown = cli("model", "suggest", "--all")
    assert re.search(r"^a 7 B model +Q4_K_M +4\.3 GiB ", shown.out, re.MULTILINE)
    assert "disk" not in shown.out  # it is not known here, and what is not known is not claimed
    assert cli("model", "suggest", "--context", "-5").status == 2
