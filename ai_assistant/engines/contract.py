"""What an engine is asked and what it answers: plain frozen values and one small protocol.

The same values travel in process (SDK), over the worker's socket (JSON) and out of both public
interfaces, so a request is parsed and checked once, at the edge, by `GenerateRequest.from_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Protocol, Self, runtime_checkable

from ai_assistant.errors import InvalidArgument

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_REGEX = 4096
"""Characters of a regular expression that an answer must match."""


class Priority(StrEnum):
    """Who goes first where requests wait; within one, first come, first served."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation: either `messages` (chat, rendered with the model's own template) or `prompt` (raw text)."""

    messages: tuple[Mapping[str, Any], ...] | None = None
    """OpenAI chat messages: role system | user | assistant | tool, content text or text parts."""
    prompt: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI tool definitions: {"type": "function", "function": {"name", "description", "parameters"}}."""
    tool_choice: str = "auto"
    """none | auto | required | the name of one function."""
    parallel_tool_calls: bool = True
    """Whether one answer may have several calls."""
    response_schema: Mapping[str, Any] | None = None
    """A JSON schema that the whole answer must match; {} means any JSON object."""
    response_regex: str | None = None
    """A regular expression that the whole answer must match; not together with a schema."""
    max_tokens: int | None = None
    """None: until the model stops or its context is full."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """1 is off."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    """Divides the logits of tokens among the last `repeat_last_n`, prompt included; 1 is off."""
    repeat_last_n: int = 64
    mirostat: int = 0
    """0 off, else version 1 or 2, which replaces top-k, top-p, min-p and typical-p."""
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    """Token number, as text, to what is added to its logit: −100 to 100."""
    priority: str = Priority.INTERACTIVE
    ignore_eos: bool = False
    """Generate until max_tokens whatever the model says; for measurements."""
    logprobs: int | None = None
    """None: off; n: each token's log-probability and the n likeliest alternatives (0–20)."""
    hetero_compute: str | None = None
    """What is wanted of several devices, see docs/hetero.md; None: nothing, and then the answer names none."""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise InvalidArgument("give either messages or a prompt", param="messages")
        if self.messages is not None and not self.messages:
            raise InvalidArgument("messages is empty", param="messages")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            # NaN compares false with everything, so the test is for being inside.
            if not (low <= value <= high) or not math.isfinite(value):
                raise InvalidArgument(f"{name} must be between {low} and {high}, not {value}", param=name)
        if len(self.stop) > MAX_STOPS or any(not each for each in self.stop):
            raise InvalidArgument(f"stop takes at most {MAX_STOPS} non-empty strings", param="stop")
        if self.response_regex is not None and self.response_schema is not None:
            raise InvalidArgument("give a schema or a regular expression, not both", param="response_regex")
        if self.response_regex is not None and len(self.response_regex) > MAX_REGEX:
            raise InvalidArgument(f"response_regex takes at most {MAX_REGEX} characters", param="response_regex")
        if self.priority not in tuple(Priority):
            raise InvalidArgument("priority must be interactive or batch", param="priority")
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidArgument(f"logit_bias takes at most {MAX_BIASES} tokens", param="logit_bias")
        if self.hetero_compute is not None:
            from ai_assistant.hal.hetero.intent import parse  # few requests have one

            parse(self.hetero_compute)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Check types and ranges of an untrusted mapping; unknown keys are errors.

        Raises:
            InvalidArgument: with the parameter's name.
        """
        known = {each.name for each in fields(cls)}
        for key in values:
            if key not in known:
                raise InvalidArgument(f"unknown parameter {str(key)[:80]!r}", param=str(key)[:80])
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if value is None:
                continue
            clean[key] = _checked(key, value)
        return cls(**clean)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; fields at their defaults are left out."""
        out: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            if value != default:
                out[each.name] = list(value) if isinstance(value, tuple) else value
        return out


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 10_000_000),
    ("seed", -(2**63), 2**63 - 1),
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 1_000_000),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, 1.0),
    ("repeat_penalty", 0.01, 10.0),
    ("repeat_last_n", 0, 65_536),
    ("mirostat", 0, 2),
    ("mirostat_tau", 0.0, 100.0),
    ("mirostat_eta", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("logprobs", 0, MAX_LOGPROBS),
)
_INTEGERS = frozenset({"max_tokens", "seed", "top_k", "logprobs", "repeat_last_n", "mirostat"})
_FLOATS = frozenset(
    {
        "temperature", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty", "repeat_penalty",
        "mirostat_tau", "mirostat_eta",
    }
)  # fmt: skip
_TEXTS = ("prompt", "tool_choice", "response_regex", "priority", "hetero_compute")


