"""`ai-assistant plan`: what it shows of real backends, and what it says about bad files and options."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HETERO_COMPUTE", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from ai_assistant.hal import onnx_graph
    from bench._hal_graphs import branches

    path = tmp_path / "branches.onnx"
    path.write_bytes(onnx_graph.write(branches(2, 2, 32, 8)))
    return path


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--dot", "--json"), "Usage"),
        (("--shape", "x"), "Usage"),
        (("--shape", "=1"), "Usage"),
        (("--shape", "x=1,-2"), "Usage"),
        (("--shape", "x=1,,2"), "Usage"),
        (("--shape", "x=٣"), "Usage"),
        (("--memory", "cpu=much"), "Usage"),
        (("--devices", "cpu,onnxruntime", "--intent", "cpu"), "Usage"),
        (("--devices", "performance"), "Usage"),
        (("--intent", "maybe?"), "InvalidArgument"),
        (("--devices", "cpu,,"), "InvalidArgument"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, tmp_path: Path, options: tuple[str, ...], name: str) -> None:
    result = cli("plan", str(tmp_path / "any.onnx"), *options, "--json")
    assert result.status == (2 if name == "Usage" else 1)
    assert result.error["name"] == name


def test_files_that_are_not_there(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = cli("plan", str(tmp_path / "no.onnx"), "--json")
    assert (missing.status, missing.error["name"]) == (1, "NoSuchModel")
    assert cli("plan", str(tmp_path), "--json").error["name"] == "InvalidModel"
    monkeypatch.setenv("HETERO_COMPUTE", "on,off")
    assert cli("plan", str(tmp_path), "--json").error["name"] == "InvalidArgument"


@pytest.mark.engine
def test_a_plan_for_people_and_for_programs(cli: Cli, model: Path) -> None:
    shown = cli("plan", str(model))
    assert shown.status == 0, shown.err
    assert "alone" in shown.out
    assert "MatMul ×4" in shown.out
    assert "Schema error" not in shown.err
    found = cli("plan", str(model), "--devices", "cpu,onnxruntime", "--json").json
    assert set(found["devices"]) <= {"cpu", "onnxruntime"}
    assert sum(part["nodes"] for part in found["parts"]) >= 10
    assert {each["name"] for each in found["alternatives"]} >= {"cpu alone", "onnxruntime alone"}
    assert found["intent"] == "cpu,onnxruntime"
    drawn = cli("plan", str(model), "--dot")
    assert drawn.out.startswith("digraph plan {")
    alone = cli("plan", str(model), "--intent", "OFF", "--json").json
    assert len(alone["parts"]) == 1


@pytest.mark.engine
def test_measured(cli: Cli, model: Path, tmp_path: Path) -> None:
    found = cli("plan", str(model), "--devices", "cpu,onnxruntime", "--measure", "--json").json
    assert any(each["measured_s"] for each in found["alternatives"])
    assert found["parts"][0]["sources"].get("measured")
    assert list((tmp_path / "cache" / "ai-assistant" / "hal-costs").iterdir())
    again = cli("plan", str(model), "--devices", "cpu", "--json").json
    assert again["parts"][0]["sources"].get("measured")


@pytest.mark.engine
def test_what_is_refused(cli: Cli, model: Path, tmp_path: Path) -> None:
    assert cli("plan", str(model), "--devices", "tpu", "--json").error["name"] == "InvalidArgument"
    limited = cli("plan", str(model), "--devices", "cpu", "--memory", "cpu=10", "--json")
    assert limited.error["name"] == "OutOfMemory"
    assert cli("plan", str(model), "--memory", "tpu=10", "--json").error["name"] == "Usage"
    content = model.read_bytes()
    for number, damaged in enumerate((b"", b"x" * 1000, content[: len(content) // 2], content[:50] + b"\xff" * 50)):
        bad = tmp_path / f"{number}.onnx"
        bad.write_bytes(damaged)
        result = cli("plan", str(bad), "--json")
        assert (result.status, result.error["name"]) in {(1, "InvalidModel"), (1, "NotSupported")}
