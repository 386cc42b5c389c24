"""What a loaded model takes of memory, worked out from a few numbers of its header before anything is loaded.

A `MemoryShape` is made once from a model's header (`gguf_rules.memory_shape`) and is small enough to be kept
beside the model; everything else is arithmetic on it, so that an estimate for other options reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from ai_assistant.engines.contract import LoadOptions

KV_TYPES = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Elements of the cache, best first: elements and bytes of a block."""
DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 1024
DEFAULT_KV_BYTES = 1 << 30
"""What the KV cache takes at most where neither a context nor a limit is asked for."""
MAX_BYTES = 1 << 56
PROCESS_BYTES = 40 << 20
"""Of a worker with llama.cpp: interpreter, numpy and the native library with its thread stacks, measured."""
MOST_AHEAD = 8
"""Tokens that are guessed for a sequence in one step."""
_GUESS_BYTES = 32 << 20
"""What the logits of guesses may take."""
_MAX_GROUPS = 1024
_SHORTEST_READ = 512
"""Tokens of the smallest batch that texts are embedded in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a worker with the model takes, in bytes."""

    weights_bytes: int = 0
    """The mapped file; counted whole, although the kernel may drop pages that nobody reads."""
    repacked_bytes: int = 0
    """Copies of weights in a layout that this CPU multiplies faster."""
    kv_bytes: int = 0
    """The key-value cache of all sequences, recurrent states, and states of idle conversations in memory."""
    compute_bytes: int = 0
    """What a decode step works in, logits included."""
    runtime_bytes: int = 0
    """The process itself: interpreter, libraries, vocabulary."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.repacked_bytes + self.kv_bytes + self.compute_bytes + self.runtime_bytes

    def to_dict(self) -> dict[str, int]:
        """All of it, the total included."""
        return {**asdict(self), "total_bytes": self.total_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShape:
    """The numbers of a model that its memory depends on. Sizes in bytes, widths in elements."""

    weights_bytes: int
    repacked_bytes: int = 0
    """What repacking copies where it is allowed."""
    attention: tuple[tuple[int, int, int], ...] = ()
    """(layers, elements of a token's keys, of its values) for layers that are alike. Sliding windows make no
    difference: the cache is kept whole, so that any prefix of it can be used again."""
    state_bytes: int = 0
    """Recurrent state of one sequence."""
    step_bytes: int = 0
    """Activations of one token that a decode step keeps at the same time."""
    masks: int = 1
    """Kinds of attention: each has a mask of tokens × cells."""
    kv_block: int = 32
    """Elements that the width of every head divides into; quantised caches need 32."""
    vocabulary: int = 0
    context_length: int = 0
    """What the model was trained for; 0 where that means nothing."""
    whole_texts: bool = False
    """A text is read in one step, whatever its length."""
    compute_bytes: int = 0
    """What a step works in beside what follows from the above."""
    runtime_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, for values that something else has written.

        Raises:
            ValueError: they are no such values.
        """
        if not isinstance(values, Mapping) or set(values) != {each.name for each in fields(cls)}:
            raise ValueError("not the shape of a model")
        groups = values["attention"]
        if not isinstance(groups, list | tuple) or len(groups) > _MAX_GROUPS:
            raise ValueError("not the layers of a model")
        if any(not isinstance(each, list | tuple) or len(each) != 3 for each in groups):
            raise ValueError("not the layers of a model")
        if not isinstance(values["whole_texts"], bool):
            raise ValueError("not the shape of a model")
        sizes = {key: _size(value) for key, value in values.items() if key not in ("attention", "whole_texts")}
        attention = tuple((_size(layers), _size(key), _size(value)) for layers, key, value in groups)
        return cls(attention=attention, whole_texts=values["whole_texts"], **sizes)


@dataclass(frozen=True, slots=True)
class Settled:
    """What a load gives where it was asked to choose."""

    kv_type: str
    context_length: int
    """Tokens per sequence."""
    sequences: int


def settle(shape: MemoryShape, options: LoadOptions) -> Settled:
    """The cache that a load with these options gets.

    Without `kv_limit_bytes` it has 16-bit elements unless another type is asked for; its context is what was asked
    for, otherwise what the model was trained for, up to 8192, and less where the cache, which is allocated at once,
    would be larger than 1 GiB. With a limit, smaller elements come first, then a shorter context if none was asked
    for, then fewer sequences; what is still too large then stays too large, and the estimate says so.
    """
    limit = options.kv_limit_bytes
    kinds = _kinds(shape, options.kv_type, limited=bool(limit))
    context = options.context_length or DEFAULT_CONTEXT
    context = min(context, shape.context_length or context)
    sequences = options.sequences
    for kind in kinds:
        if _cache_bytes(shape, kind, context, sequences) <= (limit or DEFAULT_KV_BYTES):
            return Settled(kind, context, sequences)
    kind = kinds[-1]
    if not options.context_length:
        while context > LEAST_CONTEXT and _cache_bytes(shape, kind, context, sequences) > (limit or DEFAULT_KV_BYTES):
            context //= 2
    while limit and sequences > 1 and _cache_bytes(shape, kind, context, sequences) > limit:
        sequences //= 2
    return Settled(kind, context, sequences)


def settled(shape: MemoryShape, options: LoadOptions) -> LoadOptions:
    """The options with everything chosen that they leave open, so that nobody chooses again."""
    chosen = settle(shape, options)
    return replace(
        options,
        kv_type=chosen.kv_type,
        context_length=chosen.context_length,
        sequences=chosen.sequences,
        kv_limit_bytes=0,
    )


def estimate(shape: MemoryShape, options: LoadOptions, draft: MemoryShape | None = None) -> MemoryEstimate:
    """What a worker takes that loads such a model with these options.

    Args:
        draft: of a smaller model that comes with it and guesses its tokens, where the options allow that.
    """
    chosen = settle(shape, options)
    found = MemoryEstimate(
        weights_bytes=shape.weights_bytes,
        repacked_bytes=shape.repacked_bytes if options.repack else 0,
        kv_bytes=_cache_bytes(shape, chosen.kv_type, chosen.context_length, chosen.sequences)
        + options.spill_memory_bytes,
        compute_bytes=_compute_bytes(shape, options, chosen, guesses=_guess_rows(shape, options, chosen)),
        runtime_bytes=shape.runtime_bytes,
    )
    if draft is None or options.speculative in ("off", "lookup") or not _guess_rows(shape, options, chosen):
        return found
    # It follows every sequence in a cache of its own, 16 bits an element, as long as the model's. Its weights
    # are repacked whatever the options say, and it shares the process.
    return MemoryEstimate(
        weights_bytes=found.weights_bytes + draft.weights_bytes,
        repacked_bytes=found.repacked_bytes + draft.repacked_bytes,
        kv_bytes=found.kv_bytes + _cache_bytes(draft, "f16", chosen.context_length, chosen.sequences),
        compute_bytes=found.compute_bytes + _compute_bytes(draft, options, chosen),
        runtime_bytes=found.runtime_bytes + max(0, draft.runtime_bytes - PROCESS_BYTES),
    )


def kv_bytes(shape: MemoryShape, options: LoadOptions) -> int:
    """The key-value cache and recurrent states for all sequences together, in bytes."""
    chosen = settle(shape, options)
    return _cache_bytes(shape, chosen.kv_type, chosen.context_length, chosen.sequences)


def output_rows(shape: MemoryShape, options: LoadOptions) -> int:
    """Rows of logits that one step can make."""
    chosen = settle(shape, options)
    return 0 if shape.whole_texts else chosen.sequences + _guess_rows(shape, options, chosen)


def results_bytes(shape: MemoryShape, options: LoadOptions) -> int:
    """Logits in the graph and where they are read, and the candidates that are made of them."""
    chosen = settle(shape, options)
    return _results_bytes(shape, chosen, _guess_rows(shape, options, chosen))


def step_tokens(shape: MemoryShape, options: LoadOptions) -> int:
    """Tokens of the largest step."""
    return _step(shape, options, settle(shape, options))[0]


def mask_bytes(shape: MemoryShape, options: LoadOptions) -> int:
    """What says which cells each token of a step may look at."""
    step, cells = _step(shape, options, settle(shape, options))
    return _mask_bytes(shape, step, cells)


def outputs_ahead(vocabulary: int, sequences: int) -> int:
    """Guesses of one step, all sequences together, that there are rows of logits for."""
    # One row in the graph and one in the output buffer.
    rows = _GUESS_BYTES // (vocabulary * 8)
    return min(MOST_AHEAD * min(sequences, 4), rows)


def cells_per_sequence(context_length: int) -> int:
    """Cache cells for a sequence: the library rounds up to 256."""
    return -(-context_length // 256) * 256


def _kinds(shape: MemoryShape, wanted: str, *, limited: bool) -> tuple[str, ...]:
    """The types to try, best first."""
    if shape.kv_block % 32:
        return ("f16",)
    if wanted != "auto":
        return (wanted,)
    return tuple(KV_TYPES) if limited else ("f16",)


def _cache_bytes(shape: MemoryShape, kind: str, context_length: int, sequences: int) -> int:
    elements = sum(layers * (key + value) for layers, key, value in shape.attention)
    block, size = KV_TYPES[kind]
    return (elements * cells_per_sequence(context_length) * size // block + shape.state_bytes) * sequences


def _guess_rows(shape: MemoryShape, options: LoadOptions, chosen: Settled) -> int:
    """Rows of logits for tokens that are guessed; a state cannot be cut back, so nobody guesses for such models."""
    if options.speculative == "off" or not shape.vocabulary or shape.whole_texts or shape.state_bytes:
        return 0
    return outputs_ahead(shape.vocabulary, chosen.sequences)


def _compute_bytes(shape: MemoryShape, options: LoadOptions, chosen: Settled, *, guesses: int = 0) -> int:
    step, cells = _step(shape, options, chosen)
    # A matrix product keeps its other side once more, quantised or in 16 bits: about a sixth of the activations.
    activations = step * shape.step_bytes * 7 // 6
    results = _results_bytes(shape, chosen, guesses)
    return activations + _mask_bytes(shape, step, cells) + results + shape.compute_bytes


def _step(shape: MemoryShape, options: LoadOptions, chosen: Settled) -> tuple[int, int]:
    """Tokens of the largest step, and cells of a sequence."""
    cells = cells_per_sequence(chosen.context_length) if shape.context_length else 0
    step = max(_SHORTEST_READ, _power_of_two(cells)) if shape.whole_texts else options.batch_tokens
    return (step if shape.whole_texts else min(step, max(cells, 1))), cells


def _mask_bytes(shape: MemoryShape, step: int, cells: int) -> int:
    # 16 bits per token of the step and cell that it may look at.
    return step * cells * 2 * (1 if shape.whole_texts else shape.masks)


def _results_bytes(shape: MemoryShape, chosen: Settled, guesses: int) -> int:
    # Logits of every sequence: in the graph, in the output buffer, and as candidates of 12 bytes. Those of guesses are
    # looked at one after the other and need no candidates.
    return 0 if shape.whole_texts else (chosen.sequences * 20 + guesses * 8) * shape.vocabulary


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise ValueError("not a size")
    return value
