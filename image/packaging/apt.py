"""What apt reads while an image is built: sources, and preferences that hold each package at its locked version."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from image.packaging.errors import PackagingError
from image.packaging.lock import Lock

SCRIPTS = Path(__file__).resolve().parent.parent
SUITE = "trixie"


def archive_sources(suite: str = SUITE) -> str:
    """deb822 sources of the archive, from this machine's own configuration or MIRROR."""
    done = subprocess.run([SCRIPTS / "apt-sources", suite], capture_output=True, text=True, check=False)
    if done.returncode:
        message, _, hint = done.stderr.strip().removeprefix("apt-sources: ").partition("\n  hint: ")
        raise PackagingError(message, hint)
    return done.stdout


def locked_sources(mirror: Path, lock: Lock) -> str:
    """deb822 sources of the mirror folder alone. Trusted, because every file in it was compared with the lock."""
    return f"Types: deb\nURIs: file://{mirror}\nSuites: {lock.suite}\nComponents: main\nTrusted: yes\n"


def pins(lock: Lock) -> str:
    """apt preferences; 1001 allows a downgrade, and a version that no source has any more is no error."""
    return "".join(
        f"Package: {package.name}\nPin: version {package.version}\nPin-Priority: 1001\n\n"
        for package in sorted(lock.packages.values())
    )


def configure(folder: Path, sources: str, preferences: str, name: str = "mkosi") -> None:
    """Writes etc/apt below `folder`; sources and preferences of an earlier run go.

    The file is called mkosi.sources for mkosi, whose own would name a debug archive that not every mirror has.
    """
    apt = folder / "etc/apt"
    (apt / "sources.list").unlink(missing_ok=True)
    for each in ("sources.list.d", "preferences.d"):
        shutil.rmtree(apt / each, ignore_errors=True)
        (apt / each).mkdir(parents=True)
    (apt / "apt.conf.d").mkdir(exist_ok=True)
    (apt / f"sources.list.d/{name}.sources").write_text(sources)
    (apt / "preferences.d/locked.pref").write_text(preferences)
    (apt / "apt.conf.d/80retries").write_text('Acquire::Retries "5";\n')
    # image/reproduce skews the clock of mkosi's own programs with files of its own.
    if extra := os.environ.get("AI_ASSISTANT_SANDBOX_TREE"):
        shutil.copytree(extra, folder, dirs_exist_ok=True)
