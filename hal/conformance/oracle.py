"""What is right: `onnx.reference` computes it, not code of ours. And how near a result must come to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ai_assistant.hal.conformance import reference
from ai_assistant.hal.conformance.case import CaseFailed
from ai_assistant.hal.conformance.families.row import Sample
from ai_assistant.hal.graph import NO_VALUE, Array, DType, Graph, Node, TensorSpec, Value

TOLERANCE: Mapping[DType, tuple[float, float]] = {
    DType.F64: (1e-6, 1e-7),
    DType.F32: (1e-4, 1e-5),
    DType.F16: (4e-3, 4e-3),
}
"""Relative and absolute, times `loose`: |found - right| <= absolute + relative * |right|. Others are exact."""


def since(op: str, opset: int) -> int:
    """The version of an operator that is in force in an operator set."""
    version: int = onnx.defs.get_schema(op, opset, "").since_version
    return version


def _attribute(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return numpy_helper.from_array(value)
    return list(value) if isinstance(value, tuple) else value


def evaluate(op: str, sample: Sample, opset: int) -> list[Array]:
    """The right outputs."""
    names = [f"x{number}" if array is not None else "" for number, array in enumerate(sample.inputs)]
    made = [f"y{number}" for number in range(sample.outputs)]
    node = helper.make_node(op, names, made, **{name: _attribute(value) for name, value in sample.attributes.items()})
    given = {name: array for name, array in zip(names, sample.inputs, strict=True) if array is not None}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in made]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    with np.errstate(all="ignore"):
        found: list[Any] = reference.load()(model).run(None, given)
    return [np.asarray(each) for each in found]


def graph_of(op: str, sample: Sample, right: Sequence[Array], opset: int) -> Graph:
    """The same operator as a graph for a backend."""
    values: list[Value] = []
    inputs: list[int] = []
    used: list[int] = []
    for number, array in enumerate(sample.inputs):
        if array is None:
            used.append(NO_VALUE)
            continue
        spec = TensorSpec(DType.of(array.dtype), array.shape)
        fixed = number in sample.constant
        used.append(len(values))
        if not fixed:
            inputs.append(len(values))
        values.append(Value(f"x{number}", spec, array if fixed else None))
    outputs = tuple(range(len(values), len(values) + len(right)))
    values += [
        Value(f"y{number}", TensorSpec(DType.of(array.dtype), array.shape)) for number, array in enumerate(right)
    ]
    node = Node(op, since(op, opset), tuple(used), outputs, sample.attributes, "", op.lower())
    return Graph(tuple(values), (node,), tuple(inputs), outputs, {"": opset})


def compare(found: Sequence[Array], right: Sequence[Array], loose: float = 1.0) -> None:
    """Raises CaseFailed: where the difference is, and how large."""
    if len(found) != len(right):
        raise CaseFailed(f"{len(right)} outputs are right, {len(found)} were made")
    for number, (mine, true) in enumerate(zip(found, right, strict=True)):
        if mine.dtype != true.dtype or mine.shape != true.shape:
            raise CaseFailed(
                f"output {number} is {mine.dtype}{list(mine.shape)}, right is {true.dtype}{list(true.shape)}"
            )
        kind = DType.of(true.dtype)
        if kind not in TOLERANCE:
            if not np.array_equal(mine, true):
                raise CaseFailed(f"output {number} differs in {int(np.sum(mine != true))} of {true.size} elements")
            continue
        relative, absolute = (each * loose for each in TOLERANCE[kind])
        near = np.isclose(mine.astype(np.float64), true.astype(np.float64), relative, absolute, equal_nan=True)
        if not np.all(near):
            place = tuple(int(axis) for axis in np.argwhere(~near)[0])
            raise CaseFailed(
                f"output {number} differs in {int(np.sum(~near))} of {true.size} elements:"
                f" at {list(place)} it is {float(mine[place]):.6g}, right is {float(true[place]):.6g}"
            )
