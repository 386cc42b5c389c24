"""Fill the mirror folder with every locked Debian package, from any source that has the right bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from image.packaging.errors import MirrorIncomplete, NoSpace
from image.packaging.folder import BLOCK, fault, faults, listed
from image.packaging.lock import Lock, Package

TIMEOUT_S = 60
AT_ONCE = 8


class Gone(Exception):
    """A source does not have the file."""


class Wrong(Exception):
    """A source gave something else than was locked, or only a part of it."""


@dataclass
class Progress:
    """Counts packages and bytes, and says so now and then."""

    packages: int
    size: int
    say: Callable[[str], None]
    every_s: float = 5.0
    done: int = 0
    got: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last: float = field(default_factory=time.monotonic)

    def add(self, size: int) -> None:
        with self._lock:
            self.done, self.got = self.done + 1, self.got + size
            if time.monotonic() - self._last >= self.every_s or self.done == self.packages:
                self._last = time.monotonic()
                self.say(f"{self.done} of {self.packages} packages, {self.got >> 20} of {self.size >> 20} MiB")


@dataclass(frozen=True)
class Filler:
    """Fetches packages into a folder. `bases` are roots of archives, `seeds` folders of .debs, as apt's cache is."""

    folder: Path
    bases: Sequence[str]
    seeds: Sequence[Path] = ()
    tries: int = 4
    pause_s: float = 2.0
    stop: threading.Event = field(default_factory=threading.Event)

    def fill(self, lock: Lock, say: Callable[[str], None]) -> int:
        """Fetches what is missing or damaged and returns how many that were.

        Raises MirrorIncomplete with the packages that no source has; all others are there then. Raises NoSpace.
        """
        wanted = [lock.packages[name] for name in faults(self.folder, lock)]
        if not wanted:
            return 0
        progress = Progress(len(wanted), sum(package.size for package in wanted), say)
        failed: dict[str, str] = {}

        def one(package: Package) -> None:
            try:
                self.fetch(package)
            except (Gone, Wrong) as error:
                failed[package.name] = f"{package.version}: {error}"
            progress.add(package.size)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for future in wait([pool.submit(one, package) for package in wanted], return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                # What is under way notices; what has not begun never does.
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if failed:
            raise MirrorIncomplete(
                f"no source has {len(failed)} of the locked packages: {listed(failed)}",
                "MIRROR=URL of a mirror that still has them, or make lock UPGRADE=1",
            )
        return len(wanted)

    def fetch(self, package: Package) -> None:
        """One package, under its name only when its hash is right."""
        target = self.folder / package.path
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            reason: Exception = Gone("no archive to ask")
            for origin in self._origins(package):
                try:
                    self._copy(origin, partial, package)
                    partial.replace(target)
                    return
                except (Gone, Wrong) as error:
                    # A wrong content says more than that another source has none.
                    reason = error if isinstance(error, Wrong) or not isinstance(reason, Wrong) else reason
            raise reason
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    f"no space left in {self.folder} for {package.name}", "free some, then run it again"
                ) from error
            raise MirrorIncomplete(
                f"cannot write {target}: {error.strerror}", "is the folder yours to write?"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _origins(self, package: Package) -> Iterator[Path | str]:
        version = package.version.replace(":", "%3a")
        for seed in self.seeds:
            path = seed / f"{package.name}_{version}_{package.architecture}.deb"
            if path.is_file():
                yield path
        for base in self.bases:
            yield f"{base.rstrip('/')}/{urllib.parse.quote(package.path, safe='/+~%')}"

    def _copy(self, origin: Path | str, partial: Path, package: Package) -> None:
        tries = 1 if isinstance(origin, Path) else self.tries
        for number in range(1, tries + 1):
            try:
                with _open(origin) as source:
                    self._write(source, partial, package)
                return
            except Gone:
                raise
            except (Wrong, urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                if number == tries or self.stop.is_set():
                    raise Wrong(str(error)) from error
                self.stop.wait(self.pause_s * number)

    def _write(self, source: BinaryIO, partial: Path, package: Package) -> None:
        digest, size = hashlib.sha256(), 0
        with partial.open("wb") as file:
            while block := source.read(BLOCK):
                if self.stop.is_set():
                    raise Wrong("stopped")
                size += len(block)
                if size > package.size:
                    raise Wrong(f"more than {package.size} bytes")
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if size != package.size:
            raise Wrong(f"{size} bytes, not {package.size}")
        if digest.hexdigest() != package.sha256:
            raise Wrong("its content is not as locked")


@contextlib.contextmanager
def _open(origin: Path | str) -> Iterator[BinaryIO]:
    if isinstance(origin, Path):
        with origin.open("rb") as file:
            yield file
        return
    try:
        with urllib.request.urlopen(origin, timeout=TIMEOUT_S) as answer:  # noqa: S310 - an archive, or a folder of one
            yield answer
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            raise Gone(f"the archive has it no more ({error.code})") from error
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, FileNotFoundError):
            raise Gone("the folder has it not") from error
        raise


def say(line: str) -> None:
    print(f"mirror: {line}", file=sys.stderr, flush=True)


def check(folder: Path, lock: Lock) -> None:
    """Raises MirrorIncomplete, naming what is missing or damaged."""
    if found := faults(folder, lock):
        raise MirrorIncomplete(f"{folder} is not as locked: {listed(found)}", "make mirror")


__all__ = ["Filler", "Progress", "check", "fault", "say"]
