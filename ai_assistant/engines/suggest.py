"""What fits a machine, and about how fast it would run there: arithmetic on shapes, memory and bandwidth."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.memory import MemoryShape, estimate

LEAST_SHARE, GREATEST_SHARE = 0.35, 0.9
"""What share of the memory bandwidth decoding reaches: 36–53 % was measured on two cores, more is seen where there are
cores to spare. So a speed is a range, and no promise."""
_RUNTIME_BYTES = 64 << 20
_KV_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder by its numbers; `active` are the parameters that a token meets."""

    name: str
    parameters: float
    active: float
    layers: int
    width: int
    kv_width: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Quantization:
    name: str
    bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One shape at one quantisation on this machine. Sizes in bytes, speeds in tokens a second of one answer."""

    shape: str
    quantization: str
    context_length: int
    file_bytes: int
    memory_bytes: int
    fits_memory: bool
    fits_disk: bool
    slowest: float
    fastest: float

    @property
    def fits(self) -> bool:
        return self.fits_memory and self.fits_disk


@cache
def tables() -> tuple[tuple[Shape, ...], tuple[Quantization, ...]]:
    """What is in shapes.toml."""
    values = tomllib.loads((Path(__file__).parent / "shapes.toml").read_text())
    shapes = tuple(Shape(**each) for each in values["shape"])
    return shapes, tuple(Quantization(**each) for each in values["quantization"])


def suggest(*, memory_bytes: int, disk_bytes: int, bandwidth: float, context_length: int = 8192) -> list[Suggestion]:
    """Every shape at every quantisation, smallest first.

    Args:
        memory_bytes: what a model may take.
        disk_bytes: what a file may take.
        bandwidth: of the memory, in bytes a second.
        context_length: tokens of one conversation.
    """
    shapes, quantizations = tables()
    found = [_one(s, q, memory_bytes, disk_bytes, bandwidth, context_length) for s in shapes for q in quantizations]
    return sorted(found, key=lambda each: each.file_bytes)


def speed(bandwidth: float, bytes_per_token: float) -> tuple[float, float]:
    """(slowest, fastest) tokens a second of one answer: every weight of a token is read once for it."""
    if bytes_per_token <= 0:
        return 0.0, 0.0
    limit = bandwidth / bytes_per_token
    return limit * LEAST_SHARE, limit * GREATEST_SHARE


def _one(
    shape: Shape, quantization: Quantization, memory: int, disk: int, bandwidth: float, context: int
) -> Suggestion:
    file_bytes = int(shape.parameters * quantization.bits / 8)
    needed = estimate(
        MemoryShape(
            weights_bytes=file_bytes,
            attention=((shape.layers, shape.kv_width, shape.kv_width),),
            step_bytes=(6 * shape.width + 3 * shape.hidden) * 4,
            vocabulary=shape.vocabulary,
            context_length=context,
            runtime_bytes=_RUNTIME_BYTES,
        ),
        LoadOptions(context_length=context, sequences=1),
    ).total_bytes
    # On average half of the context is there to be read again for each token.
    cache_bytes = 2 * shape.layers * shape.kv_width * _KV_ELEMENT_BYTES * context / 2
    slowest, fastest = speed(bandwidth, shape.active * quantization.bits / 8 + cache_bytes)
    return Suggestion(
        shape=shape.name,
        quantization=quantization.name,
        context_length=context,
        file_bytes=file_bytes,
        memory_bytes=needed,
        fits_memory=needed <= memory,
        fits_disk=file_bytes <= disk,
        slowest=slowest,
        fastest=fastest,
    )
