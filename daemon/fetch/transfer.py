"""One file from a server into an open file, resumed as often as it takes.

What the file already holds is hashed and continued with ``Range``; what cannot be proved to continue is begun anew.
A transfer ends with the right size and hash or with a named error, and what has come stays for the next attempt unless
it is wrong.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ai_assistant.daemon.fetch.web import Answer, TryAgain, Web
from ai_assistant.errors import AIAssistantError, DownloadFailed, NoSpace

RESUMES = "run it again: it goes on where it stopped"
_CHUNK = 1 << 20
_SYNC_EVERY = 64 << 20
_PROGRESS_BYTES = 64 << 10
"""An attempt that brought at least so much was not in vain: the count of failures begins anew."""
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A file. Hashes in hex, empty where unknown; `size_bytes` -1 where unknown."""

    url: str
    size_bytes: int = -1
    sha256: str = ""
    git_sha1: str = ""
    max_bytes: int = 1 << 60
    """It may not become larger than this: the room that there is."""
    validator: str = ""
    """A strong ETag of an earlier part, for files without a known hash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How failures are met. Times in seconds, rates in bytes a second."""

    attempts: int = 8
    """Failures in a row, without progress in between."""
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_ask_s: float = 300.0
    """A server that asks for a longer pause (Retry-After) is not waited for."""
    stall_s: float = 60.0
    least_rate: float = 1024.0
    """Slower than this over `stall_s` is as good as standing still."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What is in the file now."""

    size_bytes: int
    sha256: str


@dataclass(slots=True)
class _State:
    fd: int
    want: Want
    have: int = 0
    total: int = -1
    sha256: Any = field(default_factory=hashlib.sha256)
    expected: str = ""
    """SHA-256 that the listing or the first host promised."""
    validator: str = ""
    unsynced: int = 0

    def begin_anew(self) -> None:
        os.ftruncate(self.fd, 0)
        self.have = 0
        self.sha256 = hashlib.sha256()
        self.validator = ""


Report = Callable[[dict[str, Any]], None]


