"""The seam inside the daemon: what the bus and the socket API ask, and the service answers.

Both interfaces are thin translations of this protocol, so that a model, an error or a permission
means the same on each. Nothing here imports a bus or an HTTP library.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ai_assistant.engines.contract import Event, GenerateRequest

caller: ContextVar[int | None] = ContextVar("caller", default=None)
"""User id of whoever asks in this task; None is the daemon itself. Both interfaces set it as soon as they know, and
the service shows and lends a transient model only to the user who passed it, and to root."""


class ModelState(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A model that the daemon knows. Sizes in bytes, context in tokens, `created` in Unix seconds."""

    name: str
    """`name:version`, unique."""
    state: ModelState
    size_bytes: int
    format: str
    architecture: str
    parameters: int
    quantization: str
    context_length: int
    memory_estimate_bytes: int
    created: int
    builtin: bool = False
    transient: bool = False
    """Passed as a descriptor; dies with the connection of its owner."""
    error: str = ""
    """Why the last load failed; empty otherwise."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks. Groups are the supplementary and primary groups, as numbers."""

    uid: int
    gid: int
    groups: frozenset[int]
    pid: int = 0


class Scope(StrEnum):
    """What a caller may want to do; one polkit action each (`org.ai-assistant1.<scope>`)."""

    READ = "read"
    INFER = "infer"
    LOAD = "load"
    IMPORT = "import"
    UNLOAD = "unload"
    REMOVE = "remove"


@dataclass(slots=True)
class Counters:
    """Totals since the start, for /metrics. Seconds and tokens."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    worker_restarts: int = 0
    running: int = 0


class Service(Protocol):
    """The daemon's inside, as both interfaces see it. All coroutines run on the daemon's one loop."""

    counters: Counters

    def models(self) -> Sequence[ModelRecord]:
        """All known models, sorted by name; transient ones last."""

    def model(self, name: str) -> ModelRecord:
        """By full name, or by the bare name of its newest version. A bare name is never a transient model.

        Raises:
            NoSuchModel: also for another user's transient model, see `caller`.
        """

    def generate(self, name: str, request: GenerateRequest) -> AsyncGenerator[Event]:
        """Load the model if needed and generate; closing the generator cancels and frees the slot.

        Raises:
            NoSuchModel, ContextOverflow, InvalidArgument, Busy, OutOfMemory, WorkerCrashed
        """

    async def embed(self, name: str, texts: Sequence[str]) -> tuple[list[list[float]], int]: ...

    async def tokenize(self, name: str, text: str) -> list[int]: ...

    def health(self) -> str:
        """ "ok", or a sentence that says what is wrong while the state is degraded."""

    def status(self) -> Mapping[str, Any]:
        """JSON-ready state of machine and daemon: see daemon/README.md for the keys."""
