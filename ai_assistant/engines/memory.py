"""What a loaded model takes of memory, worked out from a few numbers of its header before anything is loaded.

A `MemoryShape` is made once from a model's header (`gguf_rules.memory_shape`) and is small enough to be kept
beside the model; everything else is arithmetic on it, so that an estimate for other options reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from ai_assistant.engines.contract import LoadOptions

DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 1024
DEFAULT_KV_BYTES = 1 << 30
"""What the KV cache takes at most where neither a context nor a limit is asked for."""
MAX_BYTES = 1 << 56
_MAX_GROUPS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a worker with the model takes, in bytes."""

    weights_bytes: int = 0
    """The mapped file; counted whole, although the kernel may drop pages that nobody reads."""
    repacked_bytes: int = 0
    """Copies of weights in a layout that this CPU multiplies faster."""
    kv_bytes: int = 0
    """The key-value cache of all sequences, and recurrent states."""
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
    attention: tuple[tuple[int, int, int, int], ...] = ()
    """(layers, elements of a key, elements of a value, window in tokens or 0) for layers that are alike."""
    state_bytes: int = 0
    """Recurrent state of one sequence."""
    width: int = 0
    hidden: int = 0
    """Widest activation of a layer."""
    vocabulary: int = 0
    context_length: int = 0
    """What the model was trained for."""
    compute_bytes: int = 0
    """Beside what follows from the widths."""
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
        if any(not isinstance(each, list | tuple) or len(each) != 4 for each in groups):
            raise ValueError("not the layers of a model")
        attention = tuple((_size(a), _size(b), _size(c), _size(d)) for a, b, c, d in groups)
        return cls(attention=attention, **{key: _size(value) for key, value in values.items() if key != "attention"})


def estimate(shape: MemoryShape, options: LoadOptions) -> MemoryEstimate:
    """What a worker takes that loads such a model with these options."""
    return MemoryEstimate(
        weights_bytes=shape.weights_bytes,
        repacked_bytes=shape.repacked_bytes if options.repack else 0,
        kv_bytes=kv_bytes(shape, options),
        compute_bytes=_compute_bytes(shape, options),
        runtime_bytes=shape.runtime_bytes,
    )


def context_of(shape: MemoryShape, options: LoadOptions) -> int:
    """Tokens per sequence that a load with these options gives.

    By default what the model was trained for, up to 8192, and less where the cache for all sequences,
    which is allocated at once, would be larger than the limit (1 GiB where none is given).
    """
    if options.context_length:
        return min(options.context_length, shape.context_length)
    context = min(shape.context_length, DEFAULT_CONTEXT)
    limit = options.kv_limit_bytes or DEFAULT_KV_BYTES
    while context > LEAST_CONTEXT and kv_bytes(shape, replace(options, context_length=context)) > limit:
        context //= 2
    return context


def cells_per_sequence(context_length: int) -> int:
    """Cache cells for a sequence: the library rounds up to 256."""
    return -(-context_length // 256) * 256


def kv_bytes(shape: MemoryShape, options: LoadOptions) -> int:
    """The key-value cache (16-bit) and recurrent states for all sequences together, in bytes."""
    cells = cells_per_sequence(context_of(shape, options))
    rows = sum(layers * (key + value) for layers, key, value, _window in shape.attention)
    return (rows * 2 * cells + shape.state_bytes) * options.sequences


def _compute_bytes(shape: MemoryShape, options: LoadOptions) -> int:
    step = options.batch_tokens
    activations = step * (6 * shape.width + 3 * shape.hidden) * 4
    # Logits of every sequence in the graph, once more in the output buffer, and as candidates (12 bytes).
    outputs = options.sequences * shape.vocabulary * 20
    mask = step * context_of(shape, options) * options.sequences * 6
    return activations + outputs + mask + shape.compute_bytes


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise ValueError("not a size")
    return value
