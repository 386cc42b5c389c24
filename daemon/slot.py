"""A model's place in memory, and the worker process that may fill it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ai_assistant.daemon.contract import ModelState
from ai_assistant.daemon.registry import Entry
from ai_assistant.engines.contract import EngineStats, Event, GenerateRequest, LoadOptions, ModelInfo, Placement
from ai_assistant.engines.hetero import Wish

_LEAST_LOAD_S = 0.01


class Worker(Protocol):
    """One worker process, seen from the daemon; `daemon/worker/protocol.py` has the real one."""

    died: asyncio.Future[str]
    """Done when the process is gone, for whatever reason."""

    placement: Placement
    """Where the model's layers are; from before the moment in which a device beside the processor gets any."""

    async def load(
        self,
        fd: int,
        options: LoadOptions,
        on_progress: Callable[[float], None] | None = None,
        files: Mapping[str, int] | None = None,
    ) -> ModelInfo: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]: ...

    async def embed(self, texts: Sequence[str], wish: Wish | None = None) -> tuple[list[list[float]], int]: ...

    async def rerank(
        self, query: str, documents: Sequence[str], wish: Wish | None = None
    ) -> tuple[list[float], int]: ...

    async def classify(
        self, texts: Sequence[str], wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]: ...

    async def tokenize(self, text: str) -> list[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def stats(self) -> EngineStats: ...

    async def trim(self) -> int: ...

    async def close(self) -> None:
        """End the process."""


@dataclass(eq=False, slots=True)
class Slot:
    """What residency knows of one model. Times are the loop's, in seconds."""

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
    stays: dict[int | None, float] = field(default_factory=dict)
    """Until when each user who asked since it was loaded wants it to stay; infinity: until memory is needed."""
    draining: bool = False
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever somebody stops using it."""
    trimmed: bool = False
    """It has given back what it can since it was used last."""
    resident_bytes: int = 0
    """What it was estimated to take, from the moment that this was found free for it."""
    promised: bool = False
    """It loads, and that memory is not in use yet."""
    load_s: float = _LEAST_LOAD_S
    """How long the last load took."""
    loaded_at: float = 0.0
    crashes: int = 0
    retry_at: float = 0.0
    gone: bool = False
    avoid: tuple[str, ...] = ()
    """Devices that this model's worker died with: not used again before the daemon or the model is a new one."""
    warning: str = ""
    """Why the loaded model is not where it was meant to be."""

    @property
    def idle(self) -> bool:
        """Loaded, and nobody uses it."""
        return self.worker is not None and self.active == 0

    def due(self, default_s: float) -> float:
        """When a model that nobody uses is unloaded: not before the last of those who asked can do without."""
        return max(self.stays.values(), default=self.last_used + default_s)

    def stay(self, uid: int | None, until: float) -> None:
        """A user's last wish replaces that user's earlier ones, and nobody else's.

        Who comes by the network is -1 and may be anybody, so there the longest wish counts.
        """
        self.stays[uid] = max(until, self.stays.get(uid, until)) if uid == -1 else until

    def score(self, now: float) -> float:
        """How well this one can be done without: the highest goes first.

        Idle time over what having it back costs: the time of its load, times its weight.
        """
        weight = max(self.resident_bytes, 1)
        return max(now - self.last_used, 0.0) / (max(self.load_s, _LEAST_LOAD_S) * weight)


def worst(slots: Sequence[Slot], now: float) -> Slot:
    """The one to unload first."""
    return max(slots, key=lambda each: (each.score(now), -each.last_used))
