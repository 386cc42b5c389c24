"""The models that the daemon knows: those of the image, those that users imported, and transient ones.

A model is a folder ``<models>/<name>/<version>/`` with ``model.gguf`` and ``model.json``. What the header
says of a user's model is kept in ``model.json`` when it is imported, so that a start reads no headers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ai_assistant.daemon.inspection import Inspection, inspect_here
from ai_assistant.engines.contract import LoadOptions, ModelInfo
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.errors import AlreadyExists, InternalError, InvalidArgument, InvalidModel, NoSuchModel, NotSupported

log = logging.getLogger(__name__)

BUILTIN_DIRECTORY = "usr/lib/ai-assistant/models"
MODEL_FILE = "model.gguf"
METADATA_FILE = "model.json"
PARTIAL_PREFIX = ".partial-"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_METADATA_BYTES = 1 << 20


def parse_name(text: str) -> tuple[str, str]:
    """(name, version) of ``name`` or ``name:version``; the version is "1" where none is given.

    Raises:
        InvalidArgument: not a valid name.
    """
    name, colon, version = text.partition(":")
    version = version if colon else "1"
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise InvalidArgument(
            f"{text[:100]!r} is not a valid model name",
            hint="name:version, both of a-z, 0-9, dot, dash and underscore, for example qwen3-0.6b:1",
            param="name",
        )
    return name, version


class OpenFile:
    """A descriptor that is closed once; using it afterwards is an error and never somebody else's file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def duplicate(self) -> int:
        """Raises OSError."""
        if self._fd < 0:
            raise OSError(errno.EBADF, "the model was given up")
        try:
            # A new open file, so that nobody's reading moves the position of anybody else.
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # The daemon may not open this file by itself; whoever passed it could.
            if not _read_only(self._fd):
                raise
            return os.dup(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Entry:
    """One model. `file` is set for transient ones, `path` for all others; `created` in Unix seconds."""

    name: str
    info: ModelInfo
    memory: MemoryShape
    created: int
    path: Path | None = None
    file: OpenFile | None = None
    builtin: bool = False
    sha256: str = ""
    owner: str = ""
    """Bus name of the connection that a transient model belongs to."""
    owner_uid: int = -1
    """User of that connection."""
    options: LoadOptions | None = None
    """How to load it, where that differs from the configuration."""

    @property
    def transient(self) -> bool:
        return self.file is not None

    def visible_to(self, uid: int | None) -> bool:
        """Whether that user may know and use it; None is the daemon itself. What is imported is everybody's."""
        return not self.transient or uid is None or uid in (0, self.owner_uid)

    def open(self) -> int:
        """A new descriptor of the weights, to be closed by the caller.

        Raises:
            InvalidModel: the file has gone or cannot be read.
        """
        try:
            if self.file is not None:
                return self.file.duplicate()
            assert self.path is not None
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise InvalidModel(f"the file of {self.name} cannot be opened: {error.strerror}") from error


def natural(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts 10 after 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", version))


class Registry:
    """All models by full name.

    Args:
        builtin: folder of the image's models.
        state: folder of imported models; made when it is missing.
        options: how models are loaded, for the memory estimate.
    """

    def __init__(self, builtin: Path, state: Path, options: LoadOptions) -> None:
        self.builtin = builtin
        self.state = state
        self.options = options
        self._entries: dict[str, Entry] = {}
        self.problem = ""
        """Why imported models cannot be kept; empty when they can."""

    def scan(self) -> None:
        """Read both folders and remove what interrupted imports left behind. Unusable models are logged."""
        self.problem = ""
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.listdir(self.state)  # noqa: PTH208 - glob below hides what is wrong with the folder
        except OSError as error:
            # What the image brings still answers, and health says what is wrong.
            self.problem = f"imported models cannot be used: {self.state}: {error.strerror}"
            log.error("%s", self.problem)
        for leftover in self.state.glob(PARTIAL_PREFIX + "*"):
            log.warning("removing an interrupted import: %s", leftover.name)
            shutil.rmtree(leftover, ignore_errors=True)
        for directory, builtin in ((self.state, False), (self.builtin, True)):
            for path in sorted(directory.glob(f"*/*/{MODEL_FILE}")):
                name = f"{path.parent.parent.name}:{path.parent.name}"
                try:
                    parse_name(name)
                    entry = self._read(name, path, builtin=builtin)
                except (InvalidArgument, OSError) as error:
                    log.error("cannot use %s: %s", path, error)
                    continue
                if name in self._entries:
                    log.warning("%s is part of the image now; the imported one is not used", name)
                self._entries[name] = entry

    def _read(self, name: str, path: Path, *, builtin: bool) -> Entry:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            metadata = read_metadata(path.parent / METADATA_FILE)
            known = None if builtin else _remembered(metadata, status)
            found = known or inspect_here(fd, self.options)
        finally:
            os.close(fd)
        return Entry(
            name,
            replace(found.info, name=name),
            found.memory,
            int(metadata.get("created", 0)) if isinstance(metadata.get("created", 0), int) else int(status.st_mtime),
            path=path,
            builtin=builtin,
            sha256=str(metadata.get("sha256", "")),
        )

    def all(self) -> list[Entry]:
        """Sorted by name; transient ones last."""
        return sorted(self._entries.values(), key=lambda each: (each.transient, _sort_key(each.name)))

    def get(self, name: str, uid: int | None = None) -> Entry:
        """By full name, or by the bare name of its newest version, for that user (None: the daemon itself).

        A bare name is never a transient model: whoever passed one would answer for the model of that name.

        Raises:
            NoSuchModel
        """
        found = self._entries.get(name)
        if found is None and ":" not in name:
            versions = [
                each for each, entry in self._entries.items() if not entry.transient and each.partition(":")[0] == name
            ]
            if versions:
                found = self._entries[max(versions, key=_sort_key)]
        if found is None or not found.visible_to(uid):
            raise NoSuchModel(f"there is no model {name[:100]!r}", hint="see `ai-assistant model list`", param="model")
        return found

    def directory(self, name: str) -> Path:
        """Where an imported model of that name lies."""
        bare, version = parse_name(name)
        return self.state / bare / version

    def add(self, entry: Entry) -> None:
        """Raises AlreadyExists."""
        if entry.name in self._entries:
            raise AlreadyExists(f"there is already a model {entry.name}")
        self._entries[entry.name] = entry

    def add_transient(
        self,
        fd: int,
        found: Inspection,
        prefix: str,
        owner: str,
        uid: int,
        created: int,
        options: LoadOptions | None = None,
    ) -> Entry:
        """Register a model that lives in `fd`, which now belongs to the registry. Its version cannot be guessed."""
        name = f"{prefix}:t{secrets.token_hex(4)}"
        while name in self._entries:
            name = f"{prefix}:t{secrets.token_hex(4)}"
        entry = Entry(
            name,
            replace(found.info, name=name),
            found.memory,
            created,
            file=OpenFile(fd),
            owner=owner,
            owner_uid=uid,
            options=options,
        )
        self._entries[name] = entry
        return entry

    def remove(self, name: str) -> Path | None:
        """Forget a model. What is left of an imported one is in the folder returned, for the caller to delete.

        Raises:
            NotSupported: it is part of the image.
            NoSuchModel
            InternalError: its folder cannot be moved away; it stays a model.
        """
        entry = self.get(name)
        if entry.builtin:
            raise NotSupported(f"{entry.name} is part of the image and cannot be removed")
        grave: Path | None = None
        if entry.path is not None:
            # The rename makes it one step: a cut leaves either the model or something that scan() removes.
            try:
                grave = self.bury(entry.path.parent)
            except OSError as error:
                raise InternalError(f"{entry.name} cannot be removed: {error.strerror}") from error
        del self._entries[entry.name]
        if entry.file is not None:
            entry.file.close()
        return grave

    def bury(self, folder: Path) -> Path | None:
        """Move a model's folder to where the next `scan` deletes it; None if there is none any more.

        Raises:
            OSError
        """
        grave = self.state / f"{PARTIAL_PREFIX}removed-{secrets.token_hex(8)}"
        try:
            folder.rename(grave)
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # other versions may be left
            folder.parent.rmdir()
        return grave


def _sort_key(name: str) -> tuple[str, tuple[tuple[int, int, str], ...]]:
    bare, _, version = name.partition(":")
    return bare, natural(version)


def read_metadata(path: Path) -> dict[str, Any]:
    """The content of a ``model.json``; empty where it is missing or no JSON object."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_METADATA_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def metadata(found: Inspection, sha256: str, created: int, status: os.stat_result) -> dict[str, Any]:
    """What is written beside an imported model, so that a later start need not read its header."""
    return {
        "created": created,
        "sha256": sha256,
        "memory": found.memory.to_dict(),
        "info": asdict(found.info),
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def _remembered(values: Mapping[str, Any], status: os.stat_result) -> Inspection | None:
    if values.get("size_bytes") != status.st_size or values.get("mtime_ns") != status.st_mtime_ns:
        return None
    try:
        return Inspection(ModelInfo(**values["info"]), MemoryShape.from_dict(values["memory"]))
    except (KeyError, TypeError, ValueError):
        return None


def _read_only(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def check_descriptor(fd: int) -> os.stat_result:
    """Make sure that `fd` is a regular file that can be read, and be given to a worker for reading only.

    Raises:
        InvalidModel: it is something else.
    """
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise InvalidModel(f"the file cannot be used: {error.strerror}", param="file") from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidModel("the descriptor is not a regular file", param="file")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise InvalidModel("the descriptor is not open for reading", param="file")
    if status.st_size == 0:
        raise InvalidModel("the file is empty", param="file")
    if not _read_only(fd):
        try:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            hint = "open the file for reading only"
            raise InvalidModel("the descriptor may write to the file", hint=hint, param="file") from None
    return status
