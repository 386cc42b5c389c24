"""What the SDK hands back: plain values, the same from the daemon and from an engine in this process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypedDict, TypeVar

from ai_assistant.engines.contract import FinishReason, TokenLogprob, ToolCall, Usage
from ai_assistant.errors import AIAssistantError, Cancelled, from_name


class GenerateParams(TypedDict, total=False):
    """The keyword arguments of every generating call: `GenerateRequest` without its `prompt` and `messages`,
    with `regex` for its `response_regex`, and `keep_alive`: how long the daemon keeps the model loaded afterwards."""

    tools: list[dict[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
    response_schema: Mapping[str, Any]
    max_tokens: int
    stop: list[str]
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: Mapping[str, float]
    priority: str
    ignore_eos: bool
    logprobs: int
    regex: str
    keep_alive: float | str
    hetero_compute: str


class Completion(str):
    """The text of one answer: a `str` that also says why it ended and what it cost."""

    finish_reason: FinishReason
    usage: Usage
    model: str
    logprobs: tuple[TokenLogprob, ...]
    choices: tuple[Completion, ...]
    """All answers, where n was more than one, this first; empty otherwise."""

    def __new__(
        cls,
        text: str,
        *,
        finish_reason: FinishReason = FinishReason.STOP,
        usage: Usage | None = None,
        model: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Self:
        self = super().__new__(cls, text)
        self.finish_reason = finish_reason
        self.usage = usage or Usage()
        self.model = model
        self.logprobs = logprobs
        self.choices = ()
        return self

    @property
    def text(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """The assistant's turn in a conversation. `str(message)` is its text; `to_dict` goes into the next request."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = FinishReason.STOP
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    role: str = "assistant"
    choices: tuple[Message, ...] = field(default=(), compare=False, repr=False)
    """All answers, where n was more than one, this first; empty otherwise."""

    def __str__(self) -> str:
        return self.content

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": f"call_{index}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for index, c in enumerate(self.tool_calls)
            ]
        return out


T = TypeVar("T")


class Results(list[T]):
    """A list that also says which devices made it, where that was asked by `hetero_compute`; see docs/hetero.md."""

    def __init__(self, values: Iterable[T], devices: Sequence[str] = ()) -> None:
        super().__init__(values)
        self.devices = tuple(devices)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One of the documents that were ranked: its place among those given, and how well it answers (0–1)."""

    index: int
    score: float


def ranked(scores: Sequence[float], top_n: int | None) -> list[Ranked]:
    """Best first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [Ranked(index, scores[index]) for index in order[:top_n]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that the daemon knows. Sizes in bytes, context in tokens, `created` in Unix seconds."""

    name: str
    """`name:version`."""
    state: str
    """unloaded | loading | loaded | failed."""
    size_bytes: int = 0
    format: str = ""
    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    context_length: int = 0
    memory_estimate_bytes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    """The parts of that estimate, in bytes."""
    resident_bytes: int = 0
    """What was set aside for it; 0 unless it is loaded."""
    pinned: bool = False
    capabilities: Sequence[str] = ()
    builtin: bool = False
    transient: bool = False
    created: int = 0
    error: str = ""
    """Why the last load failed; empty otherwise."""
    warning: str = ""
    """Why it is loaded elsewhere than it was meant to be; empty otherwise."""

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> Self:
        """From the bus properties of org.ai_assistant1.Model; unknown ones (a newer daemon) are left out."""
        known = {attribute: properties[prop] for prop, attribute in _MODEL_PROPERTIES.items() if prop in properties}
        return cls(**{"name": "", "state": "unknown", **known})


_MODEL_PROPERTIES = {
    "Name": "name",
    "State": "state",
    "SizeBytes": "size_bytes",
    "Format": "format",
    "Architecture": "architecture",
    "Parameters": "parameters",
    "Quantization": "quantization",
    "ContextLength": "context_length",
    "MemoryEstimateBytes": "memory_estimate_bytes",
    "Memory": "memory",
    "ResidentBytes": "resident_bytes",
    "Pinned": "pinned",
    "Capabilities": "capabilities",
    "Builtin": "builtin",
    "Transient": "transient",
    "Created": "created",
    "Error": "error",
    "Warning": "warning",
}

_ENDED = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A look at a long piece of work. `progress` runs from 0 to 1."""

    kind: str
    state: str
    """queued | running | done | failed | cancelled."""
    progress: float
    message: str
    error: AIAssistantError | None
    result: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    """The message in numbers; a download has "bytes", "total_bytes", "bytes_per_s" and "eta_s" where they are known."""

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> Self:
        """From the bus properties of org.ai_assistant1.Job."""
        state = str(properties.get("State", "queued"))
        message = str(properties.get("Message", ""))
        name, text = [*properties.get("Error", ()), "", ""][:2]
        error: AIAssistantError | None = None
        if name or state == "failed":
            sentence, hint = split_hint(text or message or "the work failed")
            error = from_name(name or "InternalError", sentence, hint=hint)
        elif state == "cancelled":
            error = Cancelled("the work was cancelled")
        return cls(
            kind=str(properties.get("Kind", "")),
            state=state,
            progress=float(properties.get("Progress", 0.0)),
            message=message,
            error=error,
            result=dict(properties.get("Result", {})),
            details=dict(properties.get("Details", {})),
        )


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    name: str
    ok: bool
    detail: str


def split_hint(text: str) -> tuple[str, str]:
    """A bus error carries its hint inside its message: "sentence (hint: what to do)"."""
    sentence, mark, rest = text.rpartition(" (hint: ")
    return (sentence, rest.removesuffix(")")) if mark and rest.endswith(")") else (text, "")


def default_model(models: list[Model]) -> Model | None:
    """The model that is meant when none is named.

    Somebody's own model goes before the built-in one, which only knows the appliance's actions; a
    loaded one before one that must be loaded first; then the newest. Transient models belong to others.
    """
    own = [each for each in models if not each.transient]
    own.sort(key=lambda each: (not each.builtin, each.state == "loaded", each.created, each.name))
    return own[-1] if own else None


STATUS_KEYS = (
    "version",
    "state",
    "profile",
    "hostname",
    "os",
    "kernel",
    "uptime_s",
    "load_1m",
    "cpu",
    "cores",
    "addresses",
    "memory_total_bytes",
    "memory_available_bytes",
    "disk_total_bytes",
    "disk_free_bytes",
    "temperature_c",
    "temperatures",
    "watts",
    "watts_source",
    "storage_encryption",
    "storage_reason",
    "storage_opened_by",
    "secure_boot",
    "recovery_key_pending",
    "models",
    "running",
)
"""What `Client.status` always has; None where nothing measures it, since the bus has no null and leaves it out."""


def slug(name: str) -> str:
    """The nearest thing to `name` that may name a model."""
    clean = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64].rstrip("-._")
    return clean or "model"
