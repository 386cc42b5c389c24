"""The mandatory profile: operators in the plain forms that every network uses, for f32. Silver needs all of them."""

from __future__ import annotations

import numpy as np

from ai_assistant.hal.conformance.families.row import Sample, ints
from ai_assistant.hal.graph import Array

_RANDOM = np.random.default_rng(20)


def _floats(*shape: int, low: float = -1, high: float = 1) -> Array:
    return _RANDOM.uniform(low, high, shape).astype(np.float32)


def _weights(inputs: list[Array | None], **attributes: int | float | tuple[int, ...]) -> Sample:
    """All inputs but the first are constants."""
    return Sample(inputs, attributes, frozenset(range(1, len(inputs))))


_TOKENS = (2, 5, 33)
"""Batch, tokens, features: no multiple of a vector register."""

PROFILE: dict[str, dict[str, tuple[Sample, ...]]] = {
    "MatMul": {
        "MatMul": (
            Sample([_floats(5, 7), _floats(7, 3)]),
            _weights([_floats(*_TOKENS), _floats(33, 17)]),
            Sample([_floats(2, 3, 5, 8), _floats(2, 3, 8, 5)]),
        )
    },
    "Gemm": {
        "Gemm": (
            _weights([_floats(3, 20), _floats(20, 9), _floats(9)]),
            _weights([_floats(3, 20), _floats(9, 20), _floats(9)], transB=1),
        )
    },
    "Add": {
        "Add": (
            Sample([_floats(*_TOKENS), _floats(*_TOKENS)]),
            _weights([_floats(*_TOKENS), _floats(33)]),
            _weights([_floats(*_TOKENS), np.array(0.5, np.float32)]),
        )
    },
    "Mul": {
        "Mul": (
            Sample([_floats(*_TOKENS), _floats(*_TOKENS)]),
            _weights([_floats(*_TOKENS), _floats(33)]),
            _weights([_floats(*_TOKENS), np.array(0.125, np.float32)]),
        )
    },
    "Softmax": {
        "Softmax": (
            Sample([_floats(2, 4, 9, 9, low=-8, high=8)], {"axis": -1}),
            Sample([_floats(3, 100, low=80, high=100)], {"axis": -1}),  # overflows unless the largest is taken off
        )
    },
    "LayerNormalization": {
        "LayerNormalization": (
            _weights([_floats(*_TOKENS), _floats(33, low=0.5, high=2), _floats(33)], axis=-1),
            _weights([_floats(1, 4, 64), _floats(64), _floats(64)], axis=-1, epsilon=1e-12),
        )
    },
    "Gelu or Erf": {
        "Gelu": (Sample([_floats(*_TOKENS, low=-4, high=4)]),),
        "Erf": (Sample([_floats(*_TOKENS, low=-4, high=4)]),),
    },
    "Conv": {
        "Conv": (
            _weights([_floats(1, 3, 9, 9), _floats(4, 3, 3, 3), _floats(4)], kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
            _weights([_floats(1, 4, 8, 8), _floats(6, 4, 1, 1), _floats(6)], kernel_shape=(1, 1)),
            _weights([_floats(1, 3, 9, 9), _floats(4, 3, 3, 3), _floats(4)], kernel_shape=(3, 3), strides=(2, 2)),
        )
    },
    "Relu": {"Relu": (Sample([_floats(*_TOKENS)]), Sample([_floats(1)]))},
    "Reshape": {
        "Reshape": (
            _weights([_floats(2, 5, 24), ints(2, 5, 4, 6)]),
            _weights([_floats(2, 5, 4, 6), ints(2, 5, -1)]),
        )
    },
    "Transpose": {
        "Transpose": (
            Sample([_floats(4, 7)], {"perm": (1, 0)}),
            Sample([_floats(2, 5, 4, 6)], {"perm": (0, 2, 1, 3)}),
        )
    },
    "Gather": {
        "Gather": (
            Sample([_floats(20, 8), ints(3, 0, 19, 3)], {"axis": 0}),
            Sample([_floats(20, 8), ints(3, 0, 19, 3).reshape(2, 2)], {"axis": 0}),
        )
    },
}
"""Name in the profile → the operators one of which is enough → examples."""
