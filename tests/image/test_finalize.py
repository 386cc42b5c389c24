"""The last touches to the image's root, on a made-up one."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
EPOCH = 1767225600


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("etc/systemd/system", "usr/lib/python3/dist-packages", "usr/share/locale/de", "home", "var/log/apt"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/machine-id").write_text("uninitialized\n")
    (tmp_path / "etc/shadow").write_text("root:!:20000::::::\n")
    return tmp_path


def finalize(root: Path) -> None:
    environment = {**os.environ, "BUILDROOT": str(root), "SOURCE_DATE_EPOCH": str(EPOCH)}
    subprocess.run([CHECKOUT / "image/finalize"], env=environment, check=True)


def module(root: Path, name: str, mode: py_compile.PycInvalidationMode) -> Path:
    source = root / f"usr/lib/python3/dist-packages/{name}.py"
    source.write_text("VALUE = 'compiled'\n")
    compiled = py_compile.compile(str(source), doraise=True, invalidation_mode=mode)
    assert compiled is not None
    return Path(compiled)


def imported(root: Path, name: str) -> str:
    program = f"import {name}; print({name}.VALUE)"
    environment = {"PYTHONPATH": str(root / "usr/lib/python3/dist-packages"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_bytecode_is_taken_without_a_look_at_its_source(root: Path) -> None:
    compiled = module(root, "hashed", py_compile.PycInvalidationMode.CHECKED_HASH)
    before = compiled.read_bytes()
    finalize(root)
    after = compiled.read_bytes()
    assert (before[4], after[4]) == (3, 1)
    assert before[:4] + before[5:] == after[:4] + after[5:]
    (root / "usr/lib/python3/dist-packages/hashed.py").write_text("VALUE = 'source'\n")
    assert imported(root, "hashed") == "compiled"


def test_other_bytecode_is_left_as_it_is(root: Path) -> None:
    timed = module(root, "timed", py_compile.PycInvalidationMode.TIMESTAMP)
    unchecked = module(root, "unchecked", py_compile.PycInvalidationMode.UNCHECKED_HASH)
    truncated = module(root, "truncated", py_compile.PycInvalidationMode.CHECKED_HASH)
    truncated.write_bytes(truncated.read_bytes()[:7])
    empty = truncated.with_name("empty.pyc")
    empty.touch()
    files = (timed, unchecked, truncated, empty)
    before = [each.read_bytes() for each in files]
    finalize(root)
    assert [each.read_bytes() for each in files] == before


def test_a_name_with_spaces_and_lines_is_no_trouble(root: Path) -> None:
    compiled = module(root, "odd", py_compile.PycInvalidationMode.CHECKED_HASH)
    odd = root / "usr/share/a name\nof two lines.pyc"
    shutil.copy(compiled, odd)
    finalize(root)
    assert odd.read_bytes()[4] == 1


def test_no_day_and_no_identity_of_the_build_stays(root: Path) -> None:
    (root / "etc/passwd-").touch()
    finalize(root)
    assert (root / "etc/machine-id").read_bytes() == b""
    assert (root / "etc/shadow").read_text() == f"root:!:{EPOCH // 86400}::::::\n"
    assert not (root / "etc/passwd-").exists()
    assert not (root / "var/log/apt").exists()


def test_the_boot_partition_is_not_waited_for(root: Path) -> None:
    """The seed of the boot loader is refreshed by a unit of ours that nothing on the way to serving waits for."""
    finalize(root)
    masked = root / "etc/systemd/system/systemd-boot-random-seed.service"
    assert masked.readlink() == Path("/dev/null")
    units = CHECKOUT / "image/base/usr/lib/systemd"
    unit = (units / "system/ai-assistant-boot-seed.service").read_text()
    assert "ExecStart=bootctl --graceful random-seed" in unit
    assert "Before=" not in unit
    assert "After=systemd-random-seed.service ai-assistantd.service" in unit
    presets = (units / "system-preset/10-ai-assistant.preset").read_text().splitlines()
    assert "enable ai-assistant-boot-seed.service" in presets
