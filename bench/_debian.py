"""Packages of Debian for any architecture, with a state of APT that is nobody else's.

APT resolves and downloads for an architecture that need not be this machine's, from this machine's own sources
(`image/apt-sources`) and with its proxy, and checks signatures with Debian's keyring. Nothing is configured and no
package's script runs: `dpkg-deb -x` unpacks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

from ai_assistant.errors import AIAssistantError, BackendFailed, DownloadFailed, NoSpace, NotSupported
from bench import _children
from bench.harness import note

CHECKOUT = Path(__file__).resolve().parent.parent
SUITE = "trixie"
_FORMAT = 2
_FIRST = "base-files"
"""It brings the links of a merged /usr, which others unpack through."""
_CONFIGURATION = """\
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
Dir::Cache::archives "archives/";
Dir::Etc::sourcelist "{folder}/debian.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
"""


_TYPES = {"since": str, "seconds": dict, "bytes": dict, "done": list, "open": str}


class Ledger:
    """What downloads took, kept beside them: a second run downloads nothing and still says what the first one took.

    A step that was stopped counts what it took until then, since the next try goes on with what is there. One that
    was killed counts nothing, so `trusted` is false then and the download starts anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {name: kind() for name, kind in _TYPES.items()}
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict) and {name: type(each) for name, each in found.items()} == _TYPES:
            self.values = found
        else:
            self.values["open"] = "unreadable"

    @property
    def trusted(self) -> bool:
        return not self.values["open"]

    def done(self, step: str) -> bool:
        return step in self.values["done"]

    def seconds(self, step: str) -> float:
        return float(self.values["seconds"].get(step, 0.0))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        self.values["since"] = self.values["since"] or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        self.values["open"] = step
        self._save()
        begin = time.monotonic()
        try:
            yield
            self.values["done"].append(step)
        finally:
            self.values["seconds"][step] = self.seconds(step) + time.monotonic() - begin
            self.values["open"] = ""
            self._save()

    def _save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values))
        partial.replace(self._path)


