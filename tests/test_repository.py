"""The checkout itself: rooms linked and described, one import identity however the source is shipped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
LINKED = ("daemon", "hal", "models", "power", "provisioning", "tee")
HEADINGS = ("Purpose", "Contract", "Data flow", "How to add one", "Privileges", "How it is tested")
ROOMS = (
    *LINKED,
    "ai_assistant",
    "ai_assistant/engines",
    "ai_assistant/optimizer",
    "ai_assistant/cli",
    "bench",
    "image",
    "tests",
)

# What a person who unpacks the source and imports it must find: one class, not two.
IDENTITY = """
import ai_assistant.errors, ai_assistant.daemon.contract, ai_assistant.engines.contract, ai_assistant.models, sys
from ai_assistant.daemon import contract
assert contract.GenerateRequest is ai_assistant.engines.contract.GenerateRequest
assert not {"daemon", "hal", "models", "power", "provisioning", "tee"} & set(sys.modules)
print(ai_assistant.daemon.contract.__file__)
"""


@pytest.mark.parametrize("room", LINKED)
def test_every_room_is_linked_into_the_package(room: str) -> None:
    link = CHECKOUT / "ai_assistant" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / room
    assert (link / "__init__.py").exists()


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_readme_with_the_same_headings(room: str) -> None:
    found = re.findall(r"^## (.+)$", (CHECKOUT / room / "README.md").read_text(), re.MULTILINE)
    assert [each for each in found if each in HEADINGS] == list(HEADINGS)


def test_the_map_of_rooms_in_the_readme_names_every_room() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    for room in ROOMS:
        assert f"({room}/README.md)" in readme or f"({room}/)" in readme, room


def _import_from(tree: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", IDENTITY],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tree)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", target], check=True)


def test_import_identity_in_the_checkout() -> None:
    assert _import_from(CHECKOUT).startswith(str(CHECKOUT))


def test_import_identity_from_an_archive(tmp_path: Path) -> None:
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout: the archive is the checkout")
    archive = tmp_path / "source.tar"
    subprocess.run(["git", "-C", CHECKOUT, "archive", "-o", archive, "HEAD"], check=True)
    _unpack(archive, tmp_path / "source")
    assert _import_from(tmp_path / "source").startswith(str(tmp_path))


def test_import_identity_from_an_sdist(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, CHECKOUT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    _unpack(sdist, tmp_path / "source")
    (tree,) = (tmp_path / "source").iterdir()
    assert _import_from(tree).startswith(str(tmp_path))


def test_locks_carry_hashes_and_no_addresses() -> None:
    for lock in (CHECKOUT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text, lock
        pinned = re.findall(r"^[A-Za-z0-9][^\s=]*==", text, re.MULTILINE)
        assert pinned
        assert text.count("--hash=sha256:") >= len(pinned), lock
