"""Operators that move elements, or make them, without computing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.backends.cpu_kernels.common import (
    ALL,
    NUMBERS,
    axis_of,
    bounded,
    given,
    integer,
    integers,
    real,
    text,
)
from ai_assistant.hal.graph import Array, DType, Graph, Node
from ai_assistant.hal.operators import Kernel, OperatorRegistry

_ONNX_TYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip
_MODES = {"constant": "constant", "edge": "edge", "reflect": "reflect", "wrap": "wrap"}


def _list(value: Any) -> list[int]:
    return [int(each) for each in np.ravel(value)]


def _reshape(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, wanted = inputs[0], _list(inputs[1])
    if not integer(node, "allowzero", 0):
        if any(size == 0 and place >= x.ndim for place, size in enumerate(wanted)):
            raise InvalidArgument(f"{wanted} copies a size that {x.shape} does not have")
        wanted = [x.shape[place] if size == 0 else size for place, size in enumerate(wanted)]
    return (x.reshape(wanted),)


def _flatten(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, axis = inputs[0], integer(node, "axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if not 0 <= axis <= x.ndim:
        raise InvalidArgument(f"there is no axis {axis} in {x.ndim} dimensions")
    return (x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])),)


def _transpose(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x = inputs[0]
    return (
        np.ascontiguousarray(np.transpose(x, integers(node, "perm", range(x.ndim)[::-1]))).reshape(
            [x.shape[axis] for axis in integers(node, "perm", range(x.ndim)[::-1])]
        ),
    )


def _axes(node: Node, inputs: list[Any], by_input: bool) -> list[int] | None:
    asked = given(inputs, 1) if by_input else node.attributes.get("axes")
    return None if asked is None else _list(asked)


def _squeeze(by_input: bool) -> Kernel:
    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        x, axes = inputs[0], _axes(node, inputs, by_input)
        return (np.squeeze(x, None if axes is None else tuple(axes)),)

    return run


def _unsqueeze(by_input: bool) -> Kernel:
    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        return (np.expand_dims(inputs[0], tuple(_axes(node, inputs, by_input) or ())),)

    return run


def _expand(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, wanted = inputs[0], bounded(_list(inputs[1]), inputs[0].dtype)
    shape = bounded(np.broadcast_shapes(x.shape, wanted), x.dtype)
    return (np.array(np.broadcast_to(x, shape)),)


def _tile(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, repeats = inputs[0], _list(inputs[1])
    if len(repeats) != x.ndim:
        raise InvalidArgument(f"{len(repeats)} repeats for {x.ndim} dimensions")
    bounded([size * times for size, times in zip(x.shape, repeats, strict=True)], x.dtype)
    return (np.tile(x, repeats),)


def _concat(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (np.concatenate(inputs, axis_of(integer(node, "axis", 0), inputs[0].ndim)),)


def _split(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, axis = inputs[0], axis_of(integer(node, "axis", 0), inputs[0].ndim)
    asked = given(inputs, 1) if node.version >= 13 else node.attributes.get("split")
    count, size = len(node.outputs), x.shape[axis]
    if asked is None:
        each = -(-size // count)
        sizes = [min(each, max(0, size - each * number)) for number in range(count)]
    else:
        sizes = _list(asked)
    if sum(sizes) != size or len(sizes) != count or min(sizes) < 0:
        raise InvalidArgument(f"{size} cannot be split into {sizes}")
    return tuple(np.array(part) for part in np.split(x, np.cumsum(sizes)[:-1], axis))


def _sliced(x: Array, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> Array:
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise InvalidArgument("starts, ends, axes and steps differ in number")
    chosen = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis_of(axis, x.ndim)
        size = x.shape[place]
        start, end = start + size if start < 0 else start, end + size if end < 0 else end
        if step == 0:
            raise InvalidArgument("a step cannot be 0")
        if step > 0:
            chosen[place] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        elif size == 0:
            chosen[place] = slice(0, 0)
        else:
            end = min(max(end, -1), size - 1)
            chosen[place] = slice(min(max(start, 0), size - 1), None if end < 0 else end, step)
    return np.array(x[tuple(chosen)])


def _slice(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, starts, ends = inputs[0], _list(inputs[1]), _list(inputs[2])
    axes, steps = given(inputs, 3), given(inputs, 4)
    chosen = _list(axes) if axes is not None else list(range(len(starts)))
    return (_sliced(x, starts, ends, chosen, _list(steps) if steps is not None else [1] * len(starts)),)


def _slice_1(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    starts, ends = integers(node, "starts"), integers(node, "ends")
    return (_sliced(inputs[0], starts, ends, integers(node, "axes", range(len(starts))), [1] * len(starts)),)


def _padded(x: Array, pads: Sequence[int], axes: Sequence[int], mode: str, value: Any) -> Array:
    if len(pads) != 2 * len(axes):
        raise InvalidArgument(f"{len(pads)} pads for {len(axes)} axes")
    widths = [(0, 0)] * x.ndim
    for number, axis in enumerate(axes):
        widths[axis_of(axis, x.ndim)] = (pads[number], pads[number + len(axes)])
    # A negative pad takes away.
    x = x[tuple(slice(max(0, -a), size - max(0, -b)) for (a, b), size in zip(widths, x.shape, strict=True))]
    widths = [(max(0, a), max(0, b)) for a, b in widths]
    bounded([size + sum(width) for size, width in zip(x.shape, widths, strict=True)], x.dtype)
    if mode == "constant":
        return np.pad(x, widths, constant_values=value)
    return np.pad(x, widths, _MODES[mode])  # type: ignore[call-overload, no-any-return]


def _pad(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, value, axes = inputs[0], given(inputs, 2), given(inputs, 3)
    filling = x.dtype.type(0) if value is None else np.ravel(value)[0]
    chosen = range(x.ndim) if axes is None else _list(axes)
    return (_padded(x, _list(inputs[1]), chosen, text(node, "mode", "constant"), filling),)


def _pad_2(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x = inputs[0]
    value = x.dtype.type(real(node, "value", 0.0))
    return (_padded(x, integers(node, "pads"), range(x.ndim), text(node, "mode", "constant"), value),)


def _pad_check(node: Node, graph: Graph) -> str:
    mode = text(node, "mode", "constant")
    return "" if mode in _MODES else f"mode {mode[:20]!r} is not implemented"


def _cast(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (inputs[0].astype(_ONNX_TYPES[integer(node, "to", 1)]),)


def _cast_check(node: Node, graph: Graph) -> str:
    return "" if integer(node, "to", 1) in _ONNX_TYPES else f"type {integer(node, 'to', 1)} is not implemented"


def _like_check(node: Node, graph: Graph) -> str:
    return "bf16 is not implemented" if graph.spec(node.inputs[1]).dtype is DType.BF16 else ""


def _shape(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    end = node.attributes.get("end")
    return (np.array(inputs[0].shape[integer(node, "start", 0) : end if isinstance(end, int) else None], np.int64),)


def _constant_of_shape(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    value = node.attributes.get("value")
    filling = value.ravel()[0] if isinstance(value, np.ndarray) and value.size else np.float32(0)
    return (np.full(bounded(_list(inputs[0]), filling.dtype), filling),)


def _constant_check(node: Node, graph: Graph) -> str:
    value = node.attributes.get("value")
    return "the value has more than one element" if isinstance(value, np.ndarray) and value.size != 1 else ""


def _range(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    start, limit, step = (np.ravel(each)[0] for each in inputs)
    if step == 0 or not all(np.isfinite(float(each)) for each in (start, limit, step)):
        raise InvalidArgument(f"there is no range from {start} to {limit} in steps of {step}")
    count = max(0, math.ceil((float(limit) - float(start)) / float(step)))
    bounded([count], inputs[0].dtype)
    return ((start + np.arange(count, dtype=inputs[0].dtype) * step).astype(inputs[0].dtype),)


def _triangle(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    offset = given(inputs, 1)
    diagonal = 0 if offset is None else int(np.ravel(offset)[0])
    return ((np.triu if integer(node, "upper", 1) else np.tril)(inputs[0], diagonal),)


def _depth_to_space(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, block = inputs[0], integer(node, "blocksize", 1)
    batch, channels, height, width = x.shape
    if block < 1 or channels % (block * block):
        raise InvalidArgument(f"{channels} channels cannot be blocks of {block}")
    inner = channels // (block * block)
    if text(node, "mode", "DCR") == "DCR":
        parts = x.reshape(batch, block, block, inner, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(batch, inner, block, block, height, width).transpose(0, 1, 4, 2, 5, 3)
    return (np.ascontiguousarray(parts).reshape(batch, inner, height * block, width * block),)


def _space_to_depth(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, block = inputs[0], integer(node, "blocksize", 1)
    batch, channels, height, width = x.shape
    if block < 1 or height % block or width % block:
        raise InvalidArgument(f"{height} × {width} cannot be blocks of {block}")
    parts = x.reshape(batch, channels, height // block, block, width // block, block).transpose(0, 3, 5, 1, 2, 4)
    return (np.ascontiguousarray(parts).reshape(batch, channels * block * block, height // block, width // block),)


def register(operators: OperatorRegistry) -> None:
    operators.register("Identity", ALL, kernel=lambda node, x: (np.array(x[0]),))
    operators.register("Reshape", ALL, since=5, kernel=_reshape)
    operators.register("Flatten", ALL, kernel=_flatten)
    operators.register("Transpose", ALL, kernel=_transpose)
    operators.register("Squeeze", ALL, until=12, kernel=_squeeze(False))
    operators.register("Squeeze", ALL, since=13, kernel=_squeeze(True))
    operators.register("Unsqueeze", ALL, until=12, kernel=_unsqueeze(False))
    operators.register("Unsqueeze", ALL, since=13, kernel=_unsqueeze(True))
    operators.register("Expand", ALL, since=8, kernel=_expand)
    operators.register("Tile", ALL, since=6, kernel=_tile)
    operators.register("Concat", ALL, since=4, kernel=_concat)
    operators.register("Split", ALL, since=2, kernel=_split)
    operators.register("Slice", ALL, until=9, kernel=_slice_1)
    operators.register("Slice", ALL, since=10, kernel=_slice)
    operators.register("Pad", ALL, since=2, until=10, check=_pad_check, kernel=_pad_2)
    operators.register("Pad", ALL, since=11, check=_pad_check, kernel=_pad)
    operators.register("Cast", ALL, since=6, check=_cast_check, kernel=_cast)
    operators.register("CastLike", ALL, since=15, check=_like_check, kernel=lambda node, x: (x[0].astype(x[1].dtype),))
    operators.register("Shape", ALL, kernel=_shape)
    operators.register("Size", ALL, kernel=lambda node, x: (np.array(x[0].size, np.int64),))
    operators.register("ConstantOfShape", {DType.I64}, since=9, check=_constant_check, kernel=_constant_of_shape)
    operators.register("Range", {DType.F32, DType.F64, DType.I16, DType.I32, DType.I64}, since=11, kernel=_range)
    operators.register("Trilu", ALL, since=14, kernel=_triangle)
    operators.register("DepthToSpace", NUMBERS, kernel=_depth_to_space)
    operators.register("SpaceToDepth", NUMBERS, kernel=_space_to_depth)
