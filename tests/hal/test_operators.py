"""What a backend declares is what it means: versions, types, and shapes that fit the operator."""

from __future__ import annotations

import pytest

from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.operators import NEWEST_OPSET, Check, OperatorRegistry, broadcast, makes, matmul, same

Shape = tuple[int | None, ...]


def _reason(check: Check, inputs: list[Shape], output: Shape, *types: DType) -> str:
    shapes = [*inputs, output]
    specs = [TensorSpec(each, shape) for each, shape in zip(types or [DType.F32] * len(shapes), shapes, strict=True)]
    values = tuple(Value(f"v{number}", spec) for number, spec in enumerate(specs))
    given = tuple(range(len(inputs)))
    graph = Graph(values, (Node("Op", 1, given, (len(inputs),)),), given, (len(inputs),))
    return check(graph.nodes[0], graph)


@pytest.mark.parametrize(
    ("check", "inputs", "output"),
    [
        (same, [(2, 3)], (2, 3)),
        (same, [()], ()),
        (broadcast, [(2, 1), (3,)], (2, 3)),
        (broadcast, [(), (0, 4)], (0, 4)),
        (matmul, [(2, 3), (3, 4)], (2, 4)),
        (matmul, [(3,), (3, 4)], (4,)),
        (matmul, [(2, 3), (3,)], (2,)),
        (matmul, [(3,), (3,)], ()),
        (matmul, [(5, 1, 2, 3), (7, 3, 4)], (5, 7, 2, 4)),
        (matmul, [(5, 2, 3), (3,)], (5, 2)),
        (matmul, [(3,), (5, 3, 2)], (5, 2)),
        (matmul, [(2, 0), (0, 4)], (2, 4)),
    ],
)
def test_shapes_that_fit(check: Check, inputs: list[Shape], output: Shape) -> None:
    assert _reason(check, inputs, output) == ""


@pytest.mark.parametrize(
    ("check", "inputs", "output", "reason"),
    [
        (same, [(2, 3)], (3, 2), "makes the shape (2, 3) here, and the graph says (3, 2)"),
        (same, [(2,), (2,)], (2,), "1 input and one output"),
        (broadcast, [(2,)], (2,), "2 inputs and one output"),
        (broadcast, [(2,), (3,)], (3,), "shape mismatch"),
        (broadcast, [(2, 1), (3,)], (2, 1), "makes the shape (2, 3)"),
        (matmul, [(2, 3), (2, 3)], (2, 3), "do not fit"),
        (matmul, [(), (2, 3)], (2, 3), "no matrix"),
        (matmul, [(2, 2, 3), (5, 3, 4)], (5, 2, 4), "shape mismatch"),
        (same, [(None,)], (2,), "not fixed"),
    ],
)
def test_shapes_that_contradict_the_operator(check: Check, inputs: list[Shape], output: Shape, reason: str) -> None:
    assert reason in _reason(check, inputs, output)


def test_types_that_are_mixed_or_unknown() -> None:
    assert "mixed types" in _reason(broadcast, [(2,), (2,)], (2,), DType.F32, DType.I32, DType.F32)
    assert "mixed types" in _reason(same, [(2,)], (2,), DType.F32, DType.F64)
    graph = Graph((Value("x", TensorSpec(DType.F32)), Value("y", None)), (Node("Op", 1, (0,), (1,)),), (0,), (1,))
    assert "not known" in same(graph.nodes[0], graph)


def test_inputs_that_are_left_out() -> None:
    one = TensorSpec(DType.F32)
    graph = Graph((Value("x", one), Value("y", one)), (Node("Op", 1, (0, NO_VALUE), (1,)),), (0,), (1,))
    assert "2 inputs" in broadcast(graph.nodes[0], graph)


def test_a_shape_of_ones_own() -> None:
    halves = makes(1, lambda x: (*x[:-1], x[-1] // 2))
    assert _reason(halves, [(3, 8)], (3, 4)) == ""
    assert "makes the shape (3, 4)" in _reason(halves, [(3, 8)], (3, 8))
    assert "out of range" in _reason(halves, [()], ())


def test_versions_that_nobody_knows() -> None:
    operators = OperatorRegistry()
    operators.register("Relu", {DType.F32}, since=6)
    operators.register("Own", {DType.F32}, domain="com.example")
    spec = TensorSpec(DType.F32, (1,))

    def supported(op: str, version: int, domain: str = "") -> bool:
        node = Node(op, version, (0,), (1,), domain=domain)
        return bool(operators.supports(node, Graph((Value("x", spec), Value("y", spec)), (node,), (0,), (1,))))

    assert supported("Relu", 6)
    assert supported("Relu", NEWEST_OPSET)
    assert not supported("Relu", 5)
    assert not supported("Relu", NEWEST_OPSET + 1)
    assert supported("Own", 1000, "com.example")
    operators.register("New", {DType.F32}, since=NEWEST_OPSET + 1)  # by somebody who knows more than this does
    assert supported("New", NEWEST_OPSET + 1)
    assert not supported("New", NEWEST_OPSET + 2)


@pytest.mark.engine
def test_the_newest_version_is_that_of_the_library() -> None:
    """When ONNX is renewed, see which operators got another meaning before this number follows."""
    from onnx import defs

    assert defs.onnx_opset_version() == NEWEST_OPSET
