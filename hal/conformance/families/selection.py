"""Operators that choose elements by indices."""

from __future__ import annotations

import numpy as np

from ai_assistant.hal.conformance.families.row import ANY, Draw, Row, Sample, ints
from ai_assistant.hal.graph import DType

_SOME = (DType.F32, DType.F16, DType.I64, DType.U8)


def _fixed(draw: Draw, *which: int) -> frozenset[int]:
    return frozenset(which) if draw.flag() else frozenset()


def _gather(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    axis = draw.axis(len(shape))
    kind = draw.choice((DType.I64, DType.I32))
    indices = draw.array(draw.shape(0, 2), -shape[axis], shape[axis] - 1, kind)
    return Sample([draw.array(shape), indices], {"axis": axis}, _fixed(draw, 1))


def _gather_elements(draw: Draw) -> Sample:
    shape = tuple(min(size, 31) for size in draw.shape(1, 3))  # the reference fails beyond 32
    axis = draw.axis(len(shape)) % len(shape)  # the reference fails at axes that are counted from the end
    sizes = list(shape)
    sizes[axis] = draw.integer(1, 5)
    indices = draw.array(sizes, -shape[axis], shape[axis] - 1, DType.I64)
    return Sample([draw.array(shape), indices], {"axis": axis}, _fixed(draw, 1))


def _gather_nd(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    depth = draw.integer(1, len(shape))
    count = draw.integer(1, 5)
    columns = [draw.array((count, 1), 0, size - 1, DType.I64) for size in shape[:depth]]
    return Sample([draw.array(shape), np.concatenate(columns, axis=1)], {}, _fixed(draw, 1))


def _scatter_elements(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    axis = draw.axis(len(shape)) % len(shape)
    count = draw.integer(1, shape[axis])
    # Every place is written once, so that the order does not matter.
    random = np.random.default_rng(draw.integer(0, 1 << 20))
    places = random.permuted(
        np.broadcast_to(np.arange(shape[axis]), (*shape[:axis], *shape[axis + 1 :], shape[axis])), axis=-1
    )
    indices = np.ascontiguousarray(np.moveaxis(places[..., :count], -1, axis)).astype(np.int64)
    return Sample([draw.array(shape), indices, draw.array(indices.shape)], {"axis": axis})


def _one_hot(draw: Draw) -> Sample:
    depth = draw.integer(2, 6)
    indices = draw.array(draw.shape(1, 2), 0, depth - 1, DType.I64)
    values = np.array([0, draw.integer(1, 3)], draw.dtype.numpy)
    return Sample([indices, ints(depth), values], {"axis": -1}, frozenset({1, 2}))


ROWS = (
    Row("Gather", ANY, _gather),
    Row("GatherElements", _SOME, _gather_elements),
    Row("GatherND", _SOME, _gather_nd),
    Row("ScatterElements", _SOME, _scatter_elements),
    Row("OneHot", (DType.F32, DType.I64), _one_hot),
)
