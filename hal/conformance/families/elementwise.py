"""Operators on each element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ai_assistant.hal.conformance.families.row import ANY, FLOATS, NUMBERS, WHOLE, Draw, Row, Sample
from ai_assistant.hal.graph import DType

_WIDE = (DType.F32, DType.F64)
_SIGNED = (*FLOATS, DType.I64, DType.I32)


def unary(
    low: float = -4, high: float = 4, *, rank: int = 0, **attributes: tuple[float, float]
) -> Callable[[Draw], Sample]:
    """Of one tensor of at least that rank, and of attributes within ranges."""

    def make(draw: Draw) -> Sample:
        chosen = {name: draw.number(*span) for name, span in attributes.items() if draw.flag()}
        return Sample([draw.array(draw.shape(rank), low, high)], chosen)

    return make


def binary(low: float = -4, high: float = 4, second: tuple[float, float] | None = None) -> Callable[[Draw], Sample]:
    """Of two tensors; one is broadcast to the other."""

    def make(draw: Draw) -> Sample:
        shape = draw.shape(0)
        shapes = [shape, draw.broadcast(shape)]
        if second is None and draw.flag():
            shapes.reverse()
        fixed = frozenset({1}) if draw.integer(0, 3) == 0 else frozenset[int]()
        return Sample([draw.array(shapes[0], low, high), draw.array(shapes[1], *(second or (low, high)))], {}, fixed)

    return make


def several(draw: Draw) -> Sample:
    shape = draw.shape(1)
    return Sample([draw.array(shape if n == 0 else draw.broadcast(shape)) for n in range(draw.integer(1, 3))])


def _halves(draw: Draw) -> Sample:
    # What lies in the middle goes to the even neighbour.
    return Sample([(np.round(draw.array(draw.shape(0)) * 2) / 2).astype(draw.dtype.numpy)])


def _clip(draw: Draw) -> Sample:
    low = np.array(draw.integer(0, 1), draw.dtype.numpy) if draw.flag() else None
    high = np.array(draw.integer(2, 3), draw.dtype.numpy) if draw.flag() else None
    return Sample([draw.array(draw.shape(0)), low, high], {}, frozenset({1, 2}))


def _where(draw: Draw) -> Sample:
    shape = draw.shape(1)
    condition = draw.array(draw.broadcast(shape), dtype=DType.BOOL)
    return Sample([condition, draw.array(shape), draw.array(draw.broadcast(shape))])


def _special(draw: Draw) -> Sample:
    array = draw.array(draw.shape(1))
    flat = array.reshape(-1)
    flat[:: draw.integer(1, 3)] = draw.choice((np.nan, np.inf, -np.inf))
    return Sample([array])


def _prelu(draw: Draw) -> Sample:
    shape = draw.shape(1)
    return Sample([draw.array(shape), draw.array(draw.broadcast(shape))])


def _mod(draw: Draw) -> Sample:
    shape = draw.shape(1)
    return Sample([draw.array(shape, -20, 20), draw.array(draw.broadcast(shape), 1, 7)])


_CASTS = {DType.F32: 1, DType.U8: 2, DType.I32: 6, DType.I64: 7, DType.BOOL: 9, DType.F16: 10, DType.F64: 11}


def _cast(draw: Draw) -> Sample:
    low = 0 if draw.dtype in (DType.U8, DType.BOOL) else -4
    target = draw.choice([kind for kind in _CASTS if not (low < 0 and kind == DType.U8)])
    return Sample([draw.array(draw.shape(0), low, 4)], {"to": _CASTS[target]})


def _gelu(draw: Draw) -> Sample:
    return Sample([draw.array(draw.shape(0))], {"approximate": "tanh"} if draw.flag() else {})


# The reference fails at HardSigmoid of f16, and at scalars of Mish, Softplus and Softsign: those are left out.
ROWS = (
    Row("Add", NUMBERS, binary()),
    Row("Sub", NUMBERS, binary()),
    Row("Mul", NUMBERS, binary()),
    Row("Div", FLOATS, binary(second=(0.5, 4))),
    Row("Pow", FLOATS, binary(0.25, 3, (-2, 2)), loose=4),
    Row("Mod", WHOLE, _mod),
    Row("Min", NUMBERS, several),
    Row("Max", NUMBERS, several),
    Row("Sum", FLOATS, several),
    Row("Mean", FLOATS, several),
    Row("Equal", (*WHOLE, DType.F32, DType.BOOL), binary(0, 2)),
    Row("Less", NUMBERS, binary()),
    Row("Greater", NUMBERS, binary()),
    Row("LessOrEqual", NUMBERS, binary(0, 2)),
    Row("GreaterOrEqual", NUMBERS, binary(0, 2)),
    Row("And", (DType.BOOL,), binary()),
    Row("Or", (DType.BOOL,), binary()),
    Row("Xor", (DType.BOOL,), binary()),
    Row("Not", (DType.BOOL,), unary()),
    Row("Where", ANY, _where),
    Row("Identity", ANY, unary()),
    Row("Cast", ANY, _cast),
    Row("Abs", _SIGNED, unary()),
    Row("Neg", _SIGNED, unary()),
    Row("Sign", _SIGNED, unary(-2, 2)),
    Row("Exp", FLOATS, unary(), loose=4),
    Row("Log", FLOATS, unary(0.125, 8)),
    Row("Sqrt", FLOATS, unary(0, 16)),
    Row("Reciprocal", FLOATS, unary(0.25, 4)),
    Row("Floor", FLOATS, unary()),
    Row("Ceil", FLOATS, unary()),
    Row("Round", FLOATS, _halves),
    Row("Sin", FLOATS, unary()),
    Row("Cos", FLOATS, unary()),
    Row("Tan", FLOATS, unary(-1, 1)),
    Row("Atan", FLOATS, unary()),
    Row("Sinh", FLOATS, unary(), loose=4),
    Row("Cosh", FLOATS, unary(), loose=4),
    Row("Tanh", FLOATS, unary()),
    Row("Erf", FLOATS, unary()),
    Row("Sigmoid", FLOATS, unary()),
    Row("Relu", FLOATS, unary()),
    Row("Gelu", FLOATS, _gelu),
    Row("LeakyRelu", FLOATS, unary(alpha=(0, 1))),
    Row("Elu", FLOATS, unary(alpha=(0.5, 2))),
    Row("Selu", FLOATS, unary()),
    Row("Celu", (DType.F32,), unary(alpha=(0.5, 2))),
    Row("HardSigmoid", _WIDE, unary(alpha=(0.125, 0.5), beta=(0.25, 0.75))),
    Row("HardSwish", _WIDE, unary()),
    Row("Mish", FLOATS, unary(rank=1)),
    Row("Softplus", FLOATS, unary(rank=1)),
    Row("Softsign", FLOATS, unary(rank=1)),
    Row("ThresholdedRelu", FLOATS, unary(alpha=(0.5, 2))),
    Row("PRelu", FLOATS, _prelu),
    Row("Clip", NUMBERS, _clip),
    Row("IsNaN", FLOATS, _special),
    Row("IsInf", (DType.F32, DType.F64), _special),
)
