"""Convolutions and pooling, over any number of spatial dimensions: [batch, channels, spatial…]."""

from __future__ import annotations

from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.backends.cpu_kernels.common import (
    FLOATS,
    bounded,
    given,
    integer,
    integers,
    rank_of,
    text,
    widened,
)
from ai_assistant.hal.graph import NO_VALUE, Array, Graph, Node
from ai_assistant.hal.operators import Kernel, OperatorRegistry

Padding = list[tuple[int, int]]
_PADDINGS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
_MAX_SPATIAL = 3


def _padding(node: Node, sizes: tuple[int, ...], spans: tuple[int, ...], strides: tuple[int, ...]) -> Padding:
    """Before and after each spatial dimension.

    Args:
        spans: how far a window reaches, dilation included.
    """
    kind = text(node, "auto_pad", "NOTSET")
    if kind in ("NOTSET", ""):
        pads = integers(node, "pads", (0,) * (2 * len(sizes)))
        if len(pads) != 2 * len(sizes) or any(pad < 0 for pad in pads):
            raise InvalidArgument(f"pads of {len(sizes)} dimensions cannot be {pads}")
        return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    if kind == "VALID":
        return [(0, 0)] * len(sizes)
    found = []
    for size, span, stride in zip(sizes, spans, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + span - size)
        small, large = total // 2, total - total // 2
        found.append((small, large) if kind == "SAME_UPPER" else (large, small))
    return found


def _windows(node: Node, x: Array, kernel: tuple[int, ...], fill: float) -> tuple[Array, Padding]:
    """[batch, channels, output…, kernel…] as a view of the padded input."""
    dims = len(kernel)
    strides = integers(node, "strides", (1,) * dims)
    dilations = integers(node, "dilations", (1,) * dims)
    if x.ndim != dims + 2 or len(strides) != dims or len(dilations) != dims:
        raise InvalidArgument(f"{node} has {dims} spatial dimensions and an input of shape {x.shape}")
    if any(each < 1 for each in (*strides, *dilations, *kernel)):
        raise InvalidArgument(f"{node} has a stride, dilation or kernel below 1")
    spans = tuple(dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True))
    padding = _padding(node, x.shape[2:], spans, strides)
    bounded([*x.shape[:2], *(size + sum(pair) for size, pair in zip(x.shape[2:], padding, strict=True))], x.dtype)
    padded = (
        np.pad(x, [(0, 0), (0, 0), *padding], constant_values=x.dtype.type(fill))
        if any(sum(pair) for pair in padding)
        else x
    )
    if any(size < span for size, span in zip(padded.shape[2:], spans, strict=True)):
        raise InvalidArgument(f"{node}: the window {spans} is larger than the input {padded.shape[2:]}")
    axes = tuple(range(2, dims + 2))
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)
    every = tuple(slice(None, None, stride) for stride in strides)
    inner = tuple(slice(None, None, dilation) for dilation in dilations)
    return view[(slice(None), slice(None), *every, *inner)], padding


def _convolve(x: Array, weight: Array, bias: Array | None, *, node: Node) -> Array:
    groups = integer(node, "group", 1)
    outputs, inner, *kernel = weight.shape
    if groups < 1 or outputs % groups or x.ndim < 2 or x.shape[1] != inner * groups:
        raise InvalidArgument(f"{node}: weights {weight.shape} in {groups} groups do not fit the input {x.shape}")
    windows, _ = _windows(node, x, tuple(kernel), 0)
    dims = len(kernel)
    over = [1, *range(2 + dims, 2 + 2 * dims)]
    parts = []
    for group in range(groups):
        mine = windows[:, group * inner : (group + 1) * inner]
        weights = weight[group * (outputs // groups) : (group + 1) * (outputs // groups)]
        parts.append(np.tensordot(mine, weights, axes=(over, list(range(1, 2 + dims)))))
    found = np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)
    if bias is not None:
        found = found + bias.reshape(-1, *(1,) * dims)
    return np.ascontiguousarray(found)


def _conv(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (np.asarray(widened(_convolve)(inputs[0], inputs[1], given(inputs, 2), node=node)),)


def _max_pool(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    windows, padding = _windows(node, inputs[0], integers(node, "kernel_shape"), -np.inf)
    return (np.asarray(windows.max(axis=tuple(range(-len(padding), 0)))),)


def _average_pool(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    def average(x: Array) -> Array:
        kernel = integers(node, "kernel_shape")
        windows, padding = _windows(node, x, kernel, 0)
        over = tuple(range(-len(kernel), 0))
        total = windows.sum(axis=over)
        if integer(node, "count_include_pad", 0) or not any(sum(pair) for pair in padding):
            return np.asarray(total / x.dtype.type(np.prod(kernel)))
        ones, _ = _windows(node, np.ones((1, 1, *x.shape[2:]), x.dtype), kernel, 0)
        return np.asarray(total / ones.sum(axis=over))

    return (np.asarray(widened(average)(inputs[0])),)


def _over_all(function: Any) -> Kernel:
    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        x = inputs[0]
        return (np.asarray(widened(lambda y: function(y, axis=tuple(range(2, y.ndim)), keepdims=True))(x)),)

    return run


def _check(node: Node, graph: Graph) -> str:
    if text(node, "auto_pad", "NOTSET") not in (*_PADDINGS, ""):
        return f"auto_pad {text(node, 'auto_pad', '')[:20]!r} is not known"
    if not 3 <= rank_of(node, graph) <= _MAX_SPATIAL + 2:
        return f"only 1 to {_MAX_SPATIAL} spatial dimensions"
    return ""


def _pool_check(node: Node, graph: Graph) -> str:
    if integer(node, "ceil_mode", 0):
        return "ceil_mode is not implemented"
    if any(index != NO_VALUE for index in node.outputs[1:]):
        return "indices of the maxima are not implemented"
    if any(index < 0 for index in integers(node, "pads")):
        return "negative pads are not implemented"
    return _check(node, graph)


def register(operators: OperatorRegistry) -> None:
    operators.register("Conv", FLOATS, check=_check, kernel=_conv)
    operators.register("MaxPool", FLOATS, check=_pool_check, kernel=_max_pool)
    operators.register("AveragePool", FLOATS, since=7, check=_pool_check, kernel=_average_pool)
    operators.register("GlobalAveragePool", FLOATS, check=_check, kernel=_over_all(np.mean))
    operators.register("GlobalMaxPool", FLOATS, check=_check, kernel=_over_all(np.max))
