"""What a build took in, against the lock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from image.packaging.errors import PackagingError
from image.packaging.lock import Lock


@dataclass(frozen=True, order=True)
class Installed:
    """A package in a tree."""

    name: str
    version: str
    architecture: str


def from_manifest(path: Path) -> set[Installed]:
    """The packages of a mkosi JSON manifest."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {
            Installed(str(each["name"]), str(each["version"]), str(each["architecture"]))
            for each in manifest["packages"]
            if each["type"] == "deb"
        }
    except OSError as error:
        raise PackagingError(f"cannot read {path}: {error.strerror}", "make image") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PackagingError(f"{path} is no manifest of mkosi: {error!r}", "image/build --force") from error


def from_tree(tree: Path) -> set[Installed]:
    """The packages that dpkg has installed in a tree."""
    status = tree / "var/lib/dpkg/status"
    try:
        paragraphs = status.read_text(encoding="utf-8", errors="replace").split("\n\n")
    except OSError as error:
        raise PackagingError(f"cannot read {status}: {error.strerror}", "image/toolbox --prepare") from error
    found = set()
    for paragraph in paragraphs:
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status", "").endswith(" installed"):
            found.add(Installed(fields["Package"], fields["Version"], fields["Architecture"]))
    return found


def differences(installed: Iterable[Installed], lock: Lock) -> Iterator[str]:
    """One line for each package that is not as the lock says."""
    for each in sorted(installed):
        locked = lock.packages.get(each.name)
        if locked is None:
            yield f"{each.name} {each.version} is not in the lock"
        elif locked.version != each.version:
            yield f"{each.name} is {each.version}, locked is {locked.version}"
        elif locked.architecture != each.architecture:
            yield f"{each.name} {each.version} is for {each.architecture}, locked is {locked.architecture}"
