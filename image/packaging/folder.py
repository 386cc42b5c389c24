"""The mirror folder: every locked file, and an apt repository of exactly one lock's packages inside it.

pool/…                      the .debs, at the paths that the archive has them at
dists/locked-<lock>/…       the index of one lock; several locks may share a folder
python/*.whl, *.tar.gz      the locked Python artifacts
python/<lock>.files         which of them belong to one requirements file
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import lzma
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from image.packaging.errors import BadLock, MirrorIncomplete
from image.packaging.lock import Lock, Package

BLOCK = 1 << 20


def default_folder() -> Path:
    """AI_ASSISTANT_MIRROR, or a folder in the cache."""
    if chosen := os.environ.get("AI_ASSISTANT_MIRROR"):
        return Path(chosen).absolute()
    return cache() / "mirror"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ai-assistant"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fault(folder: Path, package: Package) -> str:
    """What is wrong with one package's file; empty when it is as locked."""
    path = folder / package.path
    try:
        size = path.stat().st_size
        if size != package.size:
            return f"{size} bytes, not {package.size}"
        return "" if sha256(path) == package.sha256 else "its content is not as locked"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or repr(error)


def faults(folder: Path, lock: Lock) -> dict[str, str]:
    """Names of the packages that a folder does not hold as locked, with what is wrong."""
    packages = sorted(lock.packages.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda package: fault(folder, package), packages)
    return {package.name: what for package, what in zip(packages, found, strict=True) if what}


def listed(found: dict[str, str], most: int = 10) -> str:
    """A few of many faults, in words."""
    words = [f"{name} ({what})" for name, what in sorted(found.items())]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def control(path: Path) -> str:
    """The control file of a .deb. Its fields go into the index as the package states them. Raises BadLock."""
    try:
        return _control(path)
    except (ValueError, KeyError, EOFError, tarfile.TarError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BadLock(f"{path.name} is no good Debian package: {error}") from error


def _control(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise BadLock(f"{path.name} is not a Debian package")
        while header := file.read(60):
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            content = file.read(size) if name.startswith("control.tar") else file.seek(size, os.SEEK_CUR) and b""
            file.seek(size % 2, os.SEEK_CUR)
            if not content:
                continue
            match name:
                case "control.tar.xz":
                    content = lzma.decompress(content)
                case "control.tar.gz":
                    content = gzip.decompress(content)
                case "control.tar":
                    pass
                case _:
                    raise BadLock(f"{path.name}: cannot read {name}")
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                member = archive.extractfile("./control")
                assert member is not None
                return member.read().decode("utf-8").strip()
    raise BadLock(f"{path.name} has no control file")


def stanza(folder: Path, package: Package) -> str:
    return (
        f"{control(folder / package.path)}\n"
        f"Filename: {package.path}\nSize: {package.size}\nSHA256: {package.sha256}\n\n"
    )


def _stamp(folder: Path, lock: Lock) -> str:
    """Changes when a file was touched since it was verified."""
    lines = []
    for package in sorted(lock.packages.values()):
        try:
            status = (folder / package.path).stat()
        except OSError:
            return ""
        lines.append(f"{package.path} {status.st_size} {status.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def index(folder: Path, lock: Lock) -> None:
    """Makes the apt repository of one lock; the same lock gives the same bytes.

    Every package is compared with the lock first. Raises MirrorIncomplete, naming what is missing or damaged.
    """
    place = folder / "dists" / lock.suite
    packages, release, marker = place / "main/binary-amd64/Packages", place / "Release", place / ".verified"
    stamp = _stamp(folder, lock)
    with contextlib.suppress(OSError):
        if stamp and packages.exists() and release.exists() and marker.read_text() == stamp:
            return
    if found := faults(folder, lock):
        raise MirrorIncomplete(f"the mirror folder {folder} is not as locked: {listed(found)}", "make mirror")
    text = "".join(stanza(folder, package) for package in sorted(lock.packages.values())).encode()
    digest = hashlib.sha256(text).hexdigest()
    about = (
        f"Origin: ai-assistant\nLabel: ai-assistant\nSuite: {lock.suite}\nCodename: {lock.suite}\n"
        "Date: Thu, 01 Jan 2026 00:00:00 UTC\nArchitectures: amd64\nComponents: main\n"
        f"SHA256:\n {digest} {len(text)} main/binary-amd64/Packages\n"
    ).encode()
    try:
        if _content(packages) != text or _content(release) != about:
            marker.unlink(missing_ok=True)
            packages.parent.mkdir(parents=True, exist_ok=True)
            _replace(packages, text)
            _replace(release, about)
    except OSError as error:
        raise MirrorIncomplete(f"cannot write the index in {place}: {error.strerror}", "make mirror") from error
    # A folder on a read-only medium is hashed at every use.
    with contextlib.suppress(OSError):
        _replace(marker, stamp.encode())


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
