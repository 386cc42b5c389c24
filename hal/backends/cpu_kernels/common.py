"""What the families share: sets of types, attributes, and bounds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument, InvalidModel, OutOfMemory
from ai_assistant.hal.graph import Array, DType, Graph, Node

FLOATS = frozenset({DType.F16, DType.F32, DType.F64})
SIGNED = frozenset({DType.I8, DType.I16, DType.I32, DType.I64})
UNSIGNED = frozenset({DType.U8, DType.U16, DType.U32, DType.U64})
INTEGERS = SIGNED | UNSIGNED
NUMBERS = FLOATS | INTEGERS
BOOL = frozenset({DType.BOOL})
ALL = NUMBERS | BOOL

Function = Callable[..., Any]


def integer(node: Node, name: str, default: int) -> int:
    """Raises InvalidModel, as those below: the attribute is of another kind."""
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise _wrong(node, name, "a whole number")
    return value


def real(node: Node, name: str, default: float) -> float:
    value = node.attributes.get(name, default)
    if not isinstance(value, int | float):
        raise _wrong(node, name, "a number")
    return float(value)


def text(node: Node, name: str, default: str) -> str:
    value = node.attributes.get(name, default)
    if not isinstance(value, str):
        raise _wrong(node, name, "a text")
    return value


def integers(node: Node, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
    value = node.attributes.get(name, tuple(default))
    if not isinstance(value, tuple) or not all(isinstance(each, int) for each in value):
        raise _wrong(node, name, "a list of whole numbers")
    return tuple(int(each) for each in value)


def _wrong(node: Node, name: str, kind: str) -> InvalidModel:
    return InvalidModel(f"the attribute {name} of {node} {node.name[:60]!r} is not {kind}")


def given(inputs: Sequence[Any], number: int) -> Any:
    """An optional input; None where it is left out."""
    return inputs[number] if number < len(inputs) else None


def axis_of(axis: int, rank: int) -> int:
    """Raises InvalidArgument: there is no such axis."""
    if not -rank <= axis < max(rank, 1):
        raise InvalidArgument(f"there is no axis {axis} in {rank} dimensions")
    return axis % rank if rank else 0


@cache
def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bounded(sizes: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """The sizes of a tensor that a value asked for.

    Raises:
        InvalidArgument: one is negative.
        OutOfMemory: the machine has not that much.
    """
    shape = tuple(int(size) for size in sizes)
    if any(size < 0 for size in shape):
        raise InvalidArgument(f"a tensor cannot have the shape {shape}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > _memory_bytes():
        raise OutOfMemory(f"a tensor of {nbytes} bytes is asked for, the machine has {_memory_bytes()}")
    return shape


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute float16 in float32: each step rounded would lose half of what is left."""

    def run(x: Array, *others: Any, **options: Any) -> Any:
        if x.dtype != np.float16:
            return function(x, *others, **options)
        wide = (each.astype(np.float32) if getattr(each, "dtype", None) == np.float16 else each for each in others)
        return np.asarray(function(x.astype(np.float32), *wide, **options)).astype(np.float16)

    return run


def rank_of(node: Node, graph: Graph, number: int = 0) -> int:
    return len(graph.spec(node.inputs[number]).shape)