def transfer(
    web: Web,
    want: Want,
    fd: int,
    report: Report,
    patience: Patience,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Fetched:
    """Fetch until the file is complete and right.

    Args:
        fd: open for reading and writing; it may hold the beginning.
        report: told {"bytes", "total"} a few times a second, {"retry": why, "wait_s"} before a pause, and
            {"validator": ETag} when one is known.

    Raises:
        NoSuchModel, NotAuthorized: the server says so.
        NoSpace: it is larger than `max_bytes`, or the disk is full.
        DownloadFailed: everything else; where it helps, the hint says that the next attempt goes on.
    """
    state = _State(fd, want, expected=want.sha256, validator=want.validator)
    _read_part(state, report)
    resumed = state.have > 0
    while True:
        resumed = _fetch(web, state, report, patience, sleep, clock) or resumed
        wrong = _wrong(state)
        if not wrong:
            os.fsync(fd)
            return Fetched(state.have, state.sha256.hexdigest())
        state.begin_anew()
        if not resumed:
            raise DownloadFailed(wrong, hint="nothing of it was kept; the source is damaged or was exchanged")
        # The beginning was of another file, or a power cut damaged it: once more, from the start.
        resumed = False
        report({"retry": wrong, "wait_s": 0.0})


def _fetch(
    web: Web,
    state: _State,
    report: Report,
    patience: Patience,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> bool:
    """Until everything is there; whether it took more than one connection."""
    failures = 0
    connections = 0
    while state.total < 0 or state.have < state.total:
        if state.want.size_bytes >= 0 and state.have == state.want.size_bytes and connections == 0:
            break  # The earlier part is all of it.
        before = state.have
        connections += 1
        try:
            if _attempt(web, state, report, patience, clock):
                break
        except TryAgain as again:
            failures = 1 if state.have - before >= _PROGRESS_BYTES else failures + 1
            asked = again.after_s or 0.0
            if failures >= patience.attempts or asked > patience.longest_ask_s:
                hint = RESUMES if state.have else again.error.hint
                hint += f"; it asks to wait {asked:.0f} s" if asked else ""
                raise type(again.error)(again.error.message, hint=hint) from again
            wait = min(patience.first_wait_s * 2 ** (failures - 1), patience.longest_wait_s)
            # Many appliances that lost the same server should not come back in the same second.
            wait = max(wait * random.uniform(0.8, 1.2), asked)
            report({"retry": again.error.message, "wait_s": round(wait, 1)})
            sleep(wait)
    return connections > 1


def _attempt(web: Web, state: _State, report: Report, patience: Patience, clock: Callable[[], float]) -> bool:
    """One connection; True when the end of the file is known to have come."""
    want = state.want
    headers = {}
    proved = bool(state.expected or want.git_sha1)
    if state.have and not proved and not state.validator:
        state.begin_anew()
    if state.have:
        headers["Range"] = f"bytes={state.have}-"
        if not proved:
            headers["If-Range"] = state.validator
    with web.open(want.url, headers) as answer:
        state.expected = state.expected or answer.linked_sha256
        if not _begin(state, answer, report):
            return True
        _check_size(state, answer)
        _read(state, answer, report, patience, clock)
    if state.total < 0:
        state.total = state.have  # A body without a length ends with its connection.
    if state.have < state.total:
        raise TryAgain(DownloadFailed(f"{answer.host} ended after {state.have} of {state.total} bytes"))
    return True


def _begin(state: _State, answer: Answer, report: Report) -> bool:
    """Look at how the server answers the range; False when nothing is left to read."""
    response = answer.response
    if response.status_code == 416:
        known = state.want.size_bytes
        if known >= 0 and state.have == known:
            state.total = known
            return False
        state.begin_anew()
        raise TryAgain(DownloadFailed(f"{answer.host} has no such part of the file"))
    length = response.headers.get("content-length", "")
    if response.status_code == 206:
        found = _RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if found is None or int(found[1]) != state.have or not state.have:
            state.begin_anew()
            raise TryAgain(DownloadFailed(f"{answer.host} sends another part than was asked for"))
        state.total = int(found[3]) if found[3] != "*" else state.want.size_bytes
        # Only what was announced counts; a body that ends earlier is asked for again.
        if state.total < 0:
            state.total = int(found[2]) + 1
    else:
        if state.have:
            state.begin_anew()  # It does not know ranges, or the file has changed.
        state.total = int(length) if length.isdecimal() and len(length) < 19 else -1
    etag = response.headers.get("etag", "").strip()
    if etag and not etag.startswith("W/") and len(etag) <= 256 and etag.isprintable() and etag != state.validator:
        state.validator = etag
        report({"validator": etag})
    return True


def _check_size(state: _State, answer: Answer) -> None:
    known, total = state.want.size_bytes, state.total
    if 0 <= known != total and total >= 0:
        state.begin_anew()
        raise DownloadFailed(f"{answer.host} sends {total} bytes, but the file has {known}")
    if max(known, total) > state.want.max_bytes:
        raise NoSpace(
            f"the model has {max(known, total)} bytes; there is room for {state.want.max_bytes}", hint="remove a model"
        )


def _read(state: _State, answer: Answer, report: Report, patience: Patience, clock: Callable[[], float]) -> None:
    limit = state.total if state.total >= 0 else max(state.want.size_bytes, -1)
    limit = limit if limit >= 0 else state.want.max_bytes
    window, window_from = state.have, clock()
    told = -1.0
    for piece in answer.response.iter_raw():
        if state.have + len(piece) > limit:
            if limit == state.want.max_bytes:
                raise NoSpace(f"the model is larger than {limit} bytes, the room that there is", hint="remove a model")
            raise DownloadFailed(f"{answer.host} sends more than the {limit} bytes that it announced")
        _write(state, piece)
        now = clock()
        if now - told >= 0.25:
            told = now
            report({"bytes": state.have, "total": state.total})
        if now - window_from >= patience.stall_s:
            if state.have - window < patience.least_rate * patience.stall_s:
                raise TryAgain(DownloadFailed(f"{answer.host} sends next to nothing"))
            window, window_from = state.have, now
    report({"bytes": state.have, "total": state.total})


def _write(state: _State, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        try:
            count = os.pwrite(state.fd, view, state.have)
        except OSError as error:
            raise _disk(error) from error
        state.sha256.update(view[:count])
        state.have += count
        state.unsynced += count
        view = view[count:]
    if state.unsynced >= _SYNC_EVERY:
        # A power cut must not cost more than this, and a flush at the end would take minutes.
        state.unsynced = 0
        os.fdatasync(state.fd)


def _read_part(state: _State, report: Report) -> None:
    """Hash what is there, or drop it if it cannot be a beginning."""
    size = os.fstat(state.fd).st_size
    known = state.want.size_bytes
    if size > (known if known >= 0 else state.want.max_bytes):
        state.begin_anew()
        return
    told = 0.0
    while state.have < size:
        piece = os.pread(state.fd, min(_CHUNK, size - state.have), state.have)
        if not piece:
            break
        state.sha256.update(piece)
        state.have += len(piece)
        if time.monotonic() - told >= 0.25:
            told = time.monotonic()
            report({"checked": state.have, "total": known})


def _wrong(state: _State) -> str:
    """Why what has come is not what was wanted; empty if it is."""
    known = state.want.size_bytes
    if known >= 0 and state.have != known:
        return f"the file has {state.have} bytes instead of {known}"
    found = state.sha256.hexdigest()
    if state.expected and found != state.expected:
        return f"the file's hash is {found[:16]}… instead of {state.expected[:16]}…"
    if state.want.git_sha1:
        blob = git_sha1(state.fd, state.have)
        if blob != state.want.git_sha1:
            return f"the file's git hash is {blob[:16]}… instead of {state.want.git_sha1[:16]}…"
    return ""


def git_sha1(fd: int, size: int) -> str:
    """The name that git gives to a file's content: how a hub names what is not in LFS."""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    offset = 0
    while piece := os.pread(fd, _CHUNK, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _disk(error: OSError) -> AIAssistantError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace("the disk is full", hint="remove a model, then " + RESUMES)
    return DownloadFailed(f"the file cannot be written: {error.strerror}")
