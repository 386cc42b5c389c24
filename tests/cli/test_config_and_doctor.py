"""`config` and the parts of `doctor` that need no daemon."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ai_assistant.cli import checks
from ai_assistant.hal.device import Device, DeviceKind, DriverState
from tests.cli.conftest import CHECKOUT, PROGRAM, Cli
from tests.sdk.served import Served


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "usr/lib/ai-assistant/config.d/00-defaults.toml": "[models]\nsequences = 3\nthreads = 1\n",
        "etc/ai-assistant/config.d/50-mine.toml": "[models]\nthreads = 2\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_check_says_where_each_value_comes_from(cli: Cli, root: Path) -> None:
    rows = {row["key"]: row for row in cli("config", "check", "--root", str(root), "--json").json}
    assert rows["models.sequences"]["value"] == 3
    assert rows["models.sequences"]["source"].endswith("00-defaults.toml")
    assert rows["models.threads"] == {
        "key": "models.threads",
        "value": 2,
        "source": str(root / "etc/ai-assistant/config.d/50-mine.toml"),
    }
    assert rows["log.level"]["source"] == "default"
    text = cli("config", "check", "--root", str(root))
    assert text.status == 0
    assert len(text.out.splitlines()) == len(rows)


def test_show(cli: Cli, root: Path) -> None:
    assert cli("config", "show", "models.threads", "--root", str(root)).out == "2\n"
    assert cli("config", "show", "models.threads", "--root", str(root), "--json").json == 2
    assert cli("config", "show", "--root", str(root), "--json").json["models.sequences"] == 3


@pytest.mark.parametrize("text", ["[models]\nthreadz = 2\n", "[models\n", '[models]\nthreads = "two"\n'])
def test_a_wrong_file_is_named(cli: Cli, root: Path, text: str) -> None:
    (root / "etc/ai-assistant/config.d/60-wrong.toml").write_text(text)
    for command in ("check", "show"):
        result = cli("config", command, "--root", str(root), "--json")
        assert result.status == 1
        assert result.error["name"] == "InvalidConfig"
        assert "60-wrong.toml" in result.error["message"]


def test_doctor_without_anything_finds_it_all(cli: Cli, nothing: None) -> None:
    result = cli("doctor", "--json")
    found = {each["name"]: each for each in result.json}
    assert result.status == 1
    for name in ("bus", "api", "polkit"):
        assert found[name]["state"] == "failed"
        assert found[name]["hint"]


def test_the_api_is_seen(api: Served) -> None:
    assert checks.run(checks.api).state == "ok"
    api.service.records = []
    assert checks.run(checks.api).state == "warning"


def test_a_device_that_does_not_work_is_a_warning_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Device("vga", DeviceKind.GPU, "VGA", state=DriverState.NO_DRIVER, attributes={"compute": False})
    npu = Device("npu", DeviceKind.NPU, "NPU", state=DriverState.FIRMWARE_MISSING, hint="install firmware-amd-graphics")
    found = [display]
    monkeypatch.setattr("ai_assistant.client.Client.devices", lambda self: found)
    assert checks.run(checks.devices) == checks.Result("devices", "ok", "no GPU or NPU")
    found.append(npu)
    result = checks.run(checks.devices)
    assert (result.state, result.hint) == ("warning", "install firmware-amd-graphics")
    assert result.detail == "NPU is there, but: firmware-missing"


def systemctl(monkeypatch: pytest.MonkeyPatch, out: str, status: int = 0) -> None:
    def run(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=status, stdout=out, stderr="it is broken\nvery\n")

    monkeypatch.setattr("ai_assistant.cli.checks.subprocess.run", run)


@pytest.mark.parametrize(
    ("out", "status", "state"),
    [
        ("", 0, "ok"),
        ("ai-assistantd.service loaded failed failed x\n", 0, "failed"),
        ("other.service loaded failed failed x\n", 0, "warning"),
        ("", 1, "warning"),
    ],
)
def test_units(monkeypatch: pytest.MonkeyPatch, out: str, status: int, state: str) -> None:
    systemctl(monkeypatch, out, status)
    assert checks.run(checks.units).state == state


@pytest.mark.parametrize(
    ("names", "state"), [(["ai-assistant"], "ok"), (["ai-assistant-admin"], "ok"), (["users"], "failed")]
)
def test_groups(monkeypatch: pytest.MonkeyPatch, names: list[str], state: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(checks, "_group_name", lambda number: names[0])
    found = checks.run(checks.groups)
    assert found.state == state
    assert bool(found.hint) is (state == "failed")


def test_disk_and_memory_that_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LEAST_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(checks, "LEAST_MEMORY_BYTES", 1 << 60)
    for check in (checks.disk, checks.memory):
        found = checks.run(check)
        assert found.state == "failed"
        assert "model" in found.hint


def test_an_engine_that_kills_its_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a library does that was built for another processor."""
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = checks.run(checks.engine)
    assert found.state == "failed"
    assert "-6" in found.detail


def test_a_defect_in_a_check_is_a_failed_check() -> None:
    def broken() -> checks.Result:
        raise RuntimeError("surprise")

    found = checks.run(broken)
    assert (found.state, found.name) == ("failed", "broken")


def test_model_names_are_completed(api: Served) -> None:
    def complete(words: str) -> list[str]:
        environment = {"_AI_ASSISTANT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
        done = subprocess.run(PROGRAM, capture_output=True, text=True, cwd=CHECKOUT, env={**os.environ, **environment})
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("ai-assistant run a") == ["assistant:1"]
    assert complete("ai-assistant run w") == ["writer:2"]
