"""`ai-assistant plan`: what it shows of real backends, and what it says about bad files and options."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.support import gguf_writer


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


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return gguf_writer.write_llama(tmp_path / "m.gguf")


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


@pytest.mark.parametrize("options", [("--dot",), ("--shape", "x=1"), ("--memory", "npu=5")])
@pytest.mark.engine
def test_options_that_are_not_for_language_models(cli: Cli, gguf: Path, options: tuple[str, ...]) -> None:
    result = cli("plan", str(gguf), *options, "--json")
    assert (result.status, result.error["name"]) == (2, "Usage")


def test_options_that_are_for_language_models_only(cli: Cli, tmp_path: Path) -> None:
    for option in ("--context", "--sequences"):
        assert cli("plan", str(tmp_path / "any.onnx"), option, "4", "--json").error["name"] == "Usage"


def test_damaged_language_models(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    content = gguf.read_bytes()
    for cut in (4, 20, 500):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(content[:cut])
        assert cli("plan", str(bad), "--json").error["name"] == "InvalidModel"


@pytest.mark.engine
def test_a_language_model(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_assistant.engines import native

    monkeypatch.setattr(native, "devices", dict)
    assumed = cli("plan", str(gguf))
    assert assumed.status == 0, assumed.err
    assert "there is no other device" in assumed.out
    assert "--measure finds out" in assumed.err
    found = cli("plan", str(gguf), "--measure", "--context", "256", "--sequences", "2", "--json").json
    assert (found["name"], found["context_length"], found["sequences"]) == ("cpu alone", 256, 2)
    assert found["parts"] == [{"device": "cpu", "layers": 3}]
    assert 0 < found["prefill_s"] < found["decode_s"]
    (processor,) = found["devices"]
    assert processor["speed_known"]
    # What was measured is kept.
    again = cli("plan", str(gguf), "--json").json
    assert again["devices"][0]["bytes_s"] == processor["bytes_s"] > 0
    less = cli("plan", str(gguf), "--memory", "cpu=1000", "--json").json
    assert "has 1000" in less["refused"]
    assert cli("plan", str(gguf), "--devices", "ggml:Gone", "--json").error["name"] == "InvalidArgument"


@pytest.mark.engine
def test_a_language_model_on_two_devices(cli: Cli, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_assistant.engines import placing
    from ai_assistant.engines.split_cost import SplitDevice

    host = SplitDevice(name="cpu", free_bytes=1 << 33, flops_s=1e11, bytes_s=1e10, shares_host=True)
    small = SplitDevice(
        name="ggml:V", free_bytes=6_000_000, flops_s=1e13, bytes_s=1e12, launch_s=1e-6, copy_bytes_s=1e11
    )
    monkeypatch.setattr(placing, "look", lambda *_, **__: (host, [small], {"ggml:W": "it burns"}))
    options = ("--memory", "ggml:V=6000000", "--context", "256", "--sequences", "1")
    shown = cli("plan", str(gguf), *options)
    assert shown.status == 0, shown.err
    assert "cpu + ggml:V" in shown.out
    assert "ggml:W is left out: it burns" in shown.err
    found = cli("plan", str(gguf), *options, "--json").json
    assert [each["device"] for each in found["parts"]] == ["cpu", "ggml:V"]
    assert sum(each["layers"] for each in found["parts"]) == 3
    assert found["memory_bytes"]["ggml:V"] <= 6_000_000
    assert found["missing"] == {"ggml:W": "it burns"}
