"""The scripts that prepare a build say what is wrong before they do anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
DEB822 = """\
Types: deb
# a comment in the middle
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
ONE_LINE = "deb [arch=amd64 signed-by=/some.gpg] http://other.example/debian bookworm main\n"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_sources_from_deb822(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(DEB822)
    sources = run("image/apt-sources", "trixie", APT_CONFIGURATION=str(apt), MIRROR="").stdout
    assert "URIs: http://mirror.example/debian\n" in sources
    assert "Suites: trixie trixie-updates" in sources
    assert "URIs: http://mirror.example/debian-security\nSuites: trixie-security" in sources


def test_sources_from_one_line_format(apt: Path) -> None:
    (apt / "sources.list").write_text(ONE_LINE)
    found = run("image/apt-sources", "--mirror", APT_CONFIGURATION=str(apt), MIRROR="")
    assert found.stdout == "http://other.example/debian\n"


def test_a_mirror_of_ones_own(apt: Path) -> None:
    found = run("image/apt-sources", "--mirror", APT_CONFIGURATION=str(apt), MIRROR="http://mine.example/debian")
    assert found.stdout == "http://mine.example/debian\n"


def test_no_mirror_is_an_error_with_a_hint(apt: Path) -> None:
    found = run("image/apt-sources", "trixie", APT_CONFIGURATION=str(apt), MIRROR="")
    assert found.returncode == 1
    assert "hint: make MIRROR=" in found.stderr


def test_an_unknown_profile_is_named() -> None:
    found = run("image/build", "gaming")
    assert found.returncode == 2
    assert "gaming" in found.stderr
    assert "hint: developer, production or test" in found.stderr


def test_the_image_of_a_profile_is_where_the_runners_look() -> None:
    from image.container import image_path

    for profile in ("developer", "production", "test"):
        printed = run("image/build", "--print", profile).stdout.strip()
        assert CHECKOUT / printed == image_path(profile)


def test_each_mode_has_a_tools_tree_and_a_cache_of_its_own() -> None:
    modes = ({"LOCKED": "", "UPGRADE": ""}, {"LOCKED": "1", "UPGRADE": ""}, {"LOCKED": "", "UPGRADE": "1"})
    trees = [run("image/toolbox", "--path", **mode).stdout.strip() for mode in modes]
    assert len(set(trees)) == 3
    assert trees[1].endswith("-locked")
    assert trees[2].endswith("-upgrade")
    keys = [run("image/packages", "key", **mode).stdout.strip() for mode in (modes[0], modes[2])]
    assert keys[0] != keys[1] == "upgrade"


@pytest.mark.skipif(os.getuid() != 0, reason="a change of user needs root; without root the next test covers it")
def test_the_toolbox_needs_root() -> None:
    found = run("setpriv", "--reuid=65534", "--clear-groups", "image/toolbox", "true")
    assert found.returncode == 1
    assert "must run as root" in found.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="needs an ordinary user")
def test_the_toolbox_needs_root_as_a_user() -> None:
    found = run("image/toolbox", "true")
    assert found.returncode == 1
    assert "must run as root" in found.stderr
