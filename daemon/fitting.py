"""How a model is loaded into the memory that there is: as asked for, or with less, the least painful first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ai_assistant.engines import memory
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.memory import MemoryShape


def fitting(shape: MemoryShape, options: LoadOptions, room_bytes: int) -> LoadOptions | None:
    """Options with which the model fits `room_bytes`, everything chosen that was left open; None: it does not fit.

    First as asked for; then without states of idle conversations, which only save time; then without weights copied
    into a faster layout; then with a smaller cache, see `memory.settle`.
    """
    for each in _variants(shape, options, room_bytes):
        if memory.estimate(shape, each).total_bytes <= room_bytes:
            return memory.settled(shape, each)
    return None


def least_bytes(shape: MemoryShape, options: LoadOptions) -> int:
    """What the model takes at the least."""
    return min(memory.estimate(shape, each).total_bytes for each in _variants(shape, options, 0))


def _variants(shape: MemoryShape, options: LoadOptions, room_bytes: int) -> Iterator[LoadOptions]:
    yield options
    if options.spill_memory_bytes:
        options = replace(options, spill_memory_bytes=0)
        yield options
    if options.repack and shape.repacked_bytes:
        options = replace(options, repack=False)
        yield options
    # A shorter context has a smaller mask as well, so what is left for the cache is worked out twice.
    tried = options
    for _ in range(2):
        taken = memory.estimate(shape, tried)
        limit = max(1, room_bytes - (taken.total_bytes - taken.kv_bytes))
        if options.kv_limit_bytes:
            limit = min(limit, options.kv_limit_bytes)
        tried = replace(options, kv_limit_bytes=limit)
        yield tried
