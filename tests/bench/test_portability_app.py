"""The application of the portability bench, on this machine: its answers, and what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench._debian import CHECKOUT
from bench.portable import model
from bench.portable.claims import apart

pytestmark = pytest.mark.engine

APPLICATION = CHECKOUT / "bench/portable/classify.py"
SIZE = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ai_assistant.hal import onnx_graph

    folder = tmp_path_factory.mktemp("portability")
    graph = model.classifier(size=SIZE, layers=2, width=48, classes=20)
    (folder / "model.onnx").write_bytes(onnx_graph.write(graph))
    np.save(folder / "picture.npy", model.picture(SIZE))
    return folder


def start(folder: Path, *arguments: str | Path, devices: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HETERO_COMPUTE": devices, "PYTHONPATH": f"{CHECKOUT}:{os.environ['PYTHONPATH']}"}
    return subprocess.run(
        [sys.executable, APPLICATION, *(arguments or ("model.onnx", "picture.npy", "--json"))],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_answers_as_onnxruntime_does_on_every_device(files: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(files / "model.onnx"), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: np.load(files / "picture.npy")})[0]
    best = [int(each) for each in np.argsort(-expected.ravel())[:5]]
    assert np.ptp(expected) > 0.1
    found = {}
    for device in ("", "cpu", "onnxruntime"):
        done = start(files, "model.onnx", "picture.npy", "--json", "--save", "scores.npy", devices=device)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert [index for index, _ in said["best"]] == best
        assert said["machine"] == os.uname().machine
        assert apart(np.load(files / "scores.npy"), expected) <= 1
        if device:
            assert list(said["devices"]) == [device]
        found[device] = said["digest"]
    assert len(set(found.values())) == 1


def test_it_answers_people(files: Path) -> None:
    done = start(files, "model.onnx", "picture.npy", devices="onnxruntime")
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("class ")
    assert "onnxruntime 1." in lines[5]


def test_another_picture_has_another_digest(files: Path) -> None:
    np.save(files / "other.npy", -model.picture(SIZE))
    digests = {json.loads(start(files, "model.onnx", each, "--json").stdout)["digest"] for each in
               ("picture.npy", "other.npy")}  # fmt: skip
    assert len(digests) == 2


def test_the_same_model_has_the_same_bytes() -> None:
    from ai_assistant.hal import onnx_graph

    made = [onnx_graph.write(model.classifier(size=SIZE, layers=1, width=24, classes=6)) for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.onnx", b""),
        ("model.onnx", b"\x08\x07garbage"),
        ("picture.npy", b""),
        ("picture.npy", b"\x93NUMPY\x01\x00"),
        ("picture.npy", b"no array at all"),
    ],
)
def test_damaged_files_are_named_and_not_traced(name: str, content: bytes, files: Path, tmp_path: Path) -> None:
    for each in ("model.onnx", "picture.npy"):
        (tmp_path / each).write_bytes(content if each == name else (files / each).read_bytes())
    done = start(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("classify: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 3, SIZE, SIZE - 1), np.float32),
        np.zeros((1, 3, SIZE, SIZE), np.float64),
        np.zeros((0,), np.float32),
        np.array([{"a": 1}], object),
    ],
)
def test_a_picture_of_another_kind_is_refused(wrong: np.ndarray, files: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", wrong)
    done = start(files, "model.onnx", tmp_path / "wrong.npy")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_files_that_are_not_there_and_wishes_that_mean_nothing(files: Path) -> None:
    assert "none.onnx" in start(files, "none.onnx", "picture.npy").stderr
    assert start(files).returncode == 0
    done = start(files, devices="fastest, please")
    assert done.returncode == 1
    assert "hint: " in done.stderr
