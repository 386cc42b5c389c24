"""The operators of the `cpu` backend, by family. A kernel gets the node and arrays, and gives arrays."""

from __future__ import annotations

from ai_assistant.hal.backends.cpu_kernels import (
    convolution,
    elementwise,
    index,
    matrix,
    normalisation,
    reduction,
    shape,
)
from ai_assistant.hal.operators import OperatorRegistry

OPERATORS = OperatorRegistry()
for _family in (elementwise, matrix, convolution, normalisation, reduction, shape, index):
    _family.register(OPERATORS)
