"""Operators that make one number of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ai_assistant.hal.conformance.families.row import FLOATS, NUMBERS, Draw, Row, Sample, ints
from ai_assistant.hal.graph import Array, DType


def _reduce(low: float = -4, high: float = 4, *, attribute: bool = False) -> Callable[[Draw], Sample]:
    """Args: attribute: the axes are an attribute, as before operator set 18, and not an input."""

    def make(draw: Draw) -> Sample:
        shape = draw.shape(1)
        inputs: list[Array | None] = [draw.array(shape, low, high)]
        attributes: dict[str, Any] = {} if draw.flag() else {"keepdims": draw.integer(0, 1)}
        if draw.integer(0, 3):
            if attribute:
                attributes["axes"] = draw.axes(len(shape))
            else:
                inputs.append(ints(*draw.axes(len(shape))))
        return Sample(inputs, attributes, frozenset({1}) if len(inputs) > 1 else frozenset())

    return make


def _arg(draw: Draw) -> Sample:
    shape = draw.shape(1)
    size = int(np.prod(shape))
    # All different, so that the answer does not hang on how ties are broken.
    array = np.random.default_rng(draw.integer(0, 1 << 20)).permutation(size).reshape(shape)
    attributes = {"axis": draw.axis(len(shape)), "keepdims": draw.integer(0, 1)}
    return Sample([array.astype(draw.dtype.numpy)], attributes)


def _topk(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    axis = draw.axis(len(shape))
    size = int(np.prod(shape))
    array = np.random.default_rng(draw.integer(0, 1 << 20)).permutation(size).reshape(shape)
    count = ints(draw.integer(1, shape[axis]))
    attributes = {"axis": axis, "largest": draw.integer(0, 1)}
    return Sample([array.astype(draw.dtype.numpy), count], attributes, frozenset({1}), 2)


def _cumsum(draw: Draw) -> Sample:
    shape = draw.shape(1, 3)
    attributes = {name: 1 for name in ("exclusive", "reverse") if draw.flag()}
    axis = np.array(draw.axis(len(shape)), np.int64)
    return Sample([draw.array(shape), axis], attributes, frozenset({1}))


ROWS = (
    Row("ReduceSum", NUMBERS, _reduce(), loose=4),
    Row("ReduceMean", FLOATS, _reduce(), loose=4),
    Row("ReduceMax", NUMBERS, _reduce()),
    Row("ReduceMin", NUMBERS, _reduce()),
    Row("ReduceProd", FLOATS, _reduce(0.75, 1.25), loose=8),
    Row("ReduceL1", FLOATS, _reduce(), loose=4),
    Row("ReduceL2", FLOATS, _reduce(), loose=4),
    Row("ReduceSumSquare", FLOATS, _reduce(), loose=8),
    Row("ReduceLogSumExp", FLOATS, _reduce(), loose=2),
    Row("ArgMax", (DType.F32, DType.I64), _arg),
    Row("ArgMin", (DType.F32, DType.I64), _arg),
    Row("TopK", (DType.F32, DType.I64), _topk),
    Row("CumSum", (DType.F32, DType.F64, DType.I64), _cumsum, loose=4),
)
