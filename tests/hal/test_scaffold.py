"""A new backend of a vendor works before its first change, and never overwrites anything."""

from __future__ import annotations

import importlib.util
import subprocess
import tomllib
from pathlib import Path

import pytest

from ai_assistant.errors import AlreadyExists, InvalidArgument, NoSpace
from ai_assistant.hal.contract import Backend
from ai_assistant.hal.native import NativeBackend
from ai_assistant.hal.scaffold import Language, include_folder, scaffold


def test_a_python_backend_is_made_and_works(tmp_path: Path) -> None:
    made = scaffold("acme-npu", tmp_path / "new")
    assert made.backend == tmp_path / "new/acme-npu/acme_npu.py"
    project = tomllib.loads((made.folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["ai_assistant.backends"] == {"acme-npu": "acme_npu:AcmeNpuBackend"}
    spec = importlib.util.spec_from_file_location("acme_npu", made.backend)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = module.BACKEND()
    assert isinstance(backend, Backend)
    assert (backend.name, type(backend).__name__) == ("acme-npu", "AcmeNpuBackend")
    with backend.open() as device:
        assert device.capabilities.memory_bytes
    assert "xample" not in made.backend.read_text().split('"""')[1]


@pytest.mark.parametrize("name", ["", "Acme", "a b", "../x", "-a", "a-", "a--b", "é", "9a", "a" * 41, "a\n"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        scaffold(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/mine").write_text("mine")
    with pytest.raises(AlreadyExists):
        scaffold("acme", tmp_path)
    assert [each.name for each in (tmp_path / "acme").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NoSpace, match="cannot be written"):
        scaffold("acme", tmp_path / "file")


@pytest.mark.engine
def test_a_backend_in_c_is_made_and_builds(tmp_path: Path) -> None:
    made = scaffold("acme-chip", tmp_path, Language.C)
    # As its Makefile does; make itself is tried in the image (tests/appliance/test_hardware.py).
    sources = [each for each in made.files if each.suffix == ".c"]
    command = ["gcc", "-std=gnu11", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-shared", f"-I{include_folder()}"]
    done = subprocess.run(
        [*command, "-o", made.backend, *sources, "-lm", "-lpthread"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    backend = NativeBackend(made.backend)
    assert backend.name == "acme-chip"
    assert backend.probe().devices
