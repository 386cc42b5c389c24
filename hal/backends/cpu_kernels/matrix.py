"""Products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from ai_assistant.hal.backends.cpu_kernels.common import FLOATS, given, integer, real, text
from ai_assistant.hal.graph import Array, DType, Graph, Node
from ai_assistant.hal.operators import OperatorRegistry

_TYPES = FLOATS | {DType.I32, DType.I64, DType.U32, DType.U64}
_MAX_OPERANDS = 8


def _matmul(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    a, b = inputs
    if a.dtype == np.float16:
        return (np.asarray(np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.float16)),)
    return (np.asarray(np.matmul(a, b)),)


def _gemm(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    a, b, c = inputs[0], inputs[1], given(inputs, 2)
    dtype = a.dtype
    if dtype == np.float16:
        a, b = a.astype(np.float32), b.astype(np.float32)
    a = a.T if integer(node, "transA", 0) else a
    b = b.T if integer(node, "transB", 0) else b
    product = a @ b
    # Whole numbers are scaled as real ones, and cut off at the end.
    alpha, beta = real(node, "alpha", 1.0), real(node, "beta", 1.0)
    if alpha != 1:
        product = product * (product.dtype.type(alpha) if dtype.kind == "f" else alpha)
    if c is not None and beta != 0:
        product = product + (c if beta == 1 else c * (product.dtype.type(beta) if dtype.kind == "f" else beta))
    return (np.asarray(product.astype(dtype)),)


def _einsum(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (np.asarray(np.einsum(text(node, "equation", ""), *inputs, optimize=True)).astype(inputs[0].dtype),)


def _einsum_check(node: Node, graph: Graph) -> str:
    return "" if len(node.inputs) <= _MAX_OPERANDS else f"more than {_MAX_OPERANDS} operands"


def register(operators: OperatorRegistry) -> None:
    operators.register("MatMul", _TYPES, kernel=_matmul)
    operators.register("Gemm", _TYPES, since=7, kernel=_gemm)
    operators.register("Einsum", FLOATS - {DType.F16}, since=12, check=_einsum_check, kernel=_einsum)
