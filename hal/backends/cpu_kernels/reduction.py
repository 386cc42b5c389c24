"""Operators that make one element of many."""

from __future__ import annotations

from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.backends.cpu_kernels.common import (
    FLOATS,
    NUMBERS,
    Function,
    axis_of,
    given,
    integer,
    widened,
)
from ai_assistant.hal.graph import Array, DType, Node
from ai_assistant.hal.operators import Kernel, OperatorRegistry

_SUMMED = FLOATS | {DType.I32, DType.I64, DType.U32, DType.U64}


def _least(dtype: np.dtype[Any]) -> Any:
    return -np.inf if dtype.kind == "f" else False if dtype.kind == "b" else np.iinfo(dtype).min


def _greatest(dtype: np.dtype[Any]) -> Any:
    return np.inf if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max


def _log_sum_exp(x: Array, **over: Any) -> Array:
    most = np.max(x, **{**over, "keepdims": True}, initial=-np.inf)
    most = np.where(np.isfinite(most), most, 0)
    found = np.log(np.sum(np.exp(x - most), **{**over, "keepdims": True})) + most
    return np.asarray(found if over["keepdims"] else np.squeeze(found, over["axis"]))


_FUNCTIONS: dict[str, Function] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceProd": np.prod,
    "ReduceMax": lambda x, **over: np.max(x, **over, initial=_least(x.dtype)),
    "ReduceMin": lambda x, **over: np.min(x, **over, initial=_greatest(x.dtype)),
    "ReduceL1": lambda x, **over: np.sum(np.abs(x), **over),
    "ReduceL2": lambda x, **over: np.sqrt(np.sum(x * x, **over)),
    "ReduceSumSquare": lambda x, **over: np.sum(x * x, **over),
    "ReduceLogSum": lambda x, **over: np.log(np.sum(x, **over)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduced(function: Function, *, by_input: bool) -> Kernel:
    """Which axes: an attribute in older versions, an input in newer ones."""
    wide = widened(function)

    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        x = inputs[0]
        asked = given(inputs, 1) if by_input else node.attributes.get("axes")
        axes = tuple(axis_of(int(axis), x.ndim) for axis in np.ravel(() if asked is None else asked))
        if not axes and integer(node, "noop_with_empty_axes", 0):
            return (np.array(x),)
        if len(set(axes)) != len(axes):
            raise InvalidArgument(f"{node} names an axis twice: {axes}")
        over = {"axis": axes or tuple(range(x.ndim)), "keepdims": bool(integer(node, "keepdims", 1))}
        return (np.asarray(wide(x, **over)).astype(x.dtype),)

    return run


def _arg(largest: bool) -> Kernel:
    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        x = inputs[0]
        axis = axis_of(integer(node, "axis", 0), x.ndim)
        find = np.argmax if largest else np.argmin
        if integer(node, "select_last_index", 0):
            found = x.shape[axis] - 1 - find(np.flip(x, axis), axis=axis, keepdims=True)
        else:
            found = find(x, axis=axis, keepdims=True)
        found = found if integer(node, "keepdims", 1) else np.squeeze(found, axis)
        return (np.asarray(found, np.int64),)

    return run


def _cumulative(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, asked = inputs
    axis = axis_of(int(np.ravel(asked)[0]), x.ndim)
    backwards = integer(node, "reverse", 0)
    found = np.cumsum(np.flip(x, axis) if backwards else x, axis=axis, dtype=x.dtype)
    if integer(node, "exclusive", 0):
        found = np.roll(found, 1, axis)
        found[(slice(None),) * axis + (slice(0, 1),)] = 0
    return (np.ascontiguousarray(np.flip(found, axis) if backwards else found),)


def _top(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, count = inputs[0], int(np.ravel(inputs[1])[0])
    axis = axis_of(integer(node, "axis", -1), x.ndim)
    if not 0 <= count <= x.shape[axis]:
        raise InvalidArgument(f"the first {count} of {x.shape[axis]} are asked for")
    if integer(node, "largest", 1):
        # The other way round, so that of equal ones the first stays the first.
        order = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis=axis, kind="stable")
    chosen = np.take(order, np.arange(count), axis=axis)
    return np.take_along_axis(x, chosen, axis), chosen.astype(np.int64)


def register(operators: OperatorRegistry) -> None:
    for name, function in _FUNCTIONS.items():
        ordered = name in ("ReduceMax", "ReduceMin")
        dtypes = NUMBERS if ordered else _SUMMED if name in ("ReduceSum", "ReduceProd", "ReduceSumSquare") else FLOATS
        # ReduceSum's axes became an input five versions before the others'.
        last = 12 if name == "ReduceSum" else 17
        operators.register(name, dtypes, until=last, kernel=_reduced(function, by_input=False))
        operators.register(name, dtypes, since=last + 1, kernel=_reduced(function, by_input=True))
    operators.register("ArgMax", NUMBERS, kernel=_arg(True))
    operators.register("ArgMin", NUMBERS, kernel=_arg(False))
    operators.register("CumSum", _SUMMED, since=11, kernel=_cumulative)
    operators.register("TopK", NUMBERS, since=11, kernel=_top)
