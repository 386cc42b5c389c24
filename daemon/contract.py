"""The seam inside the daemon: what the bus and the socket API ask, and the service answers.

Both interfaces are thin translations of this protocol, so that a model, an error or a permission
means the same on each. Nothing here imports a bus or an HTTP library.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ai_assistant.daemon.metrics import Metrics
from ai_assistant.engines.contract import EngineStats, Event, GenerateRequest
from ai_assistant.engines.hetero import Wish
from ai_assistant.engines.memory import MemoryEstimate

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
    warning: str = ""
    """Why it is loaded elsewhere than it was meant to be: a device that failed, or is avoided; empty otherwise."""
    pinned: bool = False
    """Never unloaded to make room, nor for being idle."""
    capabilities: tuple[str, ...] = ()
    """Any of "generate", "embed", "rerank", "classify"."""
    memory: MemoryEstimate = field(default_factory=MemoryEstimate)
    """What loading it takes with the present configuration; its total is `memory_estimate_bytes`."""
    resident_bytes: int | None = None
    """What its worker was estimated to take when it was loaded; None unless it is."""


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
    NETWORK_API = "network-api"


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
    metrics: Metrics = field(default_factory=Metrics)
    """The same and more of each model."""


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

    def generate(self, name: str, request: GenerateRequest, keep_alive_s: float | None = None) -> AsyncGenerator[Event]:
        """Load the model if needed and generate; closing the generator cancels and frees the slot.

        Args:
            keep_alive_s: how long the model stays loaded when nobody uses it afterwards, in seconds. None: as the
                configuration says; 0: not at all; infinity: until memory is needed. Of one user the last request
                counts, of several users the longest wish, and a pinned model stays.

        Raises:
            NoSuchModel, ContextOverflow, InvalidArgument, Busy, OutOfMemory, WorkerCrashed
        """

    async def embed(
        self, name: str, texts: Sequence[str], keep_alive_s: float | None = None, wish: Wish | None = None
    ) -> tuple[list[list[float]], int]:
        """Vectors of length 1, and the number of tokens read.

        Args:
            wish: for devices; it is told which ones it were.

        Raises:
            NotSupported: the model makes no vectors, or not on these devices.
        """

    async def rerank(
        self,
        name: str,
        query: str,
        documents: Sequence[str],
        keep_alive_s: float | None = None,
        wish: Wish | None = None,
    ) -> tuple[list[float], int]:
        """A score from 0 to 1 for each document, higher is better, and the number of tokens read.

        Raises:
            NotSupported: the model makes no such judgement.
        """

    async def classify(
        self, name: str, texts: Sequence[str], keep_alive_s: float | None = None, wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        """For each text its labels with their probabilities, likeliest first; and the number of tokens read.

        Raises:
            NotSupported: the model makes no such judgement.
        """

    async def tokenize(self, name: str, text: str) -> list[int]: ...

    async def detokenize(self, name: str, tokens: Sequence[int]) -> str:
        """Raises InvalidArgument for a number that is no token of the model."""

    async def stats(self) -> Mapping[str, EngineStats]:
        """What each loaded model does right now, by full name; one that does not answer in time is left out.

        Transient models of others are left out, see `caller`.
        """

    def estimate(self, name: str, context_length: int = 0, sequences: int = 0) -> MemoryEstimate:
        """What loading the model takes with these options (0: as the configuration says).

        Raises:
            NoSuchModel, InvalidArgument
        """

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep a model loaded, over restarts, or no longer. Pinning does not load it.

        Raises:
            NoSuchModel
            NotSupported: a transient model.
            InternalError: it cannot be remembered.
        """

    async def drain(self, name: str) -> None:
        """Take no new requests for the model, let those that run finish, then unload it; returns when it is.

        Raises:
            NoSuchModel
            Timeout: something still runs after the time that the configuration gives; the model is used again.
        """

    def health(self) -> str:
        """ "ok", or a sentence that says what is wrong while the state is degraded."""

    def status(self) -> Mapping[str, Any]:
        """JSON-ready state of machine and daemon: see daemon/README.md for the keys."""