def _checked(key: str, value: Any) -> Any:
    if key in _INTEGERS:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidArgument(f"{key} must be an integer", param=key)
        return value
    if key in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidArgument(f"{key} must be a number", param=key)
        return float(value)
    if key in ("ignore_eos", "parallel_tool_calls"):
        if not isinstance(value, bool):
            raise InvalidArgument(f"{key} must be true or false", param=key)
        return value
    if key == "logit_bias":
        return _biases(value)
    if key in _TEXTS:
        if not isinstance(value, str):
            raise InvalidArgument(f"{key} must be a string", param=key)
        return value
    if key == "response_schema":
        if not isinstance(value, Mapping):
            raise InvalidArgument("response_schema must be an object", param=key)
        return value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidArgument(f"{key} must be a list", param=key)
    wanted: type = str if key == "stop" else Mapping
    for index, each in enumerate(value):
        if not isinstance(each, wanted):
            kind = "a string" if wanted is str else "an object"
            raise InvalidArgument(f"{key}[{index}] must be {kind}", param=f"{key}[{index}]")
    return tuple(value)


def _biases(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise InvalidArgument("logit_bias must be an object", param="logit_bias")
    for token, bias in value.items():
        path = f"logit_bias.{str(token)[:20]}"
        # isdecimal: int() would take signs, spaces and underscores as well.
        if not isinstance(token, str) or not token.isascii() or not token.isdecimal() or len(token) > 9:
            raise InvalidArgument("logit_bias names tokens by their number", param=path)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidArgument("a bias must be between -100 and 100", param=path)
    return {token: float(bias) for token, bias in value.items()}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One sampled token: its text, raw bytes, natural log-probability, and the likeliest alternatives."""

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """A JSON object as text, as the OpenAI interface has it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer cost. Times in seconds; energy in joules, None where nothing measures it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    energy_j: float | None = None
    devices: tuple[str, ...] = ()
    """Which ones it ran on, where the request had `hetero_compute`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the answer; text may be empty while a multi-byte character is incomplete."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a generation that was not cancelled and did not fail."""

    reason: FinishReason
    usage: Usage
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Queued:
    """The generation waits for a place: how many are before it, and when it may begin (None: nobody knows).

    Comes first if at all, and again when the position has changed, at most once a second.
    """

    position: int
    eta_s: float | None = None


Event = Chunk | Finished | Queued


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What a loaded model does right now; totals count from its load."""

    running: int = 0
    waiting: int = 0
    sequences: int = 0
    kv_cells: int = 0
    """Tokens that the cache has room for."""
    kv_used: int = 0
    kv_untouched_bytes: int = 0
    """Memory of the cache that is taken only when it fills."""
    prefix_hits: int = 0
    """Prompts of which something was in the cache."""
    prefix_tokens: int = 0
    """Tokens that were not read again for that."""
    spilled_bytes: int = 0
    restored: int = 0
    """Conversations whose state came back from memory or disk."""
    draft_tokens: int = 0
    draft_accepted: int = 0
    prefill_tokens_per_s: float = 0.0
    """Of the last seconds in which there was any, like the next."""
    decode_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a loaded or inspected model says of itself. Sizes in bytes, context in tokens."""

    format: str
    architecture: str
    parameters: int
    size_bytes: int
    quantization: str
    context_length: int
    """What the model was trained for."""
    has_chat_template: bool
    can_embed: bool
    name: str = ""
    can_generate: bool = True
    can_rerank: bool = False
    can_classify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load. Zero means: choose by the machine and the model."""

    context_length: int = 0
    """Tokens per sequence."""
    sequences: int = 4
    """Generations that run at the same time."""
    threads: int = 0
    batch_tokens: int = 512
    """Tokens per decode step."""
    memory_limit_bytes: int = 0
    kv_type: str = "auto"
    """Elements of the KV cache: f16, q8_0, q4_0, or auto: the best that the memory allows."""
    kv_limit_bytes: int = 0
    """What the KV cache may take at most; auto and a context_length of 0 keep to it."""
    repack: bool = True
    """Whether the CPU may copy weights into a faster layout, which costs their size once more."""
    speculative: str = "auto"
    """off, lookup (guess from the prompt), draft (by the draft model), or auto: what measures faster."""
    spill_memory_bytes: int = 0
    """States of idle conversations kept in memory."""
    spill_disk_bytes: int = 0
    """The same in the file that comes as `spill`."""
    hetero_compute: str = ""
    """Which devices may have layers, as in docs/hetero.md; empty: what the environment says, or OFF."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For the engine: `max_queued`; `avoid_devices`, names; `placing`, a function that is told a `Placement` before
    anything is loaded to devices beside the processor."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's layers are.

    Args:
        parts: (device, layers) in the order in which they run; the output counts as the last layer.
        memory_bytes: what each device was predicted to hold.
        host_bytes: of the host's memory, with what devices have of it that share it; 0 where all of the model is there.
        warning: why it is not as it was meant to be; "" where it is.
    """

    parts: tuple[tuple[str, int], ...] = ()
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    warning: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        """Those beside the processor."""
        return tuple(name for name, _ in self.parts if name != "cpu")


@runtime_checkable
class Placed(Protocol):
    """An engine that says where its model is."""

    @property
    def placement(self) -> Placement: ...


class Generation(Iterator[Event], Protocol):
    """A running generation. Iterating blocks for the next event; it ends after `Finished`."""

    def cancel(self) -> None:
        """Stop within one decode step and free the slot; iteration then raises `Cancelled`."""


@runtime_checkable
class PacedGeneration(Protocol):
    """A generation whose events can also be taken several at a time."""

    def gather(self, pace_s: float) -> list[Event]:
        """All events that are there, at least one; [] after the last.

        Waits until `pace_s` have passed since the previous call returned, unless the generation ends
        before. Raises what iterating would raise.
        """


@runtime_checkable
class Supervised(Protocol):
    """What an engine may tell those who must decide whether it still works. Read from any thread."""

    @property
    def steps(self) -> int:
        """Calls of the native library that have returned; grows while anything is being computed."""

    @property
    def broken(self) -> bool:
        """Nothing can be generated any more, ever; only loading again helps."""


class Engine(Protocol):
    """A loaded model. Every method may be called from any thread."""

    @property
    def info(self) -> ModelInfo: ...

    def generate(self, request: GenerateRequest) -> Generation:
        """Queue a generation.

        Raises:
            ContextOverflow, InvalidArgument: at once, before anything is queued.
            Busy: the queue is full.
        """

    def embed(self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None) -> tuple[list[list[float]], int]:
        """Vectors (L2-normalised) in the order of `texts`, and the number of tokens read.

        Args:
            cancelled: asked between texts and between batches, on this thread; True ends the work.

        Raises:
            Cancelled: `cancelled` said so.
        """

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no whole character is U+FFFD.

        Raises:
            InvalidArgument: a number that is no token.
        """

    def rerank(
        self, query: str, documents: Sequence[str], cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[float], int]:
        """How well each document answers the query (higher is better, 0–1), and the number of tokens read.

        Raises:
            NotSupported: the model makes no such judgement.
        """

    def classify(
        self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        """For each text its labels with their probabilities, likeliest first; and the number of tokens read."""

    def stats(self) -> EngineStats: ...

    def trim(self) -> int:
        """Give back what can be had again without loading: caches of idle conversations. Returns bytes freed."""

    def close(self) -> None:
        """Cancel what runs and free the model; idempotent."""


def event_to_dict(event: Event) -> dict[str, Any]:
    """JSON-ready form of an event, with its kind under "event"."""
    kind = {Chunk: "chunk", Finished: "finished", Queued: "queued"}[type(event)]
    return {"event": kind, **asdict(event)}


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """The inverse of `event_to_dict`; raises ValueError for anything else."""
    try:
        if values["event"] == "chunk":
            return Chunk(values["text"], tuple(_logprob(each) for each in values.get("logprobs", ())))
        if values["event"] == "queued":
            return Queued(values["position"], values.get("eta_s"))
        if values["event"] == "finished":
            return Finished(
                FinishReason(values["reason"]),
                Usage(**values["usage"]),
                tuple(ToolCall(**each) for each in values.get("tool_calls", ())),
            )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an event: {error}") from error
    raise ValueError(f"not an event: {values.get('event')!r}")


def _logprob(values: Mapping[str, Any]) -> TokenLogprob:
    return TokenLogprob(
        values["token"],
        tuple(values["bytes"]),
        values["logprob"],
        tuple(_logprob(each) for each in values.get("top", ())),
    )
