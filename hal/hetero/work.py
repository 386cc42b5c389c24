"""How much work an operator is, from shapes alone: what its time is estimated from where it was not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ai_assistant.hal.graph import NO_VALUE, Graph, Node, TensorSpec

_UNKNOWN_SIZE = 1
_FREE = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant", "Dropout"})
"""Operators that touch no element, or could do without."""
_PER_ELEMENT = {
    "Exp": 10.0, "Log": 10.0, "Tanh": 15.0, "Sigmoid": 12.0, "Erf": 15.0, "Gelu": 20.0, "Pow": 20.0, "Softmax": 15.0,
    "LogSoftmax": 15.0, "LayerNormalization": 8.0, "BatchNormalization": 4.0, "InstanceNormalization": 8.0,
    "Sin": 15.0, "Cos": 15.0, "Sqrt": 4.0, "Div": 4.0, "Elu": 12.0, "Softplus": 20.0, "Mish": 30.0,
}  # fmt: skip
"""Operations for an element of the output; 1 for what is not here."""


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic operations, a multiply-add being two, and bytes read and written once."""

    flops: float
    moved_bytes: float

    def seconds(self, flops_s: float, bytes_s: float) -> float:
        """With a device's rates: whichever of the two takes longer."""
        return max(self.flops / flops_s, self.moved_bytes / bytes_s)


def elements(spec: TensorSpec | None) -> int:
    """Elements of a tensor; a size that is not known counts as one."""
    if spec is None:
        return _UNKNOWN_SIZE
    return math.prod(_UNKNOWN_SIZE if size is None else size for size in spec.shape)


def nbytes(spec: TensorSpec | None) -> int:
    return elements(spec) * (4 if spec is None else spec.dtype.itemsize)


def work(node: Node, graph: Graph) -> Work:
    """What one run of a node takes. Never raises: what is strange is counted by its outputs."""
    ins = [None if index == NO_VALUE else graph.values[index].spec for index in node.inputs]
    outs = [graph.values[index].spec for index in node.outputs if index != NO_VALUE]
    written = sum(nbytes(each) for each in outs)
    made = sum(elements(each) for each in outs)
    if node.domain in ("", "ai.onnx"):
        if node.op in _FREE:
            return Work(0.0, 0.0)
        if node.op in ("Gather", "GatherElements", "GatherND", "Slice", "Split", "Expand", "Tile"):
            # They read what they write, not the whole table.
            return Work(0.0, 2.0 * written)
        contraction = _contraction(node, ins)
        if contraction:
            read = sum(nbytes(each) for index, each in zip(node.inputs, ins, strict=True) if index != NO_VALUE)
            return Work(2.0 * made * contraction, float(read + written))
    read = sum(nbytes(each) for index, each in zip(node.inputs, ins, strict=True) if index != NO_VALUE)
    touched = max(made, *(elements(each) for each in ins), 0) if ins else made
    return Work(_PER_ELEMENT.get(node.op, 1.0) * touched, float(read + written))


def _contraction(node: Node, ins: list[TensorSpec | None]) -> int:
    """Multiply-adds for one element of the output; 0 for operators that sum no products."""

    def shape(place: int) -> tuple[int, ...]:
        spec = ins[place] if place < len(ins) else None
        return () if spec is None else tuple(_UNKNOWN_SIZE if size is None else size for size in spec.shape)

    if node.op in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        left = shape(0)
        return left[-1] if left else 0
    if node.op == "Gemm":
        left = shape(0)
        return left[0 if node.attributes.get("transA") else -1] if len(left) == 2 else 0
    if node.op in ("Conv", "ConvInteger", "QLinearConv"):
        # The weight is (out, in / groups, kernel …).
        weight = shape(3 if node.op == "QLinearConv" else 1)
        return math.prod(weight[1:]) if len(weight) > 2 else 0
    if node.op in ("AveragePool", "MaxPool"):
        kernel = node.attributes.get("kernel_shape")
        return math.prod(int(each) for each in kernel) if isinstance(kernel, tuple) and kernel else 0
    return 0
