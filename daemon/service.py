"""The daemon's inside: what both interfaces ask (`contract.Service`), and what the bus asks beyond that."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelRecord, ModelState, caller
from ai_assistant.daemon.importer import Source, check_space, copy_in
from ai_assistant.daemon.inspection import inspect
from ai_assistant.daemon.jobs import Job, JobTable
from ai_assistant.daemon.registry import Entry, Registry, check_descriptor, parse_name
from ai_assistant.daemon.residency import Residency, load_options
from ai_assistant.daemon.status import Machine
from ai_assistant.daemon.version import VERSION
from ai_assistant.engines.contract import Chunk, Event, Finished, GenerateRequest, LoadOptions
from ai_assistant.errors import (
    AIAssistantError,
    AlreadyExists,
    Busy,
    Cancelled,
    InternalError,
    InvalidArgument,
    NoSuchModel,
)

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
    ) -> None:
        self.config = config
        self.registry = registry
        self.residency = residency
        self.jobs = jobs
        self.machine = machine
        self.counters = counters
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

    async def generate(self, name: str, request: GenerateRequest) -> AsyncGenerator[Event]:
        entry = self._entry(name)
        self._accepting()
        counters = self.counters
        counters.requests += 1
        counters.running += 1
        self._begin()
        finished = False
        tokens = 0
        try:
            async with aclosing(self.residency.generate(entry, request)) as events:
                async for event in events:
                    if isinstance(event, Chunk):
                        tokens += 1
                    elif isinstance(event, Finished):
                        finished = True
                        self._account(event)
                    yield event
        except Cancelled:
            counters.cancelled += 1
            finished = True
            raise
        except AIAssistantError:
            counters.errors += 1
            finished = True
            raise
        finally:
            counters.running -= 1
            if not finished:
                counters.cancelled += 1
                # The engine reports usage only at the end; chunks are the nearest count there is.
                counters.completion_tokens += tokens
            self._end()

    async def embed(self, name: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        entry = self._entry(name)
        self._accepting()
        self.counters.requests += 1
        self._begin()
        try:
            async with self.residency.use(entry) as worker:
                vectors, tokens = await worker.embed(texts)
        except AIAssistantError:
            self.counters.errors += 1
            raise
        finally:
            self._end()
        self.counters.prompt_tokens += tokens
        return vectors, tokens

    async def tokenize(self, name: str, text: str) -> list[int]:
        entry = self._entry(name)
        self._accepting()
        self._begin()
        try:
            async with self.residency.use(entry) as worker:
                return await worker.tokenize(text)
        finally:
            self._end()

    def status(self) -> Mapping[str, Any]:
        return {
            "version": VERSION,
            "state": self.current_state(),
            **self.machine.status(),
            "models": [{"name": each.name, "state": str(each.state)} for each in self.models()],
            "running": self.counters.running,
        }

    def _account(self, event: Finished) -> None:
        usage = event.usage
        self.counters.prompt_tokens += usage.prompt_tokens
        self.counters.completion_tokens += usage.completion_tokens
        self.counters.prefill_s += usage.prefill_s
        self.counters.decode_s += usage.decode_s

    def _begin(self) -> None:
        """One more that `drain` waits for."""
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
        return ModelRecord(
            name=entry.name,
            state=state,
            size_bytes=info.size_bytes,
            format=info.format,
            architecture=info.architecture,
            parameters=info.parameters,
            quantization=info.quantization,
            context_length=info.context_length,
            memory_estimate_bytes=entry.memory_estimate_bytes,
            created=entry.created,
            builtin=entry.builtin,
            transient=entry.transient,
            error=error,
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
                check_space(self.registry.state, source.status.st_size, self.config.models_disk_reserve_bytes)
        except BaseException:
            os.close(fd)
            raise

        async def work(job: Job) -> Mapping[str, Any]:
            job.report(0.0, f"importing {full}")
            reserve = self.config.models_disk_reserve_bytes
            entry = await copy_in(self.registry, full, source, reserve, job.report)
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

    async def open_model(self, fd: int, prefix: str, context_length: int, owner: str, uid: int | None = None) -> Entry:
        """Register a file that stays where it is; `fd` belongs to this from now on.

        Args:
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
                options=options if context_length else None,
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

    async def drain(self) -> None:
        """Take no more work and let what runs finish, for as long as the configuration says."""
        self.set_state("stopping")
        try:
            async with asyncio.timeout(self.config.service_drain_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("cancelling %d requests", self._working)
