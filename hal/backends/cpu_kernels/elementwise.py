"""Operators that treat every element alike."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import Any

import numpy as np

from ai_assistant.hal.backends.cpu_kernels.common import (
    ALL,
    BOOL,
    FLOATS,
    INTEGERS,
    NUMBERS,
    SIGNED,
    UNSIGNED,
    Function,
    given,
    integer,
    real,
    text,
    widened,
)
from ai_assistant.hal.backends.cpu_kernels.erf import erf
from ai_assistant.hal.graph import Array, DType, Node
from ai_assistant.hal.operators import Kernel, OperatorRegistry


def _sigmoid(x: Array) -> Array:
    # Of the negative half by its mirror image: exp would overflow.
    power = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + power), power / (1 + power)).astype(x.dtype))


def _softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(x, x.dtype.type(0)))


def _gelu(x: Array, approximate: str) -> Array:
    half = x.dtype.type(0.5)
    if approximate == "tanh":
        inner = x.dtype.type(np.sqrt(2 / np.pi)) * (x + x.dtype.type(0.044715) * x**3)
        return np.asarray(half * x * (1 + np.tanh(inner)))
    return np.asarray(half * x * (1 + erf(x * x.dtype.type(np.sqrt(0.5)))))


def _divide(a: Array, b: Array) -> Array:
    """Integers towards zero, as C does; by zero gives 0."""
    if a.dtype.kind == "f":
        return np.asarray(np.divide(a, b))
    quotient = np.floor_divide(a, b)
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return np.asarray(quotient.astype(a.dtype))


def _modulo(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    function = np.fmod if integer(node, "fmod", 0) or inputs[0].dtype.kind == "f" else np.mod
    return (function(inputs[0], inputs[1]).astype(inputs[0].dtype),)


def _power(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    base, exponent = inputs
    wide = base.astype(np.float32) if base.dtype == np.float16 else base
    if base.dtype.kind == "i":
        if exponent.dtype.kind in "iu" and not np.any(exponent < 0):
            # Exact, and around the end as every other whole number here.
            return (np.power(base, exponent.astype(np.int64)).astype(base.dtype),)
        # By fractions and below 0 there is no exact whole result: it is cut off.
        return (np.power(base.astype(np.float64), exponent).astype(base.dtype),)
    return (np.power(wide, exponent.astype(wide.dtype)).astype(base.dtype),)


def _clip(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, least, most = inputs[0], given(inputs, 1), given(inputs, 2)
    if least is not None:
        x = np.maximum(x, least)
    if most is not None:
        x = np.minimum(x, most)
    return (np.array(x),)


def _clip_6(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x = inputs[0]
    least, most = real(node, "min", float(np.finfo(x.dtype).min)), real(node, "max", float(np.finfo(x.dtype).max))
    return (np.clip(x, x.dtype.type(least), x.dtype.type(most)),)


def _prelu(x: Array, slope: Array) -> Array:
    return np.asarray(np.where(x < 0, x * slope, x).astype(x.dtype))


def _is_infinite(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, found = inputs[0], np.isinf(inputs[0])
    if not integer(node, "detect_positive", 1):
        found = found & (x < 0)
    if not integer(node, "detect_negative", 1):
        found = found & (x > 0)
    return (np.asarray(found),)


def _where(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (np.asarray(np.where(*inputs)),)


def _shift(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    left = text(node, "direction", "") == "LEFT"
    return (np.asarray((np.left_shift if left else np.right_shift)(*inputs)),)


def _unary(function: Function) -> Kernel:
    return lambda node, inputs: (np.asarray(function(inputs[0])),)


def _binary(function: Function) -> Kernel:
    return lambda node, inputs: (np.asarray(function(inputs[0], inputs[1])),)


def _variadic(function: Function) -> Kernel:
    return lambda node, inputs: (np.array(reduce(function, inputs)),)


def _scaled(function: Function, **defaults: float) -> Kernel:
    """A function with parameters that are attributes."""
    wide = widened(function)
    return lambda node, inputs: (
        wide(inputs[0], *(inputs[0].dtype.type(real(node, key, value)) for key, value in defaults.items())),
    )


_FLOAT_FUNCTIONS: dict[str, tuple[Function, int]] = {
    "Exp": (np.exp, 6),
    "Log": (np.log, 6),
    "Sqrt": (np.sqrt, 6),
    "Reciprocal": (np.reciprocal, 6),
    "Floor": (np.floor, 6),
    "Ceil": (np.ceil, 6),
    "Round": (np.rint, 11),
    "Sin": (np.sin, 7),
    "Cos": (np.cos, 7),
    "Tan": (np.tan, 7),
    "Asin": (np.arcsin, 7),
    "Acos": (np.arccos, 7),
    "Atan": (np.arctan, 7),
    "Sinh": (np.sinh, 9),
    "Cosh": (np.cosh, 9),
    "Asinh": (np.arcsinh, 9),
    "Acosh": (np.arccosh, 9),
    "Atanh": (np.arctanh, 9),
    "Tanh": (np.tanh, 6),
    "Sigmoid": (_sigmoid, 6),
    "Softplus": (_softplus, 1),
    "Softsign": (lambda x: x / (1 + np.abs(x)), 1),
    "HardSwish": (lambda x: x * np.clip(x / x.dtype.type(6) + x.dtype.type(0.5), 0, 1).astype(x.dtype), 14),
    "Mish": (lambda x: x * np.tanh(_softplus(x)), 18),
}
_BINARY: dict[str, tuple[Function, Collection[DType], int]] = {
    "Add": (np.add, NUMBERS, 7),
    "Sub": (np.subtract, NUMBERS, 7),
    "Mul": (np.multiply, NUMBERS, 7),
    "Div": (_divide, NUMBERS, 7),
    "And": (np.logical_and, BOOL, 7),
    "Or": (np.logical_or, BOOL, 7),
    "Xor": (np.logical_xor, BOOL, 7),
    "Equal": (np.equal, ALL, 7),
    "Greater": (np.greater, NUMBERS, 7),
    "Less": (np.less, NUMBERS, 7),
    "GreaterOrEqual": (np.greater_equal, NUMBERS, 12),
    "LessOrEqual": (np.less_equal, NUMBERS, 12),
    "BitwiseAnd": (np.bitwise_and, INTEGERS, 18),
    "BitwiseOr": (np.bitwise_or, INTEGERS, 18),
    "BitwiseXor": (np.bitwise_xor, INTEGERS, 18),
}


def register(operators: OperatorRegistry) -> None:
    for name, (function, since) in _FLOAT_FUNCTIONS.items():
        operators.register(name, FLOATS, since=since, kernel=_unary(widened(function)))
    for name, (function, dtypes, since) in _BINARY.items():
        operators.register(name, dtypes, since=since, kernel=_binary(function))
    operators.register("Abs", NUMBERS, since=6, kernel=_unary(np.abs))
    operators.register("Neg", FLOATS | SIGNED, since=6, kernel=_unary(np.negative))
    operators.register("Sign", NUMBERS, since=9, kernel=_unary(np.sign))
    operators.register("Relu", FLOATS | SIGNED, since=6, kernel=_unary(lambda x: np.maximum(x, x.dtype.type(0))))
    operators.register("Erf", FLOATS, since=9, kernel=_unary(erf))
    operators.register("Not", BOOL, kernel=_unary(np.logical_not))
    operators.register("BitwiseNot", INTEGERS, since=18, kernel=_unary(np.bitwise_not))
    operators.register("IsNaN", FLOATS, since=9, kernel=_unary(np.isnan))
    operators.register("IsInf", FLOATS, since=10, kernel=_is_infinite)
    operators.register("Pow", FLOATS | {DType.I32, DType.I64}, since=7, kernel=_power)
    operators.register("Mod", NUMBERS, since=10, kernel=_modulo)
    operators.register("BitShift", UNSIGNED, since=11, kernel=_shift)
    operators.register("PRelu", FLOATS | SIGNED | UNSIGNED, since=7, kernel=_binary(_prelu))
    operators.register("Clip", FLOATS, since=6, until=10, kernel=_clip_6)
    operators.register("Clip", NUMBERS, since=11, kernel=_clip)
    operators.register("Where", ALL, since=9, data_input=1, kernel=_where)
    for name, function in (("Max", np.maximum), ("Min", np.minimum)):
        operators.register(name, NUMBERS, since=8, kernel=_variadic(function))
    operators.register("Sum", FLOATS, since=8, kernel=_variadic(np.add))
    operators.register(
        "Mean", FLOATS, since=8, kernel=lambda node, x: (np.asarray(reduce(np.add, x) / x[0].dtype.type(len(x))),)
    )
    operators.register(
        "LeakyRelu", FLOATS, since=6, kernel=_scaled(lambda x, alpha: np.where(x < 0, alpha * x, x), alpha=0.01)
    )
    operators.register(
        "Elu", FLOATS, since=6, kernel=_scaled(lambda x, alpha: np.where(x < 0, alpha * np.expm1(x), x), alpha=1.0)
    )
    operators.register(
        "Celu", {DType.F32}, since=12,
        kernel=_scaled(lambda x, a: np.maximum(x, 0) + np.minimum(0, a * np.expm1(x / a)), alpha=1.0),
    )  # fmt: skip
    operators.register(
        "Selu", FLOATS, since=6,
        kernel=_scaled(
            lambda x, alpha, gamma: gamma * np.where(x <= 0, alpha * np.expm1(x), x),
            alpha=1.67326319217681884765625, gamma=1.05070102214813232421875,
        ),
    )  # fmt: skip
    operators.register(
        "HardSigmoid", FLOATS, since=6,
        kernel=_scaled(lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1).astype(x.dtype), alpha=0.2, beta=0.5),
    )  # fmt: skip
    operators.register(
        "ThresholdedRelu", FLOATS, since=10,
        kernel=_scaled(lambda x, alpha: np.where(x > alpha, x, x.dtype.type(0)), alpha=1.0),
    )  # fmt: skip
    operators.register(
        "Gelu", FLOATS, since=20,
        kernel=lambda node, x: (np.asarray(widened(_gelu)(x[0], text(node, "approximate", "none"))),),
    )  # fmt: skip
