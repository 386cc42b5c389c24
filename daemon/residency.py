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
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelState
from ai_assistant.daemon.registry import Entry
from ai_assistant.engines import memory
from ai_assistant.engines.contract import EngineStats, Event, GenerateRequest, LoadOptions, ModelInfo
from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    InternalError,
    InvalidArgument,
    NoSuchModel,
    OutOfMemory,
    Timeout,
    WorkerCrashed,
)

log = logging.getLogger(__name__)

_STABLE_S = 60.0
"""A worker that lived so long is not the same trouble as the crash before."""
_PATIENCE_S = 1.5
"""A restart that comes this soon is waited for; a longer back-off is the error it is."""
_STATS_S = 2.0
"""A worker that does not say how it is in this time is left out."""
MAX_WORKERS = 30
"""The socket unit accepts 32 (MaxConnections=), and two of those may be ending."""


class Worker(Protocol):
    """One worker process, seen from the daemon; `daemon/worker/protocol.py` has the real one."""

    died: asyncio.Future[str]
    """Done when the process is gone, for whatever reason."""

    async def load(
        self,
        fd: int,
        options: LoadOptions,
        on_progress: Callable[[float], None] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> ModelInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]: ...

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]: ...

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]: ...

    async def classify(self, texts: Sequence[str]) -> tuple[list[list[tuple[str, float]]], int]: ...

    async def tokenize(self, text: str) -> list[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def stats(self) -> EngineStats: ...

    async def trim(self) -> int: ...

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
    keep_s: float | None = None
    """How long it stays when nobody uses it; None: as the configuration says, infinity: for ever."""
    draining: bool = False
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever somebody stops using it."""
    resident_bytes: int = 0
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
        pinned: whether a model, by full name, is kept loaded.
    """

    def __init__(
        self,
        config: Config,
        connect: Callable[[], Awaitable[Worker]],
        memory_available: Callable[[], int | None],
        counters: Counters,
        changed: Callable[[str], None] = lambda name: None,
        memory_total: Callable[[], int | None] = lambda: None,
        pinned: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._config = config
        self._connect = connect
        self._memory_available = memory_available
        self._memory_total = memory_total
        self._pinned = pinned
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

    def pin_changed(self, name: str) -> None:
        """The model was pinned or unpinned: its time to go may have come, or may not come any more."""
        self._schedule_idle()
        self.changed(name)

    def resident_bytes(self, name: str) -> int | None:
        """What the loaded model was estimated to take; None when it is not loaded."""
        slot = self._slots.get(name)
        return None if slot is None or slot.worker is None else slot.resident_bytes

    def estimate(self, entry: Entry, context_length: int = 0, sequences: int = 0) -> memory.MemoryEstimate:
        """What loading the model takes with these options (0: as it would be loaded now)."""
        options = self._options(entry)
        return memory.estimate(
            entry.memory,
            replace(
                options,
                context_length=context_length or options.context_length,
                sequences=sequences or options.sequences,
            ),
        )

    async def stats(self, name: str) -> EngineStats | None:
        """What the loaded model does right now; None when it is not loaded or does not say in time."""
        slot = self._slots.get(name)
        if slot is None or slot.worker is None:
            return None
        try:
            async with asyncio.timeout(_STATS_S):
                return await slot.worker.stats()
        except (TimeoutError, AIAssistantError) as error:
            log.info("no statistics of %s: %s", name, error or "no answer")
            return None

    @asynccontextmanager
    async def use(self, entry: Entry, keep_alive_s: float | None = None) -> AsyncIterator[Worker]:
        """The model's worker, loaded if need be and not evicted meanwhile.

        Raises:
            OutOfMemory, InvalidModel, WorkerCrashed, Busy, Timeout
            InvalidArgument: a time to stay that is none.
        """
        check_keep_alive(keep_alive_s)
        slot = self._slot(entry)
        if slot.draining:
            raise Busy(f"{entry.name} is being unloaded and takes no more requests", hint="try again in a moment")
        # Counted before the load, so that the model is not evicted between the end of it and the use.
        slot.active += 1
        try:
            yield await self._loaded(slot)
        finally:
            slot.active -= 1
            slot.last_used = self._now()
            slot.keep_s = keep_alive_s
            slot.freed.set()
            self._schedule_idle()

    async def generate(
        self, entry: Entry, request: GenerateRequest, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Event]:
        """Events of one generation; closing the generator cancels it and frees its place."""
        async with self.use(entry, keep_alive_s) as worker, aclosing(worker.generate(request)) as events:
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

    async def drain(self, name: str, timeout_s: float) -> None:
        """Refuse new requests, let those that run finish, then unload; see `contract.Service.drain`."""
        slot = self._slots.get(name)
        if slot is None:
            return
        slot.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while slot.active or slot.state is ModelState.LOADING:
                    slot.freed.clear()
                    await slot.freed.wait()
            await self._drop(slot)
        except TimeoutError:
            raise Timeout(
                f"{name} still answers after {timeout_s:g} s", hint="it takes requests again; unload it later"
            ) from None
        finally:
            slot.draining = False

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

    def _options(self, entry: Entry) -> LoadOptions:
        return entry.options or self.options

    def _needs(self, slot: _Slot) -> int:
        return self.estimate(slot.entry).total_bytes

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
        options = self._options(slot.entry)
        slot.resident_bytes = memory.estimate(slot.entry.memory, options).total_bytes
        if not options.memory_limit_bytes:
            options = replace(options, memory_limit_bytes=memory_limit(slot.resident_bytes))
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
        needed = self._needs(slot)
        reserve = self._config.models_memory_reserve_bytes
        async with self._evicting:
            while True:
                idle = [each for each in self._slots.values() if self._evictable(each)]
                promised = [each for each in self._slots.values() if each.promised]
                workers = len(promised) + sum(1 for each in self._slots.values() if each.worker is not None)
                full = workers >= MAX_WORKERS
                if full and not idle:
                    raise Busy(f"{workers} models are in use", hint="wait until one of them has answered")
                fits = True
                available = self._available()
                if available is not None:
                    # Others that load now have not taken their memory yet, and it is promised to them.
                    free = available - sum(map(self._needs, promised))
                    if free + sum(each.resident_bytes for each in idle) < needed + reserve:
                        raise self._too_large(slot, free)
                    fits = needed + reserve <= free
                if fits and not full:
                    return
                victim = min(idle, key=lambda each: each.last_used)
                log.info("unloading %s to make room for %s", victim.entry.name, slot.entry.name)
                await self._drop(victim)
                await self._settled(needed + reserve + sum(map(self._needs, promised)))

    def _evictable(self, slot: _Slot) -> bool:
        return slot.worker is not None and slot.active == 0 and not self._pinned(slot.entry.name)

    def _available(self) -> int | None:
        """Bytes for models that are not loaded."""
        available, total = self._memory_available(), self._memory_total()
        if available is None or total is None:
            return available
        loaded = (each.resident_bytes for each in self._slots.values() if each.worker is not None)
        return min(available, total - sum(loaded))

    def _too_large(self, slot: _Slot, free: int) -> OutOfMemory:
        return OutOfMemory(
            f"{slot.entry.name} needs about {self._needs(slot)} bytes of memory; {max(0, free)} bytes "
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
        due = [self._due(each) for each in self._slots.values() if self._evictable(each)]
        first = min(due, default=math.inf)
        if first < math.inf and not self._stopping:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_at(first, self._unload_idle)

    def _due(self, slot: _Slot) -> float:
        """When a model that nobody uses is unloaded."""
        keep_s = (self._config.models_idle_unload_s or math.inf) if slot.keep_s is None else slot.keep_s
        return slot.last_used + keep_s

    def _unload_idle(self) -> None:
        self._idle_timer = None
        now = self._now() + 0.01
        for slot in self._slots.values():
            if self._evictable(slot) and self._due(slot) <= now:
                log.info("%s is idle", slot.entry.name, extra={"MODEL": slot.entry.name})
                task = asyncio.get_running_loop().create_task(self._drop(slot))
                task.add_done_callback(_retrieve)
        self._schedule_idle()


def check_keep_alive(keep_alive_s: float | None) -> None:
    """Raises InvalidArgument for what is no time to stay loaded: negative, or no number."""
    # NaN compares false with everything.
    if keep_alive_s is not None and not keep_alive_s >= 0:
        raise InvalidArgument(f"keep_alive must be 0 or more seconds, not {keep_alive_s}", param="keep_alive")


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
