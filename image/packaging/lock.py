"""The lock: one line per Debian package, `name version architecture sha256 size pool-path`, sorted by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from image.packaging.errors import BadLock

LOCK = Path(__file__).resolve().parent.parent / "packages.lock"
HEADER = """\
# Every Debian package of the images, their initrds and the tools tree; `make lock` writes this file.
# name version architecture sha256 size(bytes) pool-path
"""
FIELDS = (
    ("name", re.compile(r"[a-z0-9][a-z0-9+.-]+")),
    ("version", re.compile(r"(?:[0-9]+:)?[0-9][A-Za-z0-9.+~-]*")),
    ("architecture", re.compile(r"all|amd64")),
    ("sha256", re.compile(r"[0-9a-f]{64}")),
    ("size", re.compile(r"[1-9][0-9]{0,11}")),
    ("pool path", re.compile(r"pool/(?:[A-Za-z0-9+~%_][A-Za-z0-9.+~%_-]*/)+[A-Za-z0-9][A-Za-z0-9.+~%_-]*\.deb")),
)


@dataclass(frozen=True, order=True)
class Package:
    """One binary package; `path` is relative to an archive's root, `size` is in bytes."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} {self.architecture} {self.sha256} {self.size} {self.path}"


@dataclass(frozen=True)
class Lock:
    """Packages by name; no name is there twice."""

    packages: dict[str, Package]

    @property
    def text(self) -> str:
        return HEADER + "".join(f"{package}\n" for package in sorted(self.packages.values()))

    @property
    def key(self) -> str:
        """Twelve digits that name this set of packages."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def suite(self) -> str:
        """The suite under which a mirror folder offers exactly these packages."""
        return f"locked-{self.key}"

    @property
    def size(self) -> int:
        return sum(package.size for package in self.packages.values())


def parse(text: str, source: str = "lock") -> Lock:
    """Raises BadLock with the line's number."""
    packages: dict[str, Package] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(" ")
        if len(words) != len(FIELDS):
            raise BadLock(f"{source}:{number}: {len(words)} fields, not {len(FIELDS)}", "make lock")
        for (field, pattern), word in zip(FIELDS, words, strict=True):
            if not pattern.fullmatch(word):
                raise BadLock(f"{source}:{number}: bad {field} {word[:80]!r}", "make lock")
        name, version, architecture, sha256, size, path = words
        if name in packages:
            raise BadLock(f"{source}:{number}: {name} is there twice", "make lock")
        packages[name] = Package(name, version, architecture, sha256, int(size), path)
    if not packages:
        raise BadLock(f"{source}: no package in it", "make lock")
    return Lock(packages)


def read(path: Path = LOCK) -> Lock:
    """Raises BadLock when the file is missing, not text, or has a bad line."""
    try:
        return parse(path.read_text(encoding="ascii"), path.name)
    except OSError as error:
        raise BadLock(f"cannot read {path}: {error.strerror}", "make lock") from error
    except UnicodeDecodeError as error:
        raise BadLock(f"{path.name}: not plain text", "git checkout image/packages.lock") from error


def write(packages: Iterable[Package], path: Path = LOCK) -> Lock:
    """Replaces the file in one step, so that a killed run leaves the old one."""
    lock = Lock({package.name: package for package in packages})
    parse(lock.text, path.name)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(lock.text, encoding="ascii")
    partial.replace(path)
    return lock
