"""The memory that models may take: finding it, making it, and giving it back when the machine runs short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass

from ai_assistant.daemon.fitting import fitting, least_bytes
from ai_assistant.daemon.pressure import Gauge, Relief
from ai_assistant.daemon.slot import Slot, worst
from ai_assistant.engines import memory
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.errors import AIAssistantError, Busy, OutOfMemory

log = logging.getLogger(__name__)

_TRIM_S = 5.0
"""A worker that does not give back its caches in this time keeps them."""
_STATS_S = 1.0
"""A worker that does not say in this time how much of its cache is still to be taken counts with all of it."""
_WATCH_S = 5.0
"""How often memory pressure is looked at while an idle model is loaded."""
MAX_WORKERS = 30
"""The socket unit accepts 32 (MaxConnections=), and two of those may be ending."""


@dataclass(frozen=True, slots=True)
class Meters:
    """What is measured of the machine; each returns None where nobody knows."""

    available: Callable[[], int | None]
    """Bytes that can be had without swapping."""
    total: Callable[[], int | None] = lambda: None
    """Bytes of the machine. Mapped weights are page cache, which counts as available though a loaded model needs it:
    what is left of the total is the other bound."""
    pressure: Callable[[], float | None] = lambda: None
    """Percent of time in which something waits for memory; see `pressure.some_avg10`."""


class Room:
    """Finds memory for models, at the cost of idle ones.

    Args:
        slots: all of them, as they are now.
        drop: unloads one.
        pinned: whether a model, by full name, is kept loaded.
        reserve_bytes: what stays free.
    """

    def __init__(
        self,
        meters: Meters,
        slots: Collection[Slot],
        drop: Callable[[Slot], Awaitable[None]],
        pinned: Callable[[str], bool],
        reserve_bytes: int,
    ) -> None:
        self._meters = meters
        self._slots = slots
        self._drop = drop
        self._pinned = pinned
        self._reserve = reserve_bytes
        self._evicting = asyncio.Lock()
        self._gauge = Gauge()
        self._watching: asyncio.Task[None] | None = None

    async def make(self, slot: Slot, wanted: LoadOptions) -> LoadOptions:
        """Unload idle models until the model fits, and promise it the memory; the options that it is to be loaded with.

        None is unloaded for a model that would not fit even then.

        Raises:
            OutOfMemory: with the numbers.
            Busy: as many workers as there may be, and all of them work.
        """
        shape = slot.entry.memory
        async with self._evicting:
            while True:
                idle = [each for each in self._slots if self.evictable(each)]
                promised = [each for each in self._slots if each.promised]
                workers = len(promised) + sum(1 for each in self._slots if each.worker is not None)
                full = workers >= MAX_WORKERS
                if full and not idle:
                    raise Busy(f"{workers} models are in use", hint="wait until one of them has answered")
                options, free, fits = memory.settled(shape, wanted), 0, True
                untouched = await self._untouched()
                available = self._available()
                if available is not None:
                    # Others that load now have not taken their memory yet, and it is promised to them; those that are
                    # loaded may fill their caches.
                    free = available - _resident(promised) - untouched
                    room = free - self._reserve
                    found = fitting(shape, wanted, room + _resident(idle))
                    if found is None:
                        raise self._too_large(slot, wanted, free)
                    options = found
                    fits = memory.estimate(shape, options).total_bytes <= room
                if fits and not full:
                    # Nothing waits from here on, so the next one that asks for room counts this one.
                    slot.resident_bytes = memory.estimate(shape, options).total_bytes
                    slot.promised = True
                    _tell_difference(slot.entry.name, wanted, options)
                    return options
                if not full and any(not each.trimmed for each in idle):
                    await self._trim(idle)
                    continue
                victim = worst(idle, _now())
                log.info("unloading %s to make room for %s", victim.entry.name, slot.entry.name)
                await self._drop(victim)
                needed = memory.estimate(shape, options).total_bytes
                await self._settled(needed + self._reserve + _resident(promised))

    async def _untouched(self) -> int:
        """Bytes of caches of loaded models that are taken when they fill."""
        loaded = [each for each in self._slots if each.worker is not None and not each.promised]
        return sum(await asyncio.gather(*(self._untouched_of(each) for each in loaded)))

    async def _untouched_of(self, slot: Slot) -> int:
        if slot.worker is None:
            return 0
        try:
            async with asyncio.timeout(_STATS_S):
                return (await slot.worker.stats()).kv_untouched_bytes
        except (TimeoutError, AIAssistantError):
            # It does not say: perhaps all but the weights.
            return max(0, slot.resident_bytes - slot.entry.memory.weights_bytes)

    def evictable(self, slot: Slot) -> bool:
        """Loaded, used by nobody, and not pinned."""
        return slot.idle and not self._pinned(slot.entry.name)

    def _available(self) -> int | None:
        """Bytes for models that are not loaded."""
        available, total = self._meters.available(), self._meters.total()
        if available is None or total is None:
            return available
        return min(available, total - _resident(each for each in self._slots if each.worker is not None))

    def _too_large(self, slot: Slot, options: LoadOptions, free: int) -> OutOfMemory:
        needed = memory.estimate(slot.entry.memory, options).total_bytes
        least = least_bytes(slot.entry.memory, options)
        pinned = [each.entry.name for each in self._slots if each.worker and self._pinned(each.entry.name)]
        return OutOfMemory(
            f"{slot.entry.name} needs about {needed} bytes of memory, {least} at the least; {max(0, free)} bytes "
            f"are available, of which {self._reserve} stay free",
            hint=f"unpin {pinned[0]}" if pinned else "unload a model, or set models.context_length lower",
        )

    async def _settled(self, wanted: int) -> None:
        """A process takes a moment to give its memory back; do not evict the next one meanwhile."""
        for _ in range(20):
            available = self._available()
            if available is None or available >= wanted:
                return
            await asyncio.sleep(0.05)

    # ---- giving back

    async def _trim(self, slots: Iterable[Slot]) -> None:
        """Let idle models give back what they can have again without loading."""
        await asyncio.gather(*(self._trim_one(each) for each in slots if each.idle and not each.trimmed))

    async def _trim_one(self, slot: Slot) -> None:
        assert slot.worker is not None
        slot.trimmed = True
        try:
            async with asyncio.timeout(_TRIM_S):
                freed = await slot.worker.trim()
            log.info("%s gave back %d bytes", slot.entry.name, freed, extra={"MODEL": slot.entry.name})
        except (TimeoutError, AIAssistantError) as error:
            log.warning("%s gives nothing back: %s", slot.entry.name, error or "no answer")

    def watch(self) -> None:
        """Begin to look at memory pressure, if it is measured here and an idle model is loaded; idempotent."""
        if (self._watching is None or self._watching.done()) and self._meters.pressure() is not None:
            self._watching = asyncio.get_running_loop().create_task(self._relieve(), name="memory-pressure")

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _relieve(self) -> None:
        """While idle models are loaded, look at memory pressure and do something about it."""
        while idle := [each for each in self._slots if each.idle]:
            await asyncio.sleep(_WATCH_S)
            await self.relieve_once([each for each in idle if each.idle])

    async def relieve_once(self, idle: Collection[Slot]) -> None:
        """Look at the pressure now, and do what it asks for to these idle models."""
        relief = self._gauge.wanted(self._meters.pressure(), trimmed=all(each.trimmed for each in idle))
        if relief is Relief.TRIM:
            await self._trim(idle)
        elif relief is Relief.UNLOAD:
            async with self._evicting:
                evictable = [each for each in idle if self.evictable(each)]
                if evictable:
                    victim = worst(evictable, _now())
                    log.warning("unloading %s: memory is short", victim.entry.name, extra={"MODEL": victim.entry.name})
                    await self._drop(victim)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _resident(slots: Iterable[Slot]) -> int:
    return sum(each.resident_bytes for each in slots)


def _tell_difference(name: str, wanted: LoadOptions, options: LoadOptions) -> None:
    less = [
        f"{each} {getattr(options, each)}"
        for each in ("repack", "kv_type", "context_length", "sequences", "spill_memory_bytes")
        if getattr(wanted, each) not in (getattr(options, each), 0, "auto")
    ]
    if less:
        log.warning("memory is short: loading %s with %s", name, ", ".join(less), extra={"MODEL": name})
