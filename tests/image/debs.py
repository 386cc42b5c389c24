"""Small Debian packages for tests, made from deb(5)."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from pathlib import Path

from image.packaging.lock import Lock, Package


def member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def deb(name: str, version: str, architecture: str = "all", depends: str = "", filler: int = 0) -> bytes:
    control = f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: Nobody <n@example.org>\n"
    control += (f"Depends: {depends}\n" if depends else "") + "Description: for a test\n"
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        entry = tarfile.TarInfo("./control")
        entry.size = len(control)
        archive.addfile(entry, io.BytesIO(control.encode()))
    data = b"x" * filler
    return (
        b"!<arch>\n"
        + member("debian-binary", b"2.0\n")
        + member("control.tar.xz", lzma.compress(raw.getvalue()))
        + member("data.tar", data)
    )


def package(name: str, version: str, content: bytes, architecture: str = "all") -> Package:
    path = f"pool/main/{name[0]}/{name}/{name}_{version.split(':')[-1]}_{architecture}.deb"
    return Package(name, version, architecture, hashlib.sha256(content).hexdigest(), len(content), path)


def archive(root: Path, *names: str) -> Lock:
    """An archive of a few packages below `root`, and the lock of them."""
    packages = {}
    for number, name in enumerate(names):
        content = deb(name, f"1:2.{number}-1", filler=100 + number)
        packages[name] = package(name, f"1:2.{number}-1", content)
        path = root / packages[name].path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Lock(packages)
