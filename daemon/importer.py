"""Copies a model that came as a descriptor into the appliance: all of it or nothing.

The copy is written into a hidden folder, checked, synced, and renamed into place as one step. A cancelled
import removes that folder; after a crash `Registry.scan` does.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ai_assistant.daemon.inspection import Inspection, inspect
from ai_assistant.daemon.registry import (
    METADATA_FILE,
    MODEL_FILE,
    PARTIAL_PREFIX,
    Entry,
    Registry,
    metadata,
)
from ai_assistant.errors import AIAssistantError, AlreadyExists, Cancelled, InvalidModel, NoSpace

log = logging.getLogger(__name__)

_T = TypeVar("_T")

CHUNK_BYTES = 1 << 20
# A pool of its own: a file that cannot be read in time holds up imports, not the daemon.
_pool = ThreadPoolExecutor(4, thread_name_prefix="import")


@dataclass(frozen=True, slots=True)
class Source:
    """The file to import, as it was when it was checked. The descriptor belongs to whoever made this."""

    fd: int
    found: Inspection
    status: os.stat_result

    def check_unchanged(self) -> None:
        """Raises InvalidModel when the file is not what was checked any more."""
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise InvalidModel("the file changed while it was read", hint="import it again when it is complete")


def check_space(directory: Path, needed: int, reserve: int) -> None:
    """Raises NoSpace, with the numbers, when `needed` bytes would not leave `reserve` free."""
    directory.mkdir(parents=True, exist_ok=True)  # another disk may have been mounted over the state
    free = shutil.disk_usage(directory).free
    if needed + reserve > free:
        raise NoSpace(
            f"the model has {needed} bytes; {free} bytes are free, of which {reserve} stay free",
            hint="remove a model",
        )


async def copy_in(
    registry: Registry,
    name: str,
    source: Source,
    reserve_bytes: int,
    progress: Callable[[float], None],
    *,
    take: Path | None = None,
    expected_sha256: str = "",
) -> Entry:
    """Copy `source` into the registry as `name` and return its entry.

    Args:
        progress: called on the event loop with 0–1, a few times a second.
        take: `source` itself, a file of the daemon's own that nobody writes to: it is not copied where the disk allows.
        expected_sha256: what the file must be, in hex; empty: anything.

    Raises:
        AlreadyExists: there is another content under that name.
        InvalidModel: the file changed, or the copy is not what was checked.
        NoSpace: the disk filled up.
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def report(value: float) -> None:
        loop.call_soon_threadsafe(progress, value)

    async def run(work: Callable[[], _T]) -> _T:
        future = loop.run_in_executor(_pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The thread must be out of the file before anything is removed or closed.
            stop.set()
            await asyncio.wait([future])
            future.exception()
            raise

    existing = next((each for each in registry.all() if each.name == name), None)
    if existing is not None:
        digest = await run(lambda: _digest(source, stop, report))
        return same_or_raise(existing, digest, source.status.st_size)
    check_space(registry.state, 0 if take else source.status.st_size, reserve_bytes)
    partial = registry.state / f"{PARTIAL_PREFIX}{os.urandom(16).hex()}"
    try:
        partial.mkdir(mode=0o700)
        copy = partial / MODEL_FILE
        if take is not None and await run(lambda: _link(take, copy)):
            digest = await run(lambda: _digest(source, stop, report))
        else:
            digest = await run(lambda: _copy(source, copy, reserve_bytes, stop, report))
        if expected_sha256 not in ("", digest):
            raise InvalidModel(f"the file's hash is {digest[:16]}… instead of {expected_sha256[:16]}…")
        return await _finish(registry, name, source, partial, digest)
    except OSError as error:
        raise _named(error) from error
    finally:
        if os.path.lexists(partial):  # noqa: ASYNC240 - no waiting once it is a model: a cancellation would hide it
            # Gigabytes take a while to delete, and a second cancellation does not stop it.
            await asyncio.shield(loop.run_in_executor(_pool, _delete, partial))


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


async def _finish(registry: Registry, name: str, source: Source, partial: Path, digest: str) -> Entry:
    file = partial / MODEL_FILE
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # What is stored is checked, not what was looked at before it was copied.
        found = await inspect(fd, registry.options)
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if found != source.found:
        raise InvalidModel("the file changed while it was read", hint="import it again when it is complete")
    created = int(time.time())
    values = metadata(found, digest, created, status)
    await asyncio.get_running_loop().run_in_executor(_pool, _write_json, partial, values)
    target = registry.directory(name)
    # From here on nothing waits, so two imports of the same name cannot meet.
    existing = next((each for each in registry.all() if each.name == name), None)
    if existing is not None:
        return same_or_raise(existing, digest, status.st_size)
    grave = _place(registry, partial, target)
    entry = Entry(
        name,
        replace(found.info, name=name),
        found.memory,
        created,
        path=target / MODEL_FILE,
        sha256=digest,
    )
    registry.add(entry)
    _sync(target.parent)
    _sync(registry.state)
    if grave is not None:
        # Not waited for: a cancellation here would leave a model that nobody was told of.
        asyncio.get_running_loop().run_in_executor(_pool, _delete, grave)
    return entry


def _place(registry: Registry, partial: Path, target: Path) -> Path | None:
    """Rename the copy to where it belongs; the folder that was in the way, if any, for the caller to delete."""
    # What lies there and is no model, `scan` could not use: it would be in the way for ever.
    grave = registry.bury(target) if os.path.lexists(target) else None
    if grave is not None:
        log.warning("replacing a folder that is no usable model: %s", target)
    target.parent.mkdir(mode=0o700, exist_ok=True)
    partial.rename(target)
    return grave


def same_or_raise(existing: Entry, digest: str, size: int) -> Entry:
    """The entry, if it has the same content: importing twice is no error.

    Raises:
        AlreadyExists
    """
    if existing.sha256 == digest and existing.info.size_bytes == size:
        return existing
    raise AlreadyExists(
        f"there is already another model {existing.name}", hint="choose another name or version", param="name"
    )


def _digest(source: Source, stop: threading.Event, report: Callable[[float], None]) -> str:
    return _pass(source, stop, report, lambda piece: None)


def _link(file: Path, path: Path) -> bool:
    """Make `path` the same file; False where that cannot be, as over the border of a file system."""
    try:
        os.link(file, path, follow_symlinks=False)
    except OSError:
        return False
    return True


def _copy(source: Source, path: Path, reserve: int, stop: threading.Event, report: Callable[[float], None]) -> str:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    since_check = 0

    def write(piece: memoryview) -> None:
        nonlocal since_check
        since_check += len(piece)
        if since_check >= 256 * CHUNK_BYTES:
            # Others write too: stop before the reserve is gone, not after.
            since_check = 0
            check_space(path.parent, 0, reserve)
        while piece:
            piece = piece[os.write(fd, piece) :]

    try:
        digest = _pass(source, stop, report, write)
        os.fsync(fd)
    except OSError as error:
        raise _named(error) from error
    finally:
        os.close(fd)
    return digest


def _pass(
    source: Source, stop: threading.Event, report: Callable[[float], None], use: Callable[[memoryview], None]
) -> str:
    """Read the file once, in order; SHA-256 in hex."""
    digest = hashlib.sha256()
    size = source.status.st_size
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    offset = 0
    told = time.monotonic()
    while offset < size:
        if stop.is_set():
            raise Cancelled("the import was cancelled")
        # pread, because the position belongs to the caller's open file as well.
        count = os.preadv(source.fd, [view[: min(CHUNK_BYTES, size - offset)]], offset)
        if count == 0:
            break
        piece = view[:count]
        digest.update(piece)
        use(piece)
        offset += count
        now = time.monotonic()
        if now - told > 0.25:
            told = now
            report(offset / size)
    source.check_unchanged()
    if offset != size:
        raise InvalidModel("the file changed while it was read", hint="import it again when it is complete")
    return digest.hexdigest()


def _write_json(partial: Path, values: dict[str, object]) -> None:
    path = partial / METADATA_FILE
    with open(path, "x", encoding="utf-8", opener=_private) as file:
        json.dump(values, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _named(error: OSError) -> AIAssistantError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("the disk is full", hint="remove a model")
    if error.errno == errno.EFBIG:
        return NoSpace("the file is larger than the file system can hold")
    return InvalidModel(f"the file cannot be copied: {error.strerror}")
