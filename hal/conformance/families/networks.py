"""Layers of networks: convolution, pooling, normalisation, softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from ai_assistant.hal.conformance.families.row import FLOATS, Draw, Row, Sample
from ai_assistant.hal.graph import Array, DType


def _conv(draw: Draw) -> Sample:
    rank = draw.choice((2, 2, 2, 1))
    group = draw.choice((1, 1, 2))
    channels, features = group * draw.integer(1, 3), group * draw.integer(1, 4)
    if draw.integer(0, 4) == 0:
        group = features = channels  # depthwise
    kernel = tuple(draw.choice((1, 2, 3)) for _ in range(rank))
    dilations = tuple(draw.choice((1, 1, 2)) for _ in range(rank))
    pads = tuple(draw.integer(0, 1) for _ in range(2 * rank))
    sides = tuple(draw.integer(5, 10) for _ in range(rank))
    inputs = [
        draw.array((draw.integer(1, 2), channels, *sides), -1, 1),
        draw.array((features, channels // group, *kernel), -1, 1),
    ]
    if draw.flag():
        inputs.append(draw.array((features,), -1, 1))
    strides = tuple(draw.integer(1, 2) for _ in range(rank))
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "group": group}
    attributes |= {"dilations": dilations, "pads": pads}
    fixed = frozenset(range(1, len(inputs))) if draw.flag() else frozenset[int]()
    return Sample(inputs, attributes, fixed)


def _conv_transpose(draw: Draw) -> Sample:
    channels, features, side = draw.integer(1, 3), draw.integer(1, 3), draw.integer(3, 6)
    kernel = draw.choice((1, 2, 3))
    inputs = [
        draw.array((1, channels, side, side), -1, 1),
        draw.array((channels, features, kernel, kernel), -1, 1),
    ]
    if draw.flag():
        inputs.append(draw.array((features,), -1, 1))
    stride = draw.integer(1, 2)
    return Sample(inputs, {"kernel_shape": (kernel, kernel), "strides": (stride, stride)}, frozenset({1}))


def _pool(average: bool) -> Any:
    def make(draw: Draw) -> Sample:
        kernel = draw.integer(2, 3)
        attributes: dict[str, Any] = {"kernel_shape": (kernel, kernel), "strides": (draw.integer(1, 2),) * 2}
        if draw.flag():
            attributes["pads"] = (1, 1, 1, 1)
        if average and draw.flag():
            attributes["count_include_pad"] = 1
        shape = (draw.integer(1, 2), draw.integer(1, 3), draw.integer(4, 9), draw.integer(4, 9))
        return Sample([draw.array(shape)], attributes)

    return make


def _global(draw: Draw) -> Sample:
    return Sample([draw.array((draw.integer(1, 2), draw.integer(1, 4), draw.integer(1, 9), draw.integer(1, 9)))])


def _softmax(draw: Draw) -> Sample:
    shape = draw.shape(1)
    return Sample([draw.array(shape, -8, 8)], {"axis": draw.axis(len(shape))} if draw.flag() else {})


def _log_softmax(draw: Draw) -> Sample:
    # The reference takes the logarithm of the softmax, which loses everything where that is small.
    shape = draw.shape(1)
    return Sample([draw.array(shape, -3, 3)], {"axis": draw.axis(len(shape))} if draw.flag() else {})


def _layer_norm(draw: Draw) -> Sample:
    shape = (*draw.shape(1, 3), draw.choice((4, 8, 15, 32)))
    axis = draw.choice((-1, -1, len(shape) - 1, -2))
    tail = shape[axis:]
    inputs: list[Array | None] = [draw.array(shape), draw.array(tail, 0.5, 2)]
    if draw.flag():
        inputs.append(draw.array(tail, -1, 1))
    attributes: dict[str, Any] = {"axis": axis}
    if draw.flag():
        attributes["epsilon"] = draw.choice((1e-5, 1e-12, 1e-3))
    fixed = frozenset(range(1, len(inputs))) if draw.flag() else frozenset[int]()
    return Sample(inputs, attributes, fixed)


def _batch_norm(draw: Draw) -> Sample:
    channels = draw.integer(1, 5)
    shape = (draw.integer(1, 2), channels, *draw.shape(0, 2))
    parts = [draw.array((channels,), low, high) for low, high in ((0.5, 2), (-1, 1), (-1, 1), (0.25, 2))]
    return Sample([draw.array(shape), *parts], {"epsilon": 1e-5}, frozenset({1, 2, 3, 4}))


def _instance_norm(draw: Draw) -> Sample:
    channels = draw.integer(1, 5)
    shape = (draw.integer(1, 2), channels, draw.integer(3, 8), draw.integer(3, 8))
    parts = [draw.array((channels,), 0.5, 2), draw.array((channels,), -1, 1)]
    return Sample([draw.array(shape), *parts], {}, frozenset({1, 2}))


def _lp_norm(draw: Draw) -> Sample:
    shape = draw.shape(1)
    return Sample([draw.array(shape, 0.5, 4)], {"axis": draw.axis(len(shape)), "p": draw.choice((1, 2))})


def _dropout(draw: Draw) -> Sample:
    # Without training it does nothing.
    return Sample([draw.array(draw.shape(1))])


def _quantize(draw: Draw) -> Sample:
    zero = np.array(draw.integer(0, 200), np.uint8) if draw.flag() else np.array(0, np.uint8)
    # Away from the middle between two steps, where rounding would hang on the last bit.
    steps = draw.array(draw.shape(1), -60, 60, DType.I32)
    return Sample([(steps * 0.25 + 0.0625).astype(np.float32), np.array(0.25, np.float32), zero], {}, frozenset({1, 2}))


def _dequantize(draw: Draw) -> Sample:
    zero = np.array(draw.integer(0, 5), draw.dtype.numpy)
    return Sample([draw.array(draw.shape(1), 0, 100), np.array(0.125, np.float32), zero], {}, frozenset({1, 2}))


ROWS = (
    Row("Conv", FLOATS, _conv, loose=4),
    Row("ConvTranspose", (DType.F32,), _conv_transpose, loose=4),
    Row("MaxPool", (DType.F32, DType.F16), _pool(False)),
    Row("AveragePool", (DType.F32, DType.F16), _pool(True)),
    Row("GlobalAveragePool", FLOATS, _global, loose=2),
    Row("GlobalMaxPool", FLOATS, _global),
    Row("Softmax", FLOATS, _softmax),
    Row("LogSoftmax", FLOATS, _log_softmax, loose=2),
    Row("LayerNormalization", (DType.F32, DType.F16), _layer_norm, loose=4),
    Row("BatchNormalization", (DType.F32,), _batch_norm, loose=2),
    Row("InstanceNormalization", (DType.F32,), _instance_norm, loose=4),
    Row("LpNormalization", (DType.F32, DType.F64), _lp_norm),
    Row("Dropout", FLOATS, _dropout),
    Row("QuantizeLinear", (DType.F32,), _quantize),
    Row("DequantizeLinear", (DType.U8, DType.I8), _dequantize),
)
