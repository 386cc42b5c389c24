"""Filling the mirror folder from an archive that misbehaves."""

from __future__ import annotations

import errno
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from image.packaging import folder, mirror
from image.packaging.errors import MirrorIncomplete, NoSpace
from image.packaging.lock import Lock
from tests.image.debs import archive

NAMES = ("alpha", "beta", "gamma", "delta")


@dataclass
class Archive:
    """A server of a folder; `faults` are played once each time that a path is asked for, first to last."""

    root: Path
    lock: Lock
    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def misbehave(self, name: str, *faults: str) -> None:
        self.faults[self.lock.packages[name].path] = list(faults)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Archive]:
    root = tmp_path / "archive"
    about = Archive(root, archive(root, *NAMES))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            about.asked.append(path)
            left = about.faults.get(path, [])
            fault = left.pop(0) if left else ""
            file = about.root / path
            if fault == "missing" or not file.is_file():
                self.send_error(404)
                return
            if fault == "busy":
                self.send_error(503)
                return
            content = file.read_bytes()
            if fault == "corrupt":
                content = bytes([content[0] ^ 1]) + content[1:]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-10] if fault == "truncated" else content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        about.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield about
        server.shutdown()


def filler(served: Archive, target: Path, **options: object) -> mirror.Filler:
    return mirror.Filler(target, [served.url], tries=3, pause_s=0, **options)  # type: ignore[arg-type]


def leftovers(target: Path) -> list[Path]:
    return list(target.rglob("*.partial"))


def test_everything_is_fetched_once(served: Archive, tmp_path: Path) -> None:
    target, said = tmp_path / "mirror", list[str]()
    assert filler(served, target).fill(served.lock, said.append) == len(NAMES)
    assert folder.faults(target, served.lock) == {}
    assert said[-1].startswith("4 of 4 packages")
    asked = len(served.asked)
    assert filler(served, target).fill(served.lock, said.append) == 0
    assert len(served.asked) == asked


@pytest.mark.parametrize("fault", ["corrupt", "truncated", "busy"])
def test_a_hiccup_is_tried_again(served: Archive, tmp_path: Path, fault: str) -> None:
    served.misbehave("beta", fault, fault)
    assert filler(served, tmp_path / "mirror").fill(served.lock, print) == len(NAMES)
    assert folder.faults(tmp_path / "mirror", served.lock) == {}


def test_what_is_damaged_in_the_folder_is_fetched_again(served: Archive, tmp_path: Path) -> None:
    target = tmp_path / "mirror"
    filler(served, target).fill(served.lock, print)
    (target / served.lock.packages["alpha"].path).write_bytes(b"short")
    flipped = bytearray((target / served.lock.packages["gamma"].path).read_bytes())
    flipped[20] ^= 0x80
    (target / served.lock.packages["gamma"].path).write_bytes(flipped)
    with pytest.raises(MirrorIncomplete, match=r"alpha \(5 bytes, not \d+\), gamma \(its content is not as locked\)"):
        mirror.check(target, served.lock)
    assert filler(served, target).fill(served.lock, print) == 2
    mirror.check(target, served.lock)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [("missing", "no more"), ("corrupt", "not as locked"), ("truncated", "bytes"), ("busy", "503")],
)
def test_what_no_archive_has_is_named_and_the_rest_is_there(
    served: Archive, tmp_path: Path, fault: str, complaint: str
) -> None:
    served.misbehave("gamma", *[fault] * 10)
    target = tmp_path / "mirror"
    with pytest.raises(MirrorIncomplete, match=rf"1 of the locked packages: gamma \(1:2\.2-1: .*{complaint}"):
        filler(served, target).fill(served.lock, print)
    assert folder.faults(target, served.lock) == {"gamma": "missing"}
    assert leftovers(target) == []


def test_another_source_helps_out(served: Archive, tmp_path: Path) -> None:
    served.misbehave("gamma", *["missing"] * 10)
    shipped = tmp_path / "shipped"
    archive(shipped, *NAMES)
    sources = [served.url, shipped.as_uri()]
    mirror.Filler(tmp_path / "mirror", sources, tries=1, pause_s=0).fill(served.lock, print)
    mirror.check(tmp_path / "mirror", served.lock)


def test_a_package_that_apt_has_fetched_already_is_not_fetched(served: Archive, tmp_path: Path) -> None:
    seed = tmp_path / "archives"
    seed.mkdir()
    for name in ("alpha", "beta"):
        content = (served.root / served.lock.packages[name].path).read_bytes()
        number = NAMES.index(name)
        # The second is damaged there, and comes from the archive then.
        (seed / f"{name}_1%3a2.{number}-1_all.deb").write_bytes(content if name == "alpha" else content[:-1])
    filler(served, tmp_path / "mirror", seeds=[seed]).fill(served.lock, print)
    mirror.check(tmp_path / "mirror", served.lock)
    assert served.lock.packages["alpha"].path not in served.asked
    assert served.lock.packages["beta"].path in served.asked


def test_a_full_disk_is_named_and_leaves_the_folder_usable(
    served: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "mirror", mirror.Filler._write

    def full(self: mirror.Filler, source: IO[bytes], partial: Path, package: object) -> None:
        if partial.name.startswith(".gamma"):
            partial.write_bytes(b"some")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, source, partial, package)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(mirror.Filler, "_write", full)
        with pytest.raises(NoSpace, match=r"no space left in .* for gamma"):
            filler(served, target).fill(served.lock, print)
    assert leftovers(target) == []
    filler(served, target).fill(served.lock, print)
    mirror.check(target, served.lock)


def test_an_interrupt_leaves_the_folder_usable(
    served: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mirror"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            filler(served, target).fill(served.lock, print)
    assert leftovers(target) == []
    filler(served, target).fill(served.lock, print)
    mirror.check(target, served.lock)