@dataclass(frozen=True, slots=True)
class Packages:
    """Packages with everything they need, in a folder of their own.

    Args:
        architecture: Debian's name of it: amd64, arm64.
    """

    architecture: str
    names: tuple[str, ...]
    cache: Path

    @property
    def folder(self) -> Path:
        text = json.dumps([_FORMAT, SUITE, self.architecture, sorted(self.names)])
        return self.cache / f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def files(self) -> list[Path]:
        """What was downloaded, the package of the base's links first."""
        found = (self.folder / "cache/archives").glob("*.deb")
        return sorted(found, key=lambda each: (not each.name.startswith(f"{_FIRST}_"), each.name))

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.json")

    @property
    def bytes(self) -> dict[str, int]:
        """Downloaded: the archive's index and the packages."""
        index = int(self.ledger.values["bytes"].get("index", 0))
        return {"index": index, "packages": sum(each.stat().st_size for each in self.files)}

    def download(self) -> None:
        """Have everything there. Goes on where it was stopped; nothing is asked of the network when all is there.

        Raises:
            DownloadFailed, NotSupported, NoSpace: the archive cannot be reached, lacks a package, the disk is full.
        """
        if self.folder.exists() and not self.ledger.trusted:
            note(f"{self.architecture}: an earlier download was killed half-way; it starts anew")
            self.forget()
        for each in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / each).mkdir(parents=True, exist_ok=True)
        (self.folder / "state/status").touch()
        (self.folder / "apt.conf").write_text(_CONFIGURATION.format(architecture=self.architecture, folder=self.folder))
        ledger = self.ledger
        if not ledger.done("index"):
            (self.folder / "debian.sources").write_text(_sources(self.architecture))
            note(f"{self.architecture}: reading the archive's index")
            with ledger.timed("index"):
                ledger.values["bytes"]["index"] = fetched(self._apt("update"))
        install = ("--yes", "--download-only", "install", *self.names)
        sizes = wanted(self._apt("--print-uris", *install))
        missing = {name: size for name, size in sizes.items() if not self._is_there(name, size)}
        if missing:
            note(f"{self.architecture}: {len(missing)} packages, {sum(missing.values()) / 1e6:.1f} MB to download")
            before = self.bytes["packages"]
            progress = _progress(self.architecture, self.folder / "cache/archives", before + sum(missing.values()))
            with ledger.timed("packages"):
                self._apt(*install, watch=progress)

    def forget(self) -> None:
        """The folder is gone: the next download is a first one."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def unpack(self, root: Path) -> None:
        """Every package's files into a folder.

        Raises:
            NoSpace, BackendFailed: a package cannot be unpacked.
        """
        for each in self.files:
            done = _children.run(["dpkg-deb", "--extract", each, root])
            if done.status:
                raise _failure(self.architecture, done.error) or BackendFailed(
                    f"{each.name} cannot be unpacked: {done.error.strip()[-200:]}", hint="--fresh downloads it again"
                )
        _alternatives(root)

    def extract(self, package: str, member: str, target: Path) -> None:
        """One file of one package.

        Args:
            member: its path in the package without the first slash.

        Raises:
            NotSupported: the package has no such file.
        """
        for each in self.files:
            if each.name.startswith(f"{package}_") and _extract(each, member, target):
                return
        raise NotSupported(f"the package {package} has no {member}", hint="--fresh downloads it again")

    def _is_there(self, name: str, size: int) -> bool:
        path = self.folder / "cache/archives" / name
        return path.is_file() and path.stat().st_size == size

    def _apt(self, *arguments: str, watch: Callable[[], None] | None = None) -> str:
        command = ["apt-get", "-c", str(self.folder / "apt.conf"), "-q", *arguments]
        done = _children.run(command, environment=os.environ | {"LC_ALL": "C.UTF-8"}, watch=watch)
        if done.status:
            errors = [line for line in done.error.splitlines() if line.startswith("E:")]
            raise _failure(self.architecture, done.error) or DownloadFailed(
                f"{self.architecture}: apt-get {arguments[0].lstrip('-')} failed: "
                + " ".join(errors or [f"status {done.status}"])[:400],
                hint="see whether the network works, and the machine's own `apt-get update`; what came is kept",
            )
        return done.output


def _extract(package: Path, member: str, target: Path) -> bool:
    """Whether the package has that file; it is written then."""
    try:
        with (
            Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=PIPE, stderr=DEVNULL) as child,
            tarfile.open(fileobj=child.stdout, mode="r|") as archive,
        ):
            for info in archive:
                if info.name.removeprefix("./") == member and info.isreg():
                    source = archive.extractfile(info)
                    assert source is not None
                    with target.open("wb") as out:
                        shutil.copyfileobj(source, out)
                    target.chmod(0o755)
                    # What follows is of no use, and may be half a gigabyte.
                    child.kill()
                    return True
    except tarfile.TarError:
        return False
    return False


def wanted(text: str) -> dict[str, int]:
    """The names and sizes in what `apt-get --print-uris` prints."""
    return {name: int(size) for name, size in re.findall(r"^'[^']+' (\S+\.deb) (\d+)(?: \S*)?$", text, re.MULTILINE)}


def fetched(text: str) -> int:
    """Bytes that APT says it has transferred; it gives three figures. 0 where it says nothing."""
    found = re.search(r"^Fetched ([\d.,]+) ?([kMG]?)B in ", text, re.MULTILINE)
    if not found:
        return 0
    return round(float(found[1].replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]])


def _sources(architecture: str) -> str:
    done = _children.run([CHECKOUT / "image/apt-sources", SUITE])
    if done.status:
        first, _, hint = done.error.strip().partition("\n  hint: ")
        raise DownloadFailed(first, hint=hint)
    # The machine's own architecture is asked for otherwise, and its index downloaded too.
    return re.sub(r"^Types:", f"Architectures: {architecture}\nTypes:", done.output, flags=re.MULTILINE)


def _failure(architecture: str, text: str) -> AIAssistantError | None:
    """What somebody can do something about, as an error of its own."""
    if "No space left on device" in text or "don't have enough free space" in text:
        return NoSpace(f"{architecture}: the disk is full", hint="make room, or set XDG_CACHE_HOME to another disk")
    if found := re.search(r"Unable to locate package (\S+)|Package '?([^ ']+)'? has no installation candidate", text):
        name = found[1] or found[2]
        return NotSupported(f"{architecture}: Debian {SUITE} has no package {name}", hint="its name has changed?")
    if re.search(r"\b404\b", text):
        return NotSupported(
            f"{architecture}: a package is no longer in the archive", hint="--fresh reads the archive's index again"
        )
    if "NO_PUBKEY" in text or "not signed" in text:
        return DownloadFailed(
            f"{architecture}: the archive's signature cannot be checked", hint="apt-get install debian-archive-keyring"
        )
    return None


def _progress(name: str, folder: Path, total: int) -> Callable[[], None]:
    told = [time.monotonic()]

    def watch() -> None:
        if time.monotonic() - told[0] < 5:
            return
        told[0] = time.monotonic()
        have = 0
        for each in (*folder.glob("*.deb"), *folder.glob("partial/*")):
            with_size = each.stat() if each.exists() else None
            have += with_size.st_size if with_size else 0
        note(f"{name}: {have / 1e6:.0f} of {total / 1e6:.0f} MB")

    return watch


def _alternatives(root: Path) -> None:
    """The links that the scripts of libblas3 and liblapack3 would make."""
    for name in ("blas", "lapack"):
        for library in root.glob(f"usr/lib/*/{name}/lib{name}.so.3"):
            link = library.parent.parent / library.name
            if not link.is_symlink():
                link.symlink_to(library.relative_to(link.parent))
