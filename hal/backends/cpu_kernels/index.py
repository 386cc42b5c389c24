"""Operators that choose elements by their places."""

from __future__ import annotations

from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.backends.cpu_kernels.common import ALL, FLOATS, INTEGERS, axis_of, bounded, integer, text
from ai_assistant.hal.graph import Array, DType, Graph, Node
from ai_assistant.hal.operators import OperatorRegistry

_COMBINE: dict[str, Any] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _inside(places: Array, size: int) -> Array:
    """Places counted from the front. Raises InvalidArgument: one lies outside."""
    if places.size and (places.min() < -size or places.max() >= size):
        raise InvalidArgument(f"a place lies outside of the {size} that there are")
    return np.asarray(np.where(places < 0, places + size, places))


def _gather(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, places = inputs
    axis = axis_of(integer(node, "axis", 0), x.ndim)
    return (np.take(x, _inside(places, x.shape[axis]), axis),)


def _gather_elements(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, places = inputs
    axis = axis_of(integer(node, "axis", 0), x.ndim)
    return (np.asarray(x[_along(x, _inside(places, x.shape[axis]), axis)]),)


def _along(x: Array, places: Array, axis: int) -> tuple[Array, ...]:
    """Of every element of `places`: where it points, in all dimensions. It may be smaller than `x` in the others."""
    if places.ndim != x.ndim:
        raise InvalidArgument(f"places of {places.ndim} dimensions in a tensor of {x.ndim}")
    grid = list(np.indices(places.shape, sparse=True))
    grid[axis] = places
    return tuple(grid)


def _gather_nd(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, places = inputs
    batch = integer(node, "batch_dims", 0)
    depth = places.shape[-1] if places.ndim else 0
    if not 0 <= batch < min(x.ndim, places.ndim) or not 1 <= depth <= x.ndim - batch:
        raise InvalidArgument(f"places of the shape {places.shape} do not fit the tensor {x.shape}")
    chosen = [_inside(places[..., number], x.shape[batch + number]) for number in range(depth)]
    before = [
        np.arange(places.shape[number]).reshape([-1 if n == number else 1 for n in range(places.ndim - 1)])
        for number in range(batch)
    ]
    return (np.asarray(x[tuple(before + chosen)]),)


def _scatter_elements(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, places, updates = inputs
    axis = axis_of(integer(node, "axis", 0), x.ndim)
    found = np.array(x)
    _put(node, found, _along(x, _inside(places, x.shape[axis]), axis), updates)
    return (found,)


def _scatter_nd(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, places, updates = inputs
    depth = places.shape[-1] if places.ndim else 0
    if not 1 <= depth <= x.ndim:
        raise InvalidArgument(f"places of the shape {places.shape} do not fit the tensor {x.shape}")
    found = np.array(x)
    _put(node, found, tuple(_inside(places[..., number], x.shape[number]) for number in range(depth)), updates)
    return (found,)


def _put(node: Node, found: Array, where: tuple[Array, ...], updates: Array) -> None:
    reduction = text(node, "reduction", "none")
    if reduction == "none":
        found[where] = updates
    else:
        _COMBINE[reduction].at(found, where, updates)


def _scatter_check(node: Node, graph: Graph) -> str:
    reduction = text(node, "reduction", "none")
    return "" if reduction in ("none", *_COMBINE) else f"reduction {reduction[:20]!r} is not implemented"


def _one_hot(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    places, depth, (off, on) = inputs[0], int(np.ravel(inputs[1])[0]), np.ravel(inputs[2])
    axis = axis_of(integer(node, "axis", -1), places.ndim + 1)
    bounded([*places.shape, depth], inputs[2].dtype)
    # Places outside of the depth are cold everywhere.
    whole = places.astype(np.int64)
    whole = np.where((whole >= -depth) & (whole < 0), whole + depth, whole)
    hot = np.expand_dims(whole, axis) == np.arange(depth).reshape(
        [-1 if number == axis else 1 for number in range(places.ndim + 1)]
    )
    return (np.where(hot, on, off).astype(inputs[2].dtype),)


def _non_zero(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (np.array(np.nonzero(inputs[0]), np.int64).reshape(inputs[0].ndim, -1),)


def register(operators: OperatorRegistry) -> None:
    operators.register("Gather", ALL, kernel=_gather)
    operators.register("GatherElements", ALL, since=11, kernel=_gather_elements)
    operators.register("GatherND", ALL, since=11, kernel=_gather_nd)
    operators.register("ScatterElements", ALL, since=11, check=_scatter_check, kernel=_scatter_elements)
    operators.register("ScatterND", ALL, since=11, check=_scatter_check, kernel=_scatter_nd)
    operators.register("OneHot", INTEGERS | (FLOATS - {DType.F16}), since=9, kernel=_one_hot)
    operators.register("NonZero", ALL, since=9, kernel=_non_zero)
