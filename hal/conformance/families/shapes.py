"""Operators that move elements and compute nothing: every result is exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from ai_assistant.hal.conformance.families.row import ANY, NUMBERS, Draw, Row, Sample, constant, ints
from ai_assistant.hal.graph import Array, DType

_SOME = (DType.F32, DType.F16, DType.I64, DType.U8)


def _reshape(draw: Draw) -> Sample:
    shape = draw.shape(1)
    array = draw.array(shape)
    kind = draw.integer(0, 3)
    if kind == 0:
        target = ints(-1)
    elif kind == 1:
        target = ints(1, *reversed(shape))
    elif kind == 2:
        target = ints(0, -1) if len(shape) > 1 else ints(0)  # 0: as it was
    else:
        target = ints(*shape[:-1], 1, shape[-1])
    return constant([array, target], 1)


def _transpose(draw: Draw) -> Sample:
    shape = draw.shape(1)
    if draw.integer(0, 3) == 0:
        return Sample([draw.array(shape)])
    left = list(range(len(shape)))
    order = [left.pop(draw.integer(0, len(left) - 1)) for _ in shape]
    return Sample([draw.array(shape)], {"perm": tuple(order)})


def _flatten(draw: Draw) -> Sample:
    shape = draw.shape(1)
    return Sample([draw.array(shape)], {"axis": draw.integer(-len(shape), len(shape))} if draw.flag() else {})


def _squeeze(draw: Draw) -> Sample:
    shape = [1 if draw.flag() else size for size in draw.shape(1)]
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    array = draw.array(shape)
    if not ones or draw.flag():
        return Sample([array])
    return constant([array, ints(draw.choice(ones))], 1)


def _unsqueeze(draw: Draw) -> Sample:
    shape = draw.shape(0, 3)
    axis = draw.axis(len(shape) + 1)
    return constant([draw.array(shape), ints(axis)], 1)


def _concat(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    axis = draw.axis(len(shape))
    inputs = []
    for _ in range(draw.integer(1, 4)):
        sizes = list(shape)
        sizes[axis] = draw.integer(1, 5)
        inputs.append(draw.array(sizes))
    return Sample(inputs, {"axis": axis})


def _split(draw: Draw) -> Sample:
    sizes = [draw.integer(1, 4) for _ in range(draw.integer(1, 4))]
    shape = list(draw.shape(1, 3))
    axis = draw.axis(len(shape))
    shape[axis] = sum(sizes)
    return Sample([draw.array(shape), ints(*sizes)], {"axis": axis}, frozenset({1}), len(sizes))


def _slice(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    axes = sorted({axis % len(shape) for axis in draw.axes(len(shape))})
    starts: list[int] = []
    ends: list[int] = []
    steps: list[int] = []
    for axis in axes:
        size = shape[axis]
        start = draw.integer(0, size - 1)
        end = draw.integer(start + 1, size)
        if draw.integer(0, 3) == 0:  # backwards, to the beginning
            starts, ends, steps = [*starts, start], [*ends, -(1 << 31)], [*steps, -1]
        else:
            end = draw.choice((end, end - size if end < size else end, 1 << 31))
            starts, ends, steps = (
                [*starts, draw.choice((start, start - size))],
                [*ends, end],
                [*steps, draw.integer(1, 2)],
            )
    inputs: list[Array | None] = [draw.array(shape), ints(*starts), ints(*ends), ints(*axes), ints(*steps)]
    return constant(inputs, 1, 2, 3, 4)


def _expand(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    return constant([draw.array(draw.broadcast(shape)), ints(*shape)], 1)


def _tile(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    return constant([draw.array(shape), ints(*(draw.integer(1, 3) for _ in shape))], 1)


def _pad(draw: Draw) -> Sample:
    shape = tuple(draw.integer(3, 6) for _ in range(draw.integer(1, 3)))
    mode = draw.choice(("constant", "reflect", "edge"))
    inputs: list[Array | None] = [draw.array(shape), ints(*(draw.integer(0, 2) for _ in range(2 * len(shape))))]
    if mode == "constant" and draw.flag():
        inputs.append(np.array(draw.integer(0, 3), draw.dtype.numpy))
    return Sample(inputs, {"mode": mode}, frozenset(range(1, len(inputs))))


def _shape(draw: Draw) -> Sample:
    return Sample([draw.array(draw.shape(0))])


def _trilu(draw: Draw) -> Sample:
    shape = draw.shape(2, 4)
    inputs: list[Array | None] = [draw.array(shape)]
    if draw.flag():
        inputs.append(np.array(draw.integer(-2, 2), np.int64))
    return Sample(inputs, {"upper": draw.integer(0, 1)}, frozenset({1}) if len(inputs) > 1 else frozenset())


def _blocks(to_space: bool) -> Any:
    def make(draw: Draw) -> Sample:
        block, channels, height, width = 2, draw.integer(1, 3), draw.integer(1, 4), draw.integer(1, 4)
        if to_space:
            attributes: dict[str, Any] = {"blocksize": block, "mode": draw.choice(("DCR", "CRD"))}
            return Sample([draw.array((1, channels * block * block, height, width))], attributes)
        return Sample([draw.array((1, channels, height * block, width * block))], {"blocksize": block})

    return make


ROWS = (
    Row("Reshape", ANY, _reshape),
    Row("Transpose", ANY, _transpose),
    Row("Flatten", _SOME, _flatten),
    Row("Squeeze", _SOME, _squeeze),
    Row("Unsqueeze", _SOME, _unsqueeze),
    Row("Concat", ANY, _concat),
    Row("Split", _SOME, _split),
    Row("Slice", ANY, _slice),
    Row("Expand", ANY, _expand),
    Row("Tile", _SOME, _tile),
    Row("Pad", (DType.F32, DType.I64), _pad),
    Row("Shape", (DType.F32, DType.I64), _shape),
    Row("Size", (DType.F32, DType.I64), _shape),
    Row("Trilu", NUMBERS, _trilu),
    Row("DepthToSpace", (DType.F32,), _blocks(True)),
    Row("SpaceToDepth", (DType.F32,), _blocks(False)),
)
