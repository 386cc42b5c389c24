"""The error function, which NumPy lacks.

Taylor series about the nearest multiple of 1/8, with coefficients out of the Hermite recurrence
(Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.19 and 22.7.13); correct to a few units of the last
place of float64. Beyond 6 it is 1.
"""

from __future__ import annotations

import math

import numpy as np

from ai_assistant.hal.graph import Array

_STEP, _LAST, _DEGREE = 8, 6, 13


def _coefficients() -> Array:
    """[centre, power]"""
    rows = []
    for number in range(_LAST * _STEP + 1):
        centre = number / _STEP
        # The (n+1)th derivative is 2/sqrt(pi) · (-1)^n · H_n(x) · exp(-x²).
        hermite = [1.0, 2 * centre]
        for n in range(1, _DEGREE):
            hermite.append(2 * centre * hermite[n] - 2 * n * hermite[n - 1])
        scale = 2 / math.sqrt(math.pi) * math.exp(-centre * centre)
        rows.append(
            [math.erf(centre)] + [scale * (-1) ** n * hermite[n] / math.factorial(n + 1) for n in range(_DEGREE)]
        )
    return np.array(rows)


_TABLE = _coefficients()


def erf(x: Array) -> Array:
    """Of every element; the type stays."""
    wide = np.abs(x.astype(np.float64))
    near = np.minimum(np.where(np.isnan(wide), 0, wide), _LAST)
    centre = np.rint(near * _STEP).astype(np.intp)
    distance = near - centre / _STEP
    rows = _TABLE[centre]
    found = rows[..., -1]
    for power in range(_DEGREE - 1, -1, -1):
        found = found * distance + rows[..., power]
    found = np.where(np.isnan(wide), np.nan, np.copysign(found, x))
    return np.asarray(found.astype(x.dtype))
