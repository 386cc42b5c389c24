"""A row of the table of operators, and what its generator draws from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ai_assistant.hal.graph import Array, Attribute, DType

OPSET = 20
T = TypeVar("T")

FLOATS = (DType.F32, DType.F16, DType.F64)
WHOLE = (DType.I64, DType.I32)
NUMBERS = (*FLOATS, *WHOLE)
ANY = (DType.F32, DType.F16, DType.I64, DType.I32, DType.U8, DType.BOOL)


@dataclass(frozen=True, slots=True)
class Sample:
    """One example of an operator.

    Args:
        inputs: arrays, None for an optional one that is left out.
        constant: which inputs are constants of the graph; the others are given when it runs.
        outputs: how many outputs are wanted.
    """

    inputs: Sequence[Array | None]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    constant: frozenset[int] = frozenset()
    outputs: int = 1


class Draw:
    """Draws what an example is made of; `choose` draws an integer from a range, both ends included."""

    def __init__(self, dtype: DType, choose: Callable[[int, int], int]) -> None:
        self.dtype = dtype
        self._choose = choose

    def integer(self, low: int, high: int) -> int:
        return self._choose(low, high)

    def choice(self, options: Sequence[T]) -> T:
        return options[self._choose(0, len(options) - 1)]

    def flag(self) -> bool:
        return bool(self._choose(0, 1))

    def number(self, low: float, high: float) -> float:
        """One of 65 numbers, exact in every type."""
        return low + (high - low) * self._choose(0, 64) / 64

    def shape(self, least: int = 1, most: int = 4, side: int = 6) -> tuple[int, ...]:
        """A shape of some rank; now and then one that no vector register divides."""
        shape = [self._choose(1, side) for _ in range(self._choose(least, most))]
        if shape and math.prod(shape) <= 64 and self._choose(0, 3) == 0:
            shape[-1] = self.choice((7, 16, 31, 33, 65))
        return tuple(shape)

    def axis(self, rank: int) -> int:
        return self._choose(-rank, rank - 1)

    def axes(self, rank: int) -> tuple[int, ...]:
        """One or more different axes in order, some counted from the end."""
        chosen = [axis for axis in range(rank) if self.flag()] or [self._choose(0, rank - 1)]
        return tuple(axis - rank if self.flag() else axis for axis in chosen)

    def array(self, shape: Sequence[int], low: float = -4, high: float = 4, dtype: DType | None = None) -> Array:
        """Random numbers; unsigned types take the positive part of the range, bool takes both values."""
        kind = (dtype or self.dtype).numpy
        random = np.random.default_rng(self._choose(0, 1 << 30))
        if kind == np.bool_:
            return random.integers(0, 2, shape).astype(kind)
        if kind.kind == "f":
            return random.uniform(low, high, shape).astype(kind)
        least = max(0, math.ceil(low)) if kind.kind == "u" else math.ceil(low)
        return random.integers(least, max(least, math.floor(high)) + 1, shape).astype(kind)

    def broadcast(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that broadcasts to that one: fewer axes, some of size 1."""
        kept = list(shape)[self._choose(0, len(shape)) :] if self.flag() else list(shape)
        return tuple(1 if self._choose(0, 3) == 0 else size for size in kept)


@dataclass(frozen=True, slots=True)
class Row:
    """How an operator is tried.

    Args:
        make: an example; its first random input is of `Draw.dtype`.
        opset: of the graph.
        loose: a factor on the tolerance, for operators that add many products or whose slope is steep.
    """

    op: str
    dtypes: Sequence[DType]
    make: Callable[[Draw], Sample]
    opset: int = OPSET
    loose: float = 1.0


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def constant(inputs: Sequence[Array | None], *which: int, **attributes: Any) -> Sample:
    """An example some of whose inputs are constants: shapes, axes, pads."""
    return Sample(inputs, attributes, frozenset(which))
