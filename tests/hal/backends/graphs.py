"""Small graphs for tests of backends, and what they should compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ai_assistant.hal.contract import Context
from ai_assistant.hal.graph import Array, Attribute, DType, Graph, Node, TensorSpec, Value


def f32(*shape: int | None) -> TensorSpec:
    return TensorSpec(DType.F32, shape)


def one(
    op: str,
    version: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    attributes: Mapping[str, Attribute] | None = None,
    constants: Mapping[int, Array] | None = None,
    opset: int = 20,
) -> Graph:
    """A graph of one operator. Constants by the number of the input that they are."""
    count, constants = len(inputs), constants or {}
    values = [Value(f"x{number}", spec, constants.get(number)) for number, spec in enumerate(inputs)]
    values += [Value(f"y{number}", spec) for number, spec in enumerate(outputs)]
    made = tuple(range(count, count + len(outputs)))
    return Graph(
        tuple(values),
        (Node(op, version, tuple(range(count)), made, attributes or {}),),
        tuple(number for number in range(count) if number not in constants),
        made,
        {"": opset},
    )


def block(rows: int = 8, width: int = 16) -> Graph:
    """relu(x·w + b) · v + x: what most networks are made of."""
    random = np.random.default_rng(1)
    hidden = 2 * width
    w = random.standard_normal((width, hidden), np.float32)
    b = random.standard_normal(hidden, np.float32)
    v = random.standard_normal((hidden, width), np.float32)
    values = (
        Value("x", f32(rows, width)), Value("w", f32(width, hidden), w), Value("b", f32(hidden), b),
        Value("v", f32(hidden, width), v), Value("xw", f32(rows, hidden)), Value("s", f32(rows, hidden)),
        Value("r", f32(rows, hidden)), Value("rv", f32(rows, width)), Value("y", f32(rows, width)),
    )  # fmt: skip
    nodes = (
        Node("MatMul", 13, (0, 1), (4,)), Node("Add", 14, (4, 2), (5,)), Node("Relu", 14, (5,), (6,)),
        Node("MatMul", 13, (6, 3), (7,)), Node("Add", 14, (7, 0), (8,)),
    )  # fmt: skip
    return Graph(values, nodes, (0,), (8,), {"": 20})


def block_result(graph: Graph, x: Array) -> Array:
    w, b, v = (graph.values[index].data for index in (1, 2, 3))
    assert w is not None
    assert b is not None
    assert v is not None
    result: Array = np.maximum(x @ w + b, 0) @ v + x
    return result


def run(context: Context, graph: Graph, *inputs: Array, program: Any = None) -> list[Array]:
    """Compile, run once, and take what came out."""
    program = program or context.compile(graph)
    tensors = [context.allocator.upload(each) for each in inputs]
    outputs = [context.allocator.tensor(each) for each in program.output_specs([each.spec for each in tensors])]
    queue = context.queue()
    queue.submit(program, tensors, outputs).wait(60)
    queue.close()
    return [context.allocator.download(each) for each in outputs]
