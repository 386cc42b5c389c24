"""Downloads: from a wish for a model to a registered one, by way of a process that has the network.

The daemon resolves, counts the disk, hands out the file to fill, and imports what has come; everything that speaks to
the network is `fetch/`. What a failure, a cancellation or a restart leaves is continued by the next pull of the source.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ai_assistant.daemon import parts
from ai_assistant.daemon.config import Config
from ai_assistant.daemon.fetch.client import Event, Fetcher, RemoteFile
from ai_assistant.daemon.fetch.source import HubSource, Source, key, parse
from ai_assistant.daemon.importer import Source as File
from ai_assistant.daemon.importer import copy_in
from ai_assistant.daemon.inspection import inspect
from ai_assistant.daemon.jobs import Job, JobTable
from ai_assistant.daemon.parts import Parts, wait_until_alone
from ai_assistant.daemon.registry import Registry, check_descriptor, parse_name
from ai_assistant.daemon.residency import load_options
from ai_assistant.daemon.space import DiskSpace, Promise
from ai_assistant.errors import (
    AlreadyExists,
    Busy,
    DownloadFailed,
    InvalidArgument,
    InvalidModel,
    NoSpace,
    NotSupported,
)

log = logging.getLogger(__name__)

MAX_TOKEN = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RATE_WINDOW_S = 10.0
_SHARE_OF_DOWNLOAD = 0.95
"""Of the job's progress; the rest is reading it once more and registering it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOptions:
    """What may be asked for beside source and name; all of it may be empty."""

    token: str = ""
    endpoint: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if len(self.token) > MAX_TOKEN or not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise InvalidArgument("the token has characters that no token has", param="token")
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise InvalidArgument("a SHA-256 has 64 hexadecimal digits, in small letters", param="sha256")


