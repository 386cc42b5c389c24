"""The daemon's inside: what both interfaces ask (`contract.Service`), and what the bus asks beyond that."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelRecord, ModelState, caller
from ai_assistant.daemon.fetch.client import FETCH_SOCKET, Fetcher
from ai_assistant.daemon.importer import Source, check_space, copy_in
from ai_assistant.daemon.inspection import inspect
from ai_assistant.daemon.jobs import Job, JobTable
from ai_assistant.daemon.pins import Pins
from ai_assistant.daemon.pulls import PullOptions, Pulls
from ai_assistant.daemon.registry import Entry, Registry, check_descriptor, parse_name
from ai_assistant.daemon.residency import Residency, Worker, load_options
from ai_assistant.daemon.space import DiskSpace
from ai_assistant.daemon.status import Machine
from ai_assistant.daemon.version import VERSION
from ai_assistant.engines.contract import (
    Chunk,
    EngineStats,
    Event,
    Finished,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
)
from ai_assistant.engines.hetero import Wish
from ai_assistant.engines.memory import MemoryEstimate
from ai_assistant.errors import (
    AIAssistantError,
    AlreadyExists,
    Busy,
    Cancelled,
    InternalError,
    InvalidArgument,
    NoSuchModel,
    NotSupported,
    OutOfMemory,
)
from ai_assistant.hal.hetero.intent import parse as parse_intent

log = logging.getLogger(__name__)


class DaemonService:
    """Implements `contract.Service`. Models change only through it, so that `on_models` hears of it."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        residency: Residency,
        jobs: JobTable,
        machine: Machine,
        counters: Counters,
        pins: Pins,
        *,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.config = config
        self.registry = registry
        self.residency = residency
        self.jobs = jobs
        self.machine = machine
        self.counters = counters
        self.pins = pins
        self.space = DiskSpace(registry.state, config.models_disk_reserve_bytes)
        self.pulls = Pulls(
            config, registry, jobs, self.space, fetcher or Fetcher(FETCH_SOCKET), lambda name: self.on_added(name)
        )
        self._pinning = asyncio.Lock()
        self.state = "starting"
        self.on_added: Callable[[str], None] = lambda name: None
        self.on_removed: Callable[[str], None] = lambda name: None
        self.on_state: Callable[[], None] = lambda: None
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- contract.Service

    def models(self) -> Sequence[ModelRecord]:
        uid = caller.get()
        return [self.record(entry) for entry in self.registry.all() if entry.visible_to(uid)]

    def model(self, name: str) -> ModelRecord:
        return self.record(self._entry(name))

    def _entry(self, name: str) -> Entry:
        """The model of that name, for whoever asks."""
        return self.registry.get(name, caller.get())

    async def generate(
        self, name: str, request: GenerateRequest, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Event]:
        entry = self._entry(name)
        self._accepting()
        counters = self.counters
        counters.requests += 1
        counters.running += 1
        self._begin()
        outcome = "cancelled"
        tokens = 0
        ttft_s: float | None = None
        began = counters.metrics.clock()
        try:
            async with aclosing(self.residency.generate(entry, request, keep_alive_s)) as events:
                async for event in events:
                    if isinstance(event, Chunk):
                        tokens += 1
                        ttft_s = counters.metrics.clock() - began if ttft_s is None else ttft_s
                    elif isinstance(event, Finished):
                        outcome = "done"
                        self._account(entry.name, event, ttft_s)
                    yield event
        except AIAssistantError as error:
            outcome = _outcome(error)
            counters.errors += outcome != "cancelled"
            raise
        finally:
            counters.running -= 1
            counters.metrics.ended(entry.name, outcome)
            if outcome == "cancelled":
                counters.cancelled += 1
                # The engine reports usage only at the end; chunks are the nearest count there is.
                counters.completion_tokens += tokens
            self._end()

    async def embed(
        self, name: str, texts: Sequence[str], keep_alive_s: float | None = None, wish: Wish | None = None
    ) -> tuple[list[list[float]], int]:
        async with self._counted(name, keep_alive_s) as worker:
            vectors, tokens = await worker.embed(texts, wish)
        self._read(name, tokens)
        return vectors, tokens

    async def rerank(
        self,
        name: str,
        query: str,
        documents: Sequence[str],
        keep_alive_s: float | None = None,
        wish: Wish | None = None,
    ) -> tuple[list[float], int]:
        async with self._counted(name, keep_alive_s) as worker:
            scores, tokens = await worker.rerank(query, documents, wish)
        self._read(name, tokens)
        return scores, tokens

    async def classify(
        self, name: str, texts: Sequence[str], keep_alive_s: float | None = None, wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        async with self._counted(name, keep_alive_s) as worker:
            labels, tokens = await worker.classify(texts, wish)
        self._read(name, tokens)
        return labels, tokens

    async def tokenize(self, name: str, text: str) -> list[int]:
        async with self._worker(name) as worker:
            return await worker.tokenize(text)

    async def detokenize(self, name: str, tokens: Sequence[int]) -> str:
        async with self._worker(name) as worker:
            return await worker.detokenize(tokens)

    @asynccontextmanager
    async def _worker(self, name: str, keep_alive_s: float | None = None) -> AsyncIterator[Worker]:
        entry = self._entry(name)
        self._accepting()
        self._begin()
        try:
            async with self.residency.use(entry, keep_alive_s) as worker:
                yield worker
        finally:
            self._end()

    @asynccontextmanager
    async def _counted(self, name: str, keep_alive_s: float | None = None) -> AsyncIterator[Worker]:
        full = self._entry(name).name
        self.counters.requests += 1
        outcome = "cancelled"
        try:
            async with self._worker(name, keep_alive_s) as worker:
                yield worker
            outcome = "done"
        except AIAssistantError as error:
            self.counters.errors += 1
            outcome = _outcome(error)
            raise
        finally:
            self.counters.metrics.ended(full, outcome)

    def _read(self, name: str, tokens: int) -> None:
        self.counters.prompt_tokens += tokens
        # The model may have gone meanwhile.
        with suppress(NoSuchModel):
            self.counters.metrics.read(self._entry(name).name, tokens)

    async def stats(self) -> Mapping[str, EngineStats]:
        names = [each.name for each in self.models() if each.state is ModelState.LOADED]
        found = await asyncio.gather(*map(self.residency.stats, names))
        return {name: each for name, each in zip(names, found, strict=True) if each is not None}

    def estimate(self, name: str, context_length: int = 0, sequences: int = 0) -> MemoryEstimate:
        entry = self._entry(name)
        for param, value, high in (("context_length", context_length, 1 << 24), ("sequences", sequences, 256)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                raise InvalidArgument(f"{param} must be an integer from 0 to {high}", param=param)
        return self.residency.estimate(entry, context_length, sequences)

    async def pin(self, name: str, pinned: bool) -> None:
        entry = self._entry(name)
        if entry.transient:
            raise NotSupported(f"{entry.name} goes away with its owner and cannot be pinned")
        async with self._pinning:
            changed = await asyncio.to_thread(self.pins.set, entry.name, pinned)
        if changed:
            log.info("%s %s", "pinned" if pinned else "unpinned", entry.name, extra={"MODEL": entry.name})
            self.residency.pin_changed(entry.name)

    async def drain(self, name: str) -> None:
        await self.residency.drain(self._entry(name).name, self.config.models_drain_timeout_s)

    def status(self) -> Mapping[str, Any]:
        return {
            "version": VERSION,
            "state": self.current_state(),
            **self.machine.status(),
            "models": [{"name": each.name, "state": str(each.state)} for each in self.models()],
            "running": self.counters.running,
        }

    def _account(self, name: str, event: Finished, ttft_s: float | None) -> None:
        usage = event.usage
        self.counters.metrics.observe(name, usage, ttft_s)
        self.counters.prompt_tokens += usage.prompt_tokens
        self.counters.completion_tokens += usage.completion_tokens
        self.counters.prefill_s += usage.prefill_s
        self.counters.decode_s += usage.decode_s

    def _begin(self) -> None:
        """One more that `finish` waits for."""
        self._working += 1
        self._idle.clear()

    def _end(self) -> None:
        self._working -= 1
        if not self._working:
            self._idle.set()

    def _accepting(self) -> None:
        if self.state == "stopping":
            raise Busy("the service is stopping", hint="try again in a moment")

    def record(self, entry: Entry) -> ModelRecord:
        state, error = self.residency.state(entry.name)
        info = entry.info
        estimate = self.residency.estimate(entry)
        return ModelRecord(
            name=entry.name,
            state=state,
            size_bytes=info.size_bytes,
            format=info.format,
            architecture=info.architecture,
            parameters=info.parameters,
            quantization=info.quantization,
            context_length=info.context_length,
            memory_estimate_bytes=estimate.total_bytes,
            created=entry.created,
            builtin=entry.builtin,
            transient=entry.transient,
            error=error,
            warning=self.residency.warning(entry.name),
            pinned=entry.name in self.pins,
            capabilities=_capabilities(info),
            memory=estimate,
            resident_bytes=self.residency.resident_bytes(entry.name),
        )

    # ---- what the bus has beyond that

    def health(self) -> str:
        """ "ok", or a sentence that says what is wrong."""
        problems = [
            f"{entry.name} cannot be loaded: {error}"
            for entry in self.registry.all()
            if entry.builtin
            for state, error in [self.residency.state(entry.name)]
            if state is ModelState.FAILED
        ]
        if self.registry.problem:
            problems.append(self.registry.problem)
        if not any(entry.builtin for entry in self.registry.all()):
            problems.append("the built-in model is missing")
        free = self.machine.disk_free()
        if free is not None and free < self.config.models_disk_reserve_bytes // 4:
            problems.append(f"the disk is nearly full: {free} bytes are free")
        return "; ".join(problems) or "ok"

    def current_state(self) -> str:
        """starting, running, degraded or stopping."""
        return "degraded" if self.state == "running" and self.health() != "ok" else self.state

    def set_state(self, state: str) -> None:
        self.state = state
        self.on_state()

    async def import_model(self, fd: int, name: str, owner: str, uid: int) -> Job:
        """Check a file and start to copy it; `fd` belongs to this from now on.

        Raises:
            InvalidModel, InvalidArgument, AlreadyExists, NoSpace, Busy, Timeout
        """
        try:
            bare, version = parse_name(name)
            full = f"{bare}:{version}"
            self._accepting()
            self.jobs.check_room(uid)
            source = await self._source(fd, load_options(self.config))
            self._check_target(full, source)
            if not any(entry.name == full for entry in self.registry.all()):
                check_space(self.registry.state, source.status.st_size, self.space.kept_bytes)
        except BaseException:
            os.close(fd)
            raise

        async def work(job: Job) -> Mapping[str, Any]:
            job.report(0.0, f"importing {full}")
            entry = await copy_in(self.registry, full, source, self.space.kept_bytes, job.report)
            log.info("imported %s", entry.name, extra={"MODEL": entry.name})
            self.on_added(entry.name)
            return {"name": entry.name}

        try:
            job = self.jobs.start("import", owner, uid, work)
        except BaseException:
            os.close(fd)
            raise
        assert job.task is not None
        job.task.add_done_callback(lambda task: os.close(fd))
        return job

    def pull_model(self, source: str, name: str, options: PullOptions, owner: str, uid: int) -> Job:
        """Begin to download a model, or join the download of the same source that runs.

        Raises:
            InvalidArgument, Busy
        """
        self._accepting()
        return self.pulls.start(source, name, options, owner, uid)

    def _check_target(self, name: str, source: Source) -> None:
        for entry in self.registry.all():
            if entry.name == name and (entry.builtin or entry.info.size_bytes != source.status.st_size):
                raise AlreadyExists(
                    f"there is already another model {name}", hint="choose another name or version", param="name"
                )

    async def _source(self, fd: int, options: LoadOptions) -> Source:
        status = check_descriptor(fd)
        source = Source(fd, await inspect(fd, options), status)
        source.check_unchanged()
        return source

    async def open_model(
        self,
        fd: int,
        prefix: str,
        context_length: int,
        owner: str,
        uid: int | None = None,
        hetero_compute: str = "",
    ) -> Entry:
        """Register a file that stays where it is; `fd` belongs to this from now on.

        Args:
            hetero_compute: which devices may have it, as in docs/hetero.md; "": as the configuration says.
            uid: the user that it belongs to; None: the daemon's own.

        Raises:
            InvalidModel, InvalidArgument, Busy, Timeout
        """
        try:
            parse_name(prefix)
            if ":" in prefix:
                raise InvalidArgument("the name of a transient model has no version", param="name")
            self._accepting()
            user = os.getuid() if uid is None else uid
            self._check_transient(user)
            options = load_options(self.config)
            if context_length:
                options = replace(options, context_length=context_length)
            if hetero_compute:
                options = replace(options, hetero_compute=str(parse_intent(hetero_compute)))
            source = await self._source(fd, options)
            # Others of the same user may have come while the file was looked at.
            self._check_transient(user)
            entry = self.registry.add_transient(
                fd,
                source.found,
                prefix,
                owner,
                user,
                int(time.time()),
                options=options if context_length or hetero_compute else None,
            )
        except BaseException:
            os.close(fd)
            raise
        self.on_added(entry.name)
        return entry

    def _check_transient(self, uid: int) -> None:
        mine = sum(1 for entry in self.registry.all() if entry.transient and entry.owner_uid == uid)
        if mine >= self.config.limits_models_per_caller:
            raise Busy(f"you have {mine} transient models", hint="remove one of them")

    def start_load(self, name: str, owner: str, uid: int) -> Job:
        """Load a model as a job.

        Raises:
            NoSuchModel, Busy
        """
        entry = self._entry(name)
        self._accepting()

        async def work(job: Job) -> Mapping[str, Any]:
            # It may have been removed since, and another imported under its name.
            current = self.registry.get(entry.name, uid)
            job.report(0.0, f"loading {current.name}")
            await self.residency.load(current, job.report)
            return {"name": current.name}

        return self.jobs.start("load", owner, uid, work)

    def start_drain(self, name: str, owner: str, uid: int) -> Job:
        """Drain a model as a job.

        Raises:
            NoSuchModel, Busy
        """
        entry = self._entry(name)

        async def work(job: Job) -> Mapping[str, Any]:
            job.report(0.0, f"draining {entry.name}")
            await self.residency.drain(entry.name, self.config.models_drain_timeout_s)
            return {"name": entry.name}

        return self.jobs.start("drain", owner, uid, work)

    async def unload(self, name: str) -> None:
        """Raises NoSuchModel, Busy."""
        await self.residency.unload(self.registry.get(name).name)

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Forget a model and delete its files.

        Raises:
            NoSuchModel, NotSupported, InternalError, Busy (unless `force`)
        """
        entry = self.registry.get(name)
        if not force and self.residency.busy(entry.name):
            raise Busy(f"{entry.name} is in use", hint="wait until it has answered")
        grave = self.registry.remove(entry.name)
        log.info("removed %s", entry.name, extra={"MODEL": entry.name})
        self.on_removed(entry.name)
        self.pins.discard(entry.name)
        await self.residency.forget(entry.name)
        if grave is not None:
            # Gigabytes take a while to delete. What a cut leaves, the next start deletes.
            await asyncio.to_thread(shutil.rmtree, grave, ignore_errors=True)

    async def drop_owner(self, owner: str) -> None:
        """A bus connection is gone, and its transient models with it."""
        for entry in self.registry.all():
            if entry.owner == owner:
                with suppress(NoSuchModel):
                    await self.remove(entry.name, force=True)

    async def self_test(self) -> list[tuple[str, bool, str]]:
        """(check, passed, what was found), each really tried."""
        free, memory = self.machine.disk_free(), self.machine.memory_available()
        reserve = self.config.models_disk_reserve_bytes
        results = [
            ("disk", free is not None and free >= reserve, f"{free} bytes free, {reserve} wanted"),
            (
                "memory",
                memory is None or memory >= self.config.models_memory_reserve_bytes,
                f"{memory} bytes available" if memory is not None else "not measured here",
            ),
            await asyncio.to_thread(self._try_write),
        ]
        results.append(await self._try_answer(self.config.models_default))
        return results

    def _try_write(self) -> tuple[str, bool, str]:
        path = self.registry.state / f".partial-test-{os.getpid()}"
        try:
            path.write_bytes(b"x" * 4096)
            path.unlink()
        except OSError as error:
            return "state directory", False, f"{self.registry.state}: {error.strerror}"
        return "state directory", True, f"{self.registry.state} is writable"

    async def _try_answer(self, name: str) -> tuple[str, bool, str]:
        request = GenerateRequest(prompt="status", max_tokens=1, temperature=0.0)
        begin = time.monotonic()
        try:
            async with asyncio.timeout(60), aclosing(self.generate(name, request)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        took = time.monotonic() - begin
                        return "inference", True, f"{name} answered in {took:.2f} s"
            raise InternalError("no answer")
        except AIAssistantError as error:
            return "inference", False, f"{name}: {error.message}"
        except TimeoutError:
            return "inference", False, f"{name} did not answer within 60 s"

    async def finish(self) -> None:
        """Take no more work and let what runs finish, for as long as the configuration says."""
        self.set_state("stopping")
        try:
            async with asyncio.timeout(self.config.service_drain_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("cancelling %d requests", self._working)


def _outcome(error: AIAssistantError) -> str:
    """One of `metrics.OUTCOMES`."""
    if isinstance(error, Cancelled):
        return "cancelled"
    return "refused" if isinstance(error, Busy | OutOfMemory) else "failed"


def _capabilities(info: ModelInfo) -> tuple[str, ...]:
    can = {
        "generate": info.can_generate,
        "embed": info.can_embed,
        "rerank": info.can_rerank,
        "classify": info.can_classify,
    }
    return tuple(name for name, able in can.items() if able)
