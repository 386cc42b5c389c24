"""The locked Python artifacts in the mirror folder: what pip would fetch here for each requirements file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from image.packaging.errors import MirrorIncomplete
from image.packaging.folder import cache, listed, sha256

CHECKOUT = Path(__file__).resolve().parent.parent.parent
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})\b")


@dataclass(frozen=True)
class Requirements:
    """One requirements file and the pip that takes what it means for the Python it is used with."""

    name: str
    pip: tuple[str, ...]
    options: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return CHECKOUT / "requirements" / f"{self.name}.txt"

    @property
    def hashes(self) -> frozenset[str]:
        return frozenset(HASH.findall(self.path.read_text(encoding="utf-8")))

    def listing(self, folder: Path) -> Path:
        """The list of this lock's files."""
        key = hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]
        return folder / "python" / f"{self.name}-{key}.files"


def all_requirements() -> list[Requirements]:
    """The engine's source, the tests' packages in the tools tree, and those of `make check` on this host."""
    toolbox = (str(CHECKOUT / "image/toolbox"), "pip")
    check = CHECKOUT / "requirements/check.txt"
    venv = cache() / f"venv-{hashlib.sha256(check.read_bytes()).hexdigest()[:12]}"
    return [
        Requirements("engine", toolbox, ("--no-binary", "llama-cpp-python")),
        Requirements("test", toolbox),
        Requirements(
            "check", (str(venv / "bin/pip"),), (), (str(CHECKOUT / "requirements/venv"), str(venv), str(check))
        ),
    ]


def faults(folder: Path, requirements: Sequence[Requirements]) -> dict[str, str]:
    """What is missing or damaged, by file."""
    found: dict[str, str] = {}
    for each in requirements:
        try:
            names = each.listing(folder).read_text().split()
        except OSError:
            found[each.path.name] = "not fetched"
            continue
        for name in names or [each.path.name]:
            path = folder / "python" / Path(name).name
            if not path.is_file():
                found[name] = "missing"
            elif sha256(path) not in each.hashes:
                found[name] = "its content is not as locked"
    return found


def check(folder: Path, requirements: Sequence[Requirements]) -> None:
    """Raises MirrorIncomplete, naming what is missing or damaged."""
    if found := faults(folder, requirements):
        raise MirrorIncomplete(f"{folder} is not as locked: {listed(found)}", "make mirror")


def fetch(folder: Path, each: Requirements) -> int:
    """Fetches one requirements file's artifacts, unless they are all there; returns how many there are."""
    if not faults(folder, [each]):
        return 0
    place = folder / "python"
    partial = place / f".{each.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if each.prepare and subprocess.run(each.prepare, check=False).returncode:
            raise MirrorIncomplete(f"cannot prepare the pip for {each.path.name}", "run it again")
        command = [*each.pip, "--quiet", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, *each.options, "-r", str(each.path), "-d", str(partial)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PIP_RETRIES": "5"},
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            raise MirrorIncomplete(f"cannot fetch {each.path.name}: {last[0][:300]}", "run it again")
        names = []
        for path in sorted(partial.iterdir()):
            if sha256(path) not in each.hashes:
                raise MirrorIncomplete(f"pip gave {path.name}, which {each.path.name} does not lock", "make lock")
            path.replace(place / path.name)
            names.append(path.name)
        listing = each.listing(folder)
        listing.with_suffix(".partial").write_text("".join(f"{name}\n" for name in names))
        listing.with_suffix(".partial").replace(listing)
        return len(names)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
