"""Which models are in memory: one worker process each, loaded on demand, bounded in bytes.

States of a model: unloaded → loading → loaded → unloaded, and failed when a load went wrong.

* Many requests for one model make one load; a request that goes away does not stop it.
* Before a load its memory is estimated and compared with what the kernel says is available; when that is
  short, idle models are unloaded, those first that can be done without best (`slot.worst`), and then the model is
  loaded with less (`fitting`). A model that generates, or is pinned, is never evicted.
* When the kernel reports growing memory pressure, idle models give their caches back, then go (`pressure`).
* A worker that dies is an error to its callers and is restarted after a wait that doubles each time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from ai_assistant.daemon.config import Config
from ai_assistant.daemon.contract import Counters, ModelState, caller
from ai_assistant.daemon.registry import Entry
from ai_assistant.daemon.room import MAX_WORKERS, Meters, Room
from ai_assistant.daemon.slot import Slot, Worker
from ai_assistant.daemon.spill import open_spill
from ai_assistant.engines import memory
from ai_assistant.engines.contract import EngineStats, Event, GenerateRequest, LoadOptions, Placement
from ai_assistant.engines.placing import MAX_AVOIDED
from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    InternalError,
    InvalidArgument,
    NoSuchModel,
    Timeout,
    WorkerCrashed,
)

__all__ = ["MAX_WORKERS", "Meters", "Residency", "Worker", "check_keep_alive", "load_options", "memory_limit"]

log = logging.getLogger(__name__)

_STABLE_S = 60.0
"""A worker that lived so long is not the same trouble as the crash before."""
_PATIENCE_S = 1.5
"""A restart that comes this soon is waited for; a longer back-off is the error it is."""
_STATS_S = 2.0
"""A worker that does not say how it is in this time is left out."""


class Residency:
    """Keeps workers. All coroutines run on one loop.

    Args:
        connect: starts a worker and returns it.
        meters: what is measured of the machine's memory.
        changed: told the name of a model whose state changed.
        pinned: whether a model, by full name, is kept loaded.
        spill_directory: where files for states of conversations are made; None: nowhere.
        disk_kept: bytes that such a file leaves free there.
    """

    def __init__(
        self,
        config: Config,
        connect: Callable[[], Awaitable[Worker]],
        meters: Meters,
        counters: Counters,
        changed: Callable[[str], None] = lambda name: None,
        pinned: Callable[[str], bool] = lambda name: False,
        spill_directory: Path | None = None,
        disk_kept: Callable[[], int] = lambda: 0,
    ) -> None:
        self._config = config
        self._connect = connect
        self._spill_directory = spill_directory
        self._disk_kept = disk_kept
        self._counters = counters
        self.changed = changed
        self._slots: dict[str, Slot] = {}
        self._room = Room(meters, self._slots.values(), self._evict, pinned, config.models_memory_reserve_bytes)
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stopping = False

    # ---- what others see

    def state(self, name: str) -> tuple[ModelState, str]:
        """(state, why the last load failed)."""
        slot = self._slots.get(name)
        return (slot.state, slot.error) if slot is not None else (ModelState.UNLOADED, "")

    def warning(self, name: str) -> str:
        """Why the loaded model is not on the devices that it was meant for; "" where it is."""
        slot = self._slots.get(name)
        return slot.warning if slot is not None else ""

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
        uid = caller.get()
        slot = self._slot(entry)
        if slot.draining:
            raise Busy(f"{entry.name} is being unloaded and takes no more requests", hint="try again in a moment")
        # Counted before the load, so that the model is not evicted between the end of it and the use.
        slot.active += 1
        slot.trimmed = False
        try:
            yield await self._loaded(slot)
        finally:
            slot.active -= 1
            slot.last_used = self._now()
            slot.stay(uid, slot.last_used + (self._default_s() if keep_alive_s is None else keep_alive_s))
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
        await self._drop(slot, "asked")

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
            await self._drop(slot, "asked")
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
        self._counters.metrics.forget(name)

    async def close(self) -> None:
        """End all workers."""
        self._stopping = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._room.close()
        await asyncio.gather(*(self.forget(name) for name in list(self._slots)))

    # ---- loading

    def _options(self, entry: Entry) -> LoadOptions:
        return entry.options or self.options

    def _slot(self, entry: Entry) -> Slot:
        slot = self._slots.get(entry.name)
        if slot is None or slot.entry is not entry:
            slot = self._slots[entry.name] = Slot(entry)
        return slot

    def _default_s(self) -> float:
        """How long a model stays when nobody uses it and nobody said how long."""
        return self._config.models_idle_unload_s or math.inf

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _loaded(self, slot: Slot) -> Worker:
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

    async def _load(self, slot: Slot) -> None:
        name = slot.entry.name
        began = self._now()
        self._set(slot, ModelState.LOADING)
        worker: Worker | None = None
        try:
            options = await self._room.make(slot, self._options(slot.entry))
            begin = self._now()
            async with asyncio.timeout(self._config.worker_load_timeout_s):
                worker = await self._connect()
                await self._send_model(slot, worker, options)
        except BaseException as error:
            slot.load = None
            slot.promised = False
            if worker is not None:
                await worker.close()
            if isinstance(error, TimeoutError):
                error = Timeout(f"loading {name} took longer than {self._config.worker_load_timeout_s:g} s")
            if isinstance(error, WorkerCrashed):
                self._crashed(slot, worker)
            if isinstance(error, Exception):
                self._counters.metrics.load_failed(name)
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
        self._placed(slot, worker.placement)
        slot.loaded_at = slot.last_used = self._now()
        slot.load_s = slot.loaded_at - begin
        slot.trimmed = False
        self._counters.metrics.loaded(name, slot.loaded_at - began)
        slot.watch = asyncio.get_running_loop().create_task(self._watch(slot, worker))
        self._set(slot, ModelState.LOADED)
        # Whoever wanted it may have left meanwhile: then nobody else starts the clock.
        self._schedule_idle()
        log.info("loaded %s", name, extra={"MODEL": name})

    async def _send_model(self, slot: Slot, worker: Worker, options: LoadOptions) -> None:
        if not options.memory_limit_bytes:
            options = replace(options, memory_limit_bytes=memory_limit(slot.resident_bytes))
        if slot.avoid:
            options = replace(options, extra={**options.extra, "avoid_devices": list(slot.avoid)})
        async with AsyncExitStack() as opened:
            fd = slot.entry.open()
            opened.callback(os.close, fd)
            files: dict[str, int] = {}
            if options.spill_disk_bytes:
                spill = await self._spill(options.spill_disk_bytes)
                if spill is None:
                    options = replace(options, spill_disk_bytes=0)
                else:
                    opened.callback(os.close, spill)
                    files["spill"] = spill
            await worker.load(fd, options, lambda value: _tell(slot, value), files)

    def _placed(self, slot: Slot, placement: Placement) -> None:
        if placement.host_bytes:
            # The rest is in a device's own memory. What it was estimated at stays the limit: the prediction is younger,
            # and no better.
            slot.resident_bytes = min(slot.resident_bytes, placement.host_bytes)
        if placement.warning and placement.warning != slot.warning:
            log.warning("%s: %s", slot.entry.name, placement.warning, extra={"MODEL": slot.entry.name})
        slot.warning = placement.warning

    async def _spill(self, size_bytes: int) -> int | None:
        if self._spill_directory is None:
            return None
        return await asyncio.to_thread(open_spill, self._spill_directory, size_bytes, self._disk_kept())

    @property
    def options(self) -> LoadOptions:
        """How models are loaded where nothing else is asked for."""
        return load_options(self._config)

    # ---- leaving

    async def _evict(self, slot: Slot) -> None:
        await self._drop(slot, "memory")

    async def _drop(self, slot: Slot, reason: str = "") -> None:
        """End its worker; what was done for a `reason` (`metrics.EVICTIONS`) is counted."""
        if slot.restart is not None:
            slot.restart.cancel()
            slot.restart = None
        worker, slot.worker = slot.worker, None
        slot.stays.clear()
        if slot.watch is not None:
            slot.watch.cancel()
            slot.watch = None
        if worker is not None:
            if reason:
                self._counters.metrics.evicted(slot.entry.name, reason)
            self._set(slot, ModelState.UNLOADED)
            await worker.close()
            log.info("unloaded %s", slot.entry.name, extra={"MODEL": slot.entry.name})
        elif slot.state is not ModelState.LOADING:
            self._set(slot, ModelState.UNLOADED)

    async def _watch(self, slot: Slot, worker: Worker) -> None:
        await asyncio.wait([worker.died])
        slot.worker = None
        slot.watch = None
        reason = worker.died.result()
        log.error("the worker of %s died: %s", slot.entry.name, reason, extra={"MODEL": slot.entry.name})
        if self._now() - slot.loaded_at > _STABLE_S:
            slot.crashes = 0
        self._crashed(slot, worker)
        self._set(slot, ModelState.FAILED, "its worker crashed")
        await worker.close()

    def _crashed(self, slot: Slot, worker: Worker | None) -> None:
        slot.crashes += 1
        if worker is not None and (devices := worker.placement.devices):
            # Perhaps it was the driver, perhaps not; without the device there is one suspect less.
            slot.avoid = tuple(dict.fromkeys((*slot.avoid, *devices)))[:MAX_AVOIDED]
            log.warning(
                "%s is loaded without %s from now on", slot.entry.name, ", ".join(devices),
                extra={"MODEL": slot.entry.name},
            )  # fmt: skip
        first, longest = self._config.worker_restart_first_s, self._config.worker_restart_longest_s
        wait = min(longest, first * 2.0 ** min(slot.crashes - 1, 30))
        slot.retry_at = self._now() + wait
        self._counters.worker_restarts += 1
        self._counters.metrics.restarted(slot.entry.name)
        if slot.crashes <= self._config.worker_restart_attempts and not self._stopping and not slot.gone:
            slot.restart = asyncio.get_running_loop().create_task(self._restart(slot, wait))

    async def _restart(self, slot: Slot, wait: float) -> None:
        await asyncio.sleep(wait)
        slot.restart = None
        try:
            await self._loaded(slot)
        except AIAssistantError as error:
            log.warning("restarting the worker of %s failed: %s", slot.entry.name, error.message)

    def _set(self, slot: Slot, state: ModelState, error: str = "") -> None:
        slot.state, slot.error = state, error
        if not slot.gone:
            self.changed(slot.entry.name)

    def _schedule_idle(self) -> None:
        """One timer for the model that is due first, so that an idle daemon does not wake up."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if not self._stopping:
            self._room.watch()
        default_s = self._default_s()
        due = [each.due(default_s) for each in self._slots.values() if self._room.evictable(each)]
        first = min(due, default=math.inf)
        if first < math.inf and not self._stopping:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_at(first, self._unload_idle)

    def _unload_idle(self) -> None:
        self._idle_timer = None
        now = self._now() + 0.01
        default_s = self._default_s()
        for slot in self._slots.values():
            if self._room.evictable(slot) and slot.due(default_s) <= now:
                log.info("%s is idle", slot.entry.name, extra={"MODEL": slot.entry.name})
                task = asyncio.get_running_loop().create_task(self._drop(slot, "idle"))
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
        kv_type=config.models_kv_type,
        speculative=config.models_speculative,
        spill_memory_bytes=config.models_spill_memory_bytes,
        spill_disk_bytes=config.models_spill_disk_bytes,
        hetero_compute=config.models_hetero_compute,
    )


def _tell(slot: Slot, value: float) -> None:
    for each in list(slot.progress):
        each(value)


def _retrieve(task: asyncio.Task[None]) -> None:
    # Whoever waits gets the exception; when nobody does any more it must not be reported as lost.
    if not task.cancelled():
        task.exception()
