"""Which models are in memory: one worker process each, loaded on demand, bounded in bytes.

States of a model: unloaded → loading → loaded → unloaded, and failed when a load went wrong.

* Many requests for one model make one load; a request that goes away does not stop it.
* Before a load its memory is estimated and compared with what the kernel says is available; when that is
  short, idle models are unloaded, the least recently used first. A model that generates is never evicted.
* A worker that dies is an error to its callers and is restarted after a wait that doubles each time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelState
from ai_assistant.daemon.registry import Entry
from ai_assistant.engines.contract import Event, GenerateRequest, LoadOptions, ModelInfo
from ai_assistant.errors import AIAssistantError, Busy, InternalError, NoSuchModel, OutOfMemory, Timeout, WorkerCrashed

log = logging.getLogger(__name__)

_STABLE_S = 60.0
"""A worker that lived so long is not the same trouble as the crash before."""
_PATIENCE_S = 1.5
"""A restart that comes this soon is waited for; a longer back-off is the error it is."""
MAX_WORKERS = 30
"""The socket unit accepts 32 (MaxConnections=), and two of those may be ending."""


class Worker(Protocol):
    """One worker process, seen from the daemon; `daemon/worker/protocol.py` has the real one."""

    died: asyncio.Future[str]
    """Done when the process is gone, for whatever reason."""

    async def load(
        self, fd: int, options: LoadOptions, on_progress: Callable[[float], None] | None = None
    ) -> ModelInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]: ...

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]: ...

    async def tokenize(self, text: str) -> list[int]: ...

    async def close(self) -> None:
        """End the process."""


@dataclass(eq=False, slots=True)
class _Slot:
    entry: Entry
    state: ModelState = ModelState.UNLOADED
    error: str = ""
    worker: Worker | None = None
    load: asyncio.Task[None] | None = None
    watch: asyncio.Task[None] | None = None
    restart: asyncio.Task[None] | None = None
    progress: list[Callable[[float], None]] = field(default_factory=list)
    active: int = 0
    last_used: float = 0.0
    loaded_at: float = 0.0
    crashes: int = 0
    retry_at: float = 0.0
    gone: bool = False
    promised: bool = False
    """It loads, and the memory of its estimate was found free for it."""


class Residency:
    """Keeps workers. All coroutines run on one loop.

    Args:
        connect: starts a worker and returns it.
        memory_available: bytes that can be had without swapping, or None where nobody knows.
        memory_total: bytes of the machine, or None. Mapped weights are page cache, which counts as available though
            a loaded model needs it: what is left of the total is the other bound.
        changed: told the name of a model whose state changed.
    """

    def __init__(
        self,
        config: Config,
        connect: Callable[[], Awaitable[Worker]],
        memory_available: Callable[[], int | None],
        counters: Counters,
        changed: Callable[[str], None] = lambda name: None,
        memory_total: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._config = config
        self._connect = connect
        self._memory_available = memory_available
        self._memory_total = memory_total
        self._counters = counters
        self.changed = changed
        self._slots: dict[str, _Slot] = {}
        self._idle_timer: asyncio.TimerHandle | None = None
        self._evicting = asyncio.Lock()
        self._stopping = False

    # ---- what others see

    def state(self, name: str) -> tuple[ModelState, str]:
        """(state, why the last load failed)."""
        slot = self._slots.get(name)
        return (slot.state, slot.error) if slot is not None else (ModelState.UNLOADED, "")

    def busy(self, name: str) -> bool:
        """Whether the model is loading or answers somebody."""
        slot = self._slots.get(name)
        return slot is not None and (slot.active > 0 or slot.state is ModelState.LOADING)

    @asynccontextmanager
    async def use(self, entry: Entry) -> AsyncIterator[Worker]:
        """The model's worker, loaded if need be and not evicted meanwhile.

        Raises:
            OutOfMemory, InvalidModel, WorkerCrashed, Busy, Timeout
        """
        slot = self._slot(entry)
        # Counted before the load, so that the model is not evicted between the end of it and the use.
        slot.active += 1
        try:
            yield await self._loaded(slot)
        finally:
            slot.active -= 1
            slot.last_used = self._now()
            self._schedule_idle()

    async def generate(self, entry: Entry, request: GenerateRequest) -> AsyncGenerator[Event]:
        """Events of one generation; closing the generator cancels it and frees its place."""
        async with self.use(entry) as worker, aclosing(worker.generate(request)) as events:
            async for event in events:
                yield event

    async def load(self, entry: Entry, progress: Callable[[float], None] = lambda value: None) -> None:
        """Load now; returns when it is loaded. See `use` for errors.

        Cancelling it ends a load that nobody else wants.
        """
        slot = self._slot(entry)
        slot.progress.append(progress)
        try:
            async with self.use(entry):
                pass
        except asyncio.CancelledError:
            if slot.load is not None and slot.active == 0:
                slot.load.cancel()
                await asyncio.wait([slot.load])
            raise
        finally:
            slot.progress.remove(progress)

    async def unload(self, name: str) -> None:
        """Free the model's memory; nothing happens when it is not loaded.

        Raises:
            Busy: it loads or generates.
        """
        slot = self._slots.get(name)
        if slot is None:
            return
        if self.busy(name):
            raise Busy(f"{name} is in use", hint="wait until it has answered")
        await self._drop(slot)

    async def forget(self, name: str) -> None:
        """The model goes away: end its worker, whatever it does."""
        slot = self._slots.pop(name, None)
        if slot is None:
            return
        slot.gone = True
        if slot.load is not None:
            slot.load.cancel()
            await asyncio.wait([slot.load])
        await self._drop(slot)

    async def close(self) -> None:
        """End all workers."""
        self._stopping = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        await asyncio.gather(*(self.forget(name) for name in list(self._slots)))

    # ---- loading

    def _slot(self, entry: Entry) -> _Slot:
        slot = self._slots.get(entry.name)
        if slot is None or slot.entry is not entry:
            slot = self._slots[entry.name] = _Slot(entry)
        return slot

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _loaded(self, slot: _Slot) -> Worker:
        if slot.worker is None:
            if self._stopping:
                raise Busy("the service is stopping")
            if slot.gone:
                raise NoSuchModel(f"the model {slot.entry.name} was removed")
            if slot.load is None:
                wait = slot.retry_at - self._now()
                if 0 < wait <= _PATIENCE_S:
                    await asyncio.sleep(wait)
                    return await self._loaded(slot)
                if wait > 0:
                    raise WorkerCrashed(
                        f"the worker of {slot.entry.name} crashed and is being restarted",
                        hint=f"try again in {wait:.0f} s" if wait >= 1 else "try again",
                    )
                slot.load = asyncio.get_running_loop().create_task(self._load(slot))
                slot.load.add_done_callback(_retrieve)
            load = slot.load
            try:
                await asyncio.shield(load)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not load.cancelled() or (task is not None and task.cancelling()):
                    raise
                if slot.gone:
                    raise NoSuchModel(f"the model {slot.entry.name} was removed") from None
                raise Busy(f"loading {slot.entry.name} was cancelled", hint="try again") from None
        if slot.worker is None:
            raise WorkerCrashed(f"the worker of {slot.entry.name} crashed while it was loading", hint="try again")
        return slot.worker

    async def _load(self, slot: _Slot) -> None:
        name = slot.entry.name
        self._set(slot, ModelState.LOADING)
        worker: Worker | None = None
        try:
            await self._make_room(slot)
            # Nothing waits in between, so the next one that asks for room counts this one.
            slot.promised = True
            async with asyncio.timeout(self._config.worker_load_timeout_s):
                worker = await self._connect()
                await self._send_model(slot, worker)
        except BaseException as error:
            slot.load = None
            slot.promised = False
            if worker is not None:
                await worker.close()
            if isinstance(error, TimeoutError):
                error = Timeout(f"loading {name} took longer than {self._config.worker_load_timeout_s:g} s")
            if isinstance(error, WorkerCrashed):
                self._crashed(slot)
            if isinstance(error, AIAssistantError):
                log.warning("cannot load %s: %s", name, error.message, extra={"MODEL": name})
                self._set(slot, ModelState.FAILED, error.message)
                raise error from None
            self._set(slot, ModelState.UNLOADED)
            if isinstance(error, Exception):
                log.exception("cannot load %s", name)
                raise InternalError(f"cannot load {name}", hint="the journal has the details") from error
            raise
        slot.worker = worker
        slot.load = None
        slot.promised = False
        slot.loaded_at = slot.last_used = self._now()
        slot.watch = asyncio.get_running_loop().create_task(self._watch(slot, worker))
        self._set(slot, ModelState.LOADED)
        # Whoever wanted it may have left meanwhile: then nobody else starts the clock.
        self._schedule_idle()
        log.info("loaded %s", name, extra={"MODEL": name})

    async def _send_model(self, slot: _Slot, worker: Worker) -> None:
        options = slot.entry.options or self.options
        if not options.memory_limit_bytes:
            options = replace(options, memory_limit_bytes=memory_limit(slot.entry.memory_estimate_bytes))
        fd = slot.entry.open()
        try:
            await worker.load(fd, options, lambda value: _tell(slot, value))
        finally:
            os.close(fd)

    @property
    def options(self) -> LoadOptions:
        """How models are loaded where nothing else is asked for."""
        return load_options(self._config)

    async def _make_room(self, slot: _Slot) -> None:
        """Unload idle models until the estimate fits. None is unloaded for a model that would not fit even then.

        Raises:
            OutOfMemory: with the numbers.
            Busy: as many workers as there may be, and all of them work.
        """
        needed = slot.entry.memory_estimate_bytes
        reserve = self._config.models_memory_reserve_bytes
        async with self._evicting:
            while True:
                idle = [each for each in self._slots.values() if each.worker is not None and each.active == 0]
                promised = [each for each in self._slots.values() if each.promised]
                workers = len(promised) + sum(1 for each in self._slots.values() if each.worker is not None)
                full = workers >= MAX_WORKERS
                if full and not idle:
                    raise Busy(f"{workers} models are in use", hint="wait until one of them has answered")
                fits = True
                available = self._available()
                if available is not None:
                    # Others that load now have not taken their memory yet, and it is promised to them.
                    free = available - sum(each.entry.memory_estimate_bytes for each in promised)
                    if free + sum(each.entry.memory_estimate_bytes for each in idle) < needed + reserve:
                        raise self._too_large(slot, free)
                    fits = needed + reserve <= free
                if fits and not full:
                    return
                victim = min(idle, key=lambda each: each.last_used)
                log.info("unloading %s to make room for %s", victim.entry.name, slot.entry.name)
                await self._drop(victim)
                await self._settled(needed + reserve + sum(each.entry.memory_estimate_bytes for each in promised))

    def _available(self) -> int | None:
        """Bytes for models that are not loaded."""
        available, total = self._memory_available(), self._memory_total()
        if available is None or total is None:
            return available
        loaded = (each.entry.memory_estimate_bytes for each in self._slots.values() if each.worker is not None)
        return min(available, total - sum(loaded))

    def _too_large(self, slot: _Slot, free: int) -> OutOfMemory:
        return OutOfMemory(
            f"{slot.entry.name} needs about {slot.entry.memory_estimate_bytes} bytes of memory; {max(0, free)} bytes "
            f"are available, of which {self._config.models_memory_reserve_bytes} stay free",
            hint="unload a model, or set models.context_length lower",
        )

    async def _settled(self, wanted: int) -> None:
        """A process takes a moment to give its memory back; do not evict the next one meanwhile."""
        for _ in range(20):
            available = self._available()
            if available is None or available >= wanted:
                return
            await asyncio.sleep(0.05)

    # ---- leaving

    async def _drop(self, slot: _Slot) -> None:
        if slot.restart is not None:
            slot.restart.cancel()
            slot.restart = None
        worker, slot.worker = slot.worker, None
        if slot.watch is not None:
            slot.watch.cancel()
            slot.watch = None
        if worker is not None:
            self._set(slot, ModelState.UNLOADED)
            await worker.close()
            log.info("unloaded %s", slot.entry.name, extra={"MODEL": slot.entry.name})
        elif slot.state is not ModelState.LOADING:
            self._set(slot, ModelState.UNLOADED)

    async def _watch(self, slot: _Slot, worker: Worker) -> None:
        await asyncio.wait([worker.died])
        slot.worker = None
        slot.watch = None
        reason = worker.died.result()
        log.error("the worker of %s died: %s", slot.entry.name, reason, extra={"MODEL": slot.entry.name})
        if self._now() - slot.loaded_at > _STABLE_S:
            slot.crashes = 0
        self._crashed(slot)
        self._set(slot, ModelState.FAILED, "its worker crashed")
        await worker.close()

    def _crashed(self, slot: _Slot) -> None:
        slot.crashes += 1
        first, longest = self._config.worker_restart_first_s, self._config.worker_restart_longest_s
        wait = min(longest, first * 2.0 ** min(slot.crashes - 1, 30))
        slot.retry_at = self._now() + wait
        self._counters.worker_restarts += 1
        if slot.crashes <= self._config.worker_restart_attempts and not self._stopping and not slot.gone:
            slot.restart = asyncio.get_running_loop().create_task(self._restart(slot, wait))

    async def _restart(self, slot: _Slot, wait: float) -> None:
        await asyncio.sleep(wait)
        slot.restart = None
        try:
            await self._loaded(slot)
        except AIAssistantError as error:
            log.warning("restarting the worker of %s failed: %s", slot.entry.name, error.message)

    def _set(self, slot: _Slot, state: ModelState, error: str = "") -> None:
        slot.state, slot.error = state, error
        if not slot.gone:
            self.changed(slot.entry.name)

    def _schedule_idle(self) -> None:
        """One timer for the model that is due first, so that an idle daemon does not wake up."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        limit = self._config.models_idle_unload_s
        idle = [each.last_used for each in self._slots.values() if each.worker is not None and each.active == 0]
        if limit and idle and not self._stopping:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_at(min(idle) + limit, self._unload_idle)

    def _unload_idle(self) -> None:
        self._idle_timer = None
        due = self._now() - self._config.models_idle_unload_s + 0.01
        for slot in self._slots.values():
            if slot.worker is not None and slot.active == 0 and slot.last_used <= due:
                log.info("%s is idle", slot.entry.name, extra={"MODEL": slot.entry.name})
                task = asyncio.get_running_loop().create_task(self._drop(slot))
                task.add_done_callback(_retrieve)
        self._schedule_idle()


def memory_limit(estimate_bytes: int) -> int:
    """What a worker may take for a model of that estimate, in bytes: enough for a wrong estimate, not for a leak."""
    return int(estimate_bytes * 1.25) + (512 << 20)


def load_options(config: Config) -> LoadOptions:
    """How models are loaded, as the configuration says."""
    return LoadOptions(
        context_length=config.models_context_length,
        sequences=config.models_sequences,
        threads=config.models_threads,
        batch_tokens=config.models_batch_tokens,
    )


def _tell(slot: _Slot, value: float) -> None:
    for each in list(slot.progress):
        each(value)


def _retrieve(task: asyncio.Task[None]) -> None:
    # Whoever waits gets the exception; when nobody does any more it must not be reported as lost.
    if not task.cancelled():
        task.exception()