class Pulls:
    """All downloads.

    Args:
        added: told the name of each model that is new.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        jobs: JobTable,
        space: DiskSpace,
        fetcher: Fetcher,
        added: Callable[[str], None],
    ) -> None:
        self._config = config
        self._registry = registry
        self._jobs = jobs
        self._space = space
        self._fetcher = fetcher
        self._added = added
        self._running: dict[str, tuple[Job, str]] = {}
        self._folder = registry.state / parts.FOLDER

    def sweep(self) -> None:
        """Delete what was not continued for long; at the start."""
        parts.sweep(self._folder, self._running, self._config.pull_keep_parts_s)

    def start(self, text: str, name: str, options: PullOptions, owner: str, uid: int) -> Job:
        """Begin a download, or join the one of the same source that runs.

        Raises:
            InvalidArgument, Busy
        """
        endpoint = options.endpoint or self._config.pull_endpoint
        source = parse(text, endpoint=endpoint, allow_http=self._config.pull_allow_http)
        full = ":".join(parse_name(name)) if name else ""
        mark = key(source)
        if mark in self._running:
            job, running = self._running[mark]
            if full and full != running:
                raise Busy(f"{source.shown} is being pulled already, under another name", hint="wait for it")
            return job

        async def work(job: Job) -> Mapping[str, Any]:
            return await _Pull(self, job, source, full, options, Parts(self._folder / mark)).run()

        job = self._jobs.start("pull", owner, uid, work)
        self._running[mark] = (job, full)
        assert job.task is not None
        job.task.add_done_callback(lambda task: self._running.pop(mark, None))
        return job

    def make_room(self, needed: int) -> None:
        """Give up unfinished downloads that nobody continues, the oldest first, as long as the disk is too full."""
        for each in parts.unfinished(self._folder, self._running):
            if self._space.room() >= needed:
                return
            log.info("removing an unfinished download to make room")
            Parts(each).drop()


class _Pull:
    """One download."""

    def __init__(self, pulls: Pulls, job: Job, source: Source, name: str, options: PullOptions, kept: Parts) -> None:
        self._pulls = pulls
        self._job = job
        self._source = source
        self._name = name
        self._options = options
        self._parts = kept
        self._before = 0
        """Bytes of files that are complete."""
        self._total = -1
        self._resumed = 0

    async def run(self) -> Mapping[str, Any]:
        pulls = self._pulls
        self._tell("resolve", f"asking for {self._source.shown}", 0.0)
        files = await pulls._fetcher.resolve(self._source, self._options.token, self._on_resolve)
        files = self._expected(files)
        if len(files) > 1:
            raise NotSupported("models of several files cannot be pulled yet", hint="choose a GGUF file")
        self._name = self._name or f"{_slug(self._source, files[0])}:1"
        if self._is_there(files[0]):
            log.info("%s is there already", self._name, extra={"MODEL": self._name})
            return {"name": self._name}
        try:
            self._parts.prepare(files)
            await self._download(files)
        except OSError as error:
            raise NoSpace(f"the download cannot be kept: {error.strerror}", hint="see ai-assistant status") from error
        return await self._import(files[0])

    def _expected(self, files: tuple[RemoteFile, ...]) -> tuple[RemoteFile, ...]:
        wanted = self._options.sha256
        if not wanted:
            return files
        if files[0].sha256 not in ("", wanted):
            raise DownloadFailed(f"the hub has {files[0].sha256[:16]}…, but you expect {wanted[:16]}…")
        return (replace(files[0], sha256=wanted), *files[1:])

    def _is_there(self, file: RemoteFile) -> bool:
        """Whether nothing needs to be fetched.

        Raises:
            AlreadyExists: there is something else under that name.
        """
        entry = next((each for each in self._pulls._registry.all() if each.name == self._name), None)
        if entry is None:
            return False
        if file.sha256 and entry.sha256 == file.sha256:
            return True
        if entry.builtin or file.sha256 or file.size_bytes not in (-1, entry.info.size_bytes):
            raise AlreadyExists(
                f"there is already another model {self._name}", hint="choose another name: --name", param="name"
            )
        return False

    async def _download(self, files: tuple[RemoteFile, ...]) -> None:
        have = sum(self._parts.size(index) for index in range(len(files)))
        known = all(each.size_bytes >= 0 for each in files)
        self._total = sum(each.size_bytes for each in files) if known else -1
        self._resumed = have
        space = self._pulls._space
        needed = max(0, self._total - have) if known else 0
        self._pulls.make_room(needed)
        with space.promise(needed) as promise:
            for index, file in enumerate(files):
                await self._fetch(index, file, promise)
                self._before += self._parts.size(index)

    async def _fetch(self, index: int, file: RemoteFile, promise: Promise) -> None:
        have = self._parts.size(index)
        limit = file.size_bytes if file.size_bytes >= 0 else have + self._pulls._space.room()
        meter = _Meter()
        left = promise.left + have

        def on_event(event: Event) -> None:
            if event.validator:
                self._parts.remember_validator(index, event.validator)
            if event.retry:
                self._tell("retry", f"{event.retry}; again in {event.wait_s:.0f} s", retry=event.retry)
            elif event.checked >= 0:
                self._tell("check", "checking what is there already")
            elif event.bytes >= 0:
                promise.left = left - event.bytes
                self._pulls._space.check_reserve()
                self._count(file, event, meter)

        fd = self._parts.open(index)
        try:
            await self._pulls._fetcher.get(
                self._source,
                file,
                fd,
                on_event,
                token=self._options.token,
                max_bytes=limit,
                validator=self._parts.validator(index),
            )
        finally:
            os.close(fd)

    def _count(self, file: RemoteFile, event: Event, meter: _Meter) -> None:
        if self._total < 0 and event.total >= 0:
            self._total = event.total
        done = self._before + event.bytes
        rate = meter.rate(event.bytes)
        details: dict[str, Any] = {"bytes": done, "bytes_per_s": rate, "file": file.path}
        text = f"{_size(done)}"
        fraction = None
        if self._total > 0:
            fraction = done / self._total * _SHARE_OF_DOWNLOAD
            details["total_bytes"] = self._total
            text += f" of {_size(self._total)}"
        text += f", {_size(rate)}/s"
        if self._total > 0 and rate > 0:
            details["eta_s"] = (self._total - done) / rate
            text += f", {_duration(details['eta_s'])} left"
        self._tell("download", text, fraction, **details)

    def _on_resolve(self, event: Event) -> None:
        if event.retry:
            self._tell("retry", f"{event.retry}; again in {event.wait_s:.0f} s", retry=event.retry)

    def _tell(self, phase: str, text: str, progress: float | None = None, **details: Any) -> None:
        value = self._job.progress if progress is None else progress
        resumed = {"resumed_bytes": self._resumed} if self._resumed else {}
        self._job.report(value, text, {"phase": phase, **resumed, **details})

    async def _import(self, file: RemoteFile) -> Mapping[str, Any]:
        pulls = self._pulls
        path = self._parts.path(0)
        self._tell("import", f"checking {self._name}", _SHARE_OF_DOWNLOAD)
        await wait_until_alone(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = check_descriptor(fd)
            found = File(fd, await inspect(fd, load_options(pulls._config)), status)
            found.check_unchanged()
            entry = await copy_in(
                pulls._registry, self._name, found, pulls._space.reserve_bytes, self._on_import,
                take=path, expected_sha256=file.sha256,
            )  # fmt: skip
        except InvalidModel:
            # It is complete and no model: keeping it would help nobody.
            self._parts.drop()
            raise
        finally:
            os.close(fd)
        self._parts.drop()
        log.info("pulled %s", entry.name, extra={"MODEL": entry.name})
        pulls._added(entry.name)
        return {"name": entry.name}

    def _on_import(self, value: float) -> None:
        self._tell("import", f"checking {self._name}", _SHARE_OF_DOWNLOAD + value * (1 - _SHARE_OF_DOWNLOAD))


class _Meter:
    """Bytes a second over the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, count: int) -> float:
        now = self._clock()
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()  # It was begun anew.
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _RATE_WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return (count - before) / (now - then) if now > then else 0.0


def _slug(source: Source, file: RemoteFile) -> str:
    """A model's name out of a file's, or of the repository's where files are all called alike."""
    name = file.path.rpartition("/")[2]
    stem = name.rpartition(".")[0] or name
    if isinstance(source, HubSource) and stem.lower() in ("model", "ggml-model"):
        stem = source.repository
    clean = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64].rstrip("-._")
    return clean or "model"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{int(seconds)} s" if minutes < 1 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
