"""Operators as ggml has them. ggml's sizes are ONNX's in reverse, four of them, and its numbers here are all f32.

Tensors of f16 are computed as f32 and rounded at the graph's outputs. Where ggml means something else than ONNX – a
table for the approximated GELU, no error function, no operators on integers – the operator is not declared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ai_assistant.errors import NotSupported
from ai_assistant.hal.ggml.library import F32
from ai_assistant.hal.graph import NO_VALUE, Array, DType, Graph, Node
from ai_assistant.hal.operators import OperatorRegistry

MAX_RANK = 4
FLOATS = frozenset({DType.F32, DType.F16})
OPERATORS = OperatorRegistry()


@dataclass(frozen=True, slots=True)
class T:
    """A tensor of ggml's: its address, its shape as ONNX has it, and whether it is a view of another."""

    at: int
    shape: tuple[int, ...]
    view: bool = False

    @property
    def ne(self) -> tuple[int, int, int, int]:
        first, second, third, fourth = (*reversed(self.shape), 1, 1, 1, 1)[:4]
        return first, second, third, fourth


@dataclass
class Build:
    """The graph that is being made.

    Args:
        pool: of descriptions, see `Library.context`.
        weights: such a pool for the constants.
        constants: of the graph, given to ggml as they are needed: where each went.
        operators: what was made of ggml's.
    """

    lib: Any
    pool: int
    weights: int
    graph: Graph
    made: dict[int, T] = field(default_factory=dict)
    constants: list[tuple[int, Array]] = field(default_factory=list)
    operators: list[tuple[str, int]] = field(default_factory=list)

    def input(self, shape: tuple[int, ...]) -> T:
        made = self._new(self.pool, shape)
        self.lib.set_input(made.at)
        return made

    def _new(self, pool: int, shape: tuple[int, ...]) -> T:
        draft = T(0, shape)
        return T(self.lib.new_tensor_4d(pool, F32, *draft.ne), shape)

    def constant(self, data: Array) -> T:
        made = self._new(self.weights, data.shape)
        self.constants.append((made.at, np.asarray(data, np.float32, order="C")))
        return made

    def get(self, index: int) -> T:
        if index not in self.made:
            data = self.graph.values[index].data
            assert data is not None
            self.made[index] = self.constant(data)
        return self.made[index]

    def call(self, name: str, shape: tuple[int, ...], *arguments: T | int | float) -> T:
        raw = (each.at if isinstance(each, T) else each for each in arguments)
        made = T(getattr(self.lib, name)(self.pool, *raw), shape)
        self.operators.append((name, made.at))
        return made

    def reshape(self, tensor: T, shape: tuple[int, ...]) -> T:
        if tensor.shape == shape:
            return tensor
        made = self.call("reshape_4d", shape, tensor, *T(0, shape).ne)
        return T(made.at, shape, view=True)

    def repeat(self, tensor: T, shape: tuple[int, ...]) -> T:
        """Broadcast to a shape."""
        if T(0, tensor.shape).ne == T(0, shape).ne:
            return self.reshape(tensor, shape)
        return self.call("repeat_4d", shape, tensor, *T(0, shape).ne)

    def transpose(self, tensor: T, order: tuple[int, ...]) -> T:
        rank = len(order)
        to = [0, 1, 2, 3]
        for new, old in enumerate(order):
            to[rank - 1 - old] = rank - 1 - new
        shape = tuple(tensor.shape[each] for each in order)
        return self.call("cont", shape, self.call("permute", shape, tensor, *to))

    def both(self, name: str, a: T, b: T) -> T:
        shape = tuple(np.broadcast_shapes(a.shape, b.shape))
        if name in ("add", "mul") and math.prod(a.shape) < math.prod(b.shape):
            a, b = b, a
        return self.call(name, shape, self.repeat(a, shape), b)

    def matmul(self, a: T, b: T, b_index: int = NO_VALUE) -> T:
        """Of matrices, with the same rules as NumPy's matmul, for two dimensions and more."""
        batch = tuple(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
        data = self.graph.values[b_index].data if b_index != NO_VALUE else None
        if data is not None:
            turned = self.constant(np.ascontiguousarray(np.swapaxes(data, -1, -2)))
        else:
            rank = len(b.shape)
            turned = self.transpose(b, (*range(rank - 2), rank - 1, rank - 2))
        rows, columns = a.shape[-2], b.shape[-1]
        if math.prod(a.shape[:-2]) != math.prod(batch):
            a = self.repeat(a, (*batch, *a.shape[-2:]))
        return self.call("mul_mat", (*batch, rows, columns), turned, a)


Kernel = Callable[[Build, Node], T]
KERNELS: dict[str, Kernel] = {}


def problem(node: Node, graph: Graph) -> str:
    """What every operator here needs; "" when it is so.

    A graph may come from anywhere, and ggml ends the process when sizes do not fit: everything is checked before.
    """
    for index in (*node.inputs, *node.outputs):
        if index == NO_VALUE:
            continue
        spec = graph.values[index].spec
        if spec is None or not spec.static:
            return "ggml needs fixed sizes"
        if len(spec.shape) > MAX_RANK:
            return f"ggml has at most {MAX_RANK} dimensions"
        if 0 in spec.shape:
            return "ggml has no empty tensors"
        if any(size is not None and size >= 1 << 31 for size in spec.shape):
            return "a dimension has more than 2^31 elements"
    if sum(index != NO_VALUE for index in node.outputs) != 1 or node.outputs[0] == NO_VALUE:
        return "only the first output is computed"
    return ""


def _declare(op: str, kernel: Kernel, since: int = 1, check: Callable[[Node, Graph], str] | None = None) -> None:
    def checked(node: Node, graph: Graph) -> str:
        return problem(node, graph) or (check(node, graph) if check else "")

    OPERATORS.register(op, FLOATS, since=since, check=checked)
    KERNELS[op] = kernel


def _shape(graph: Graph, index: int) -> tuple[int, ...]:
    return graph.spec(index).sizes


def _rank(node: Node, graph: Graph) -> int:
    return len(_shape(graph, node.inputs[0]))


# ------------------------------------------------------------------------------------------------- of single elements


def _fits(node: Node, graph: Graph) -> str:
    if len(node.inputs) != 2 or NO_VALUE in node.inputs:
        return "it needs two inputs"
    a, b = node.inputs
    if graph.spec(a).dtype != graph.spec(b).dtype:
        return "its inputs are of two types"
    try:
        shape = tuple(np.broadcast_shapes(_shape(graph, a), _shape(graph, b)))
    except ValueError:
        return "its inputs' sizes do not fit each other"
    return "" if shape == _shape(graph, node.outputs[0]) else "its output's size does not fit its inputs'"


def _same(node: Node, graph: Graph) -> str:
    if _shape(graph, node.inputs[0]) != _shape(graph, node.outputs[0]):
        return "its output's size does not fit its input's"
    return ""


for _op, _name in (("Add", "add"), ("Sub", "sub"), ("Mul", "mul"), ("Div", "div")):
    _declare(_op, lambda b, n, name=_name: b.both(name, b.get(n.inputs[0]), b.get(n.inputs[1])), 7, _fits)  # type: ignore[misc]

for _op, _name in (("Tanh", "tanh"), ("Sigmoid", "sigmoid"), ("Sqrt", "sqrt"), ("Neg", "neg"), ("Abs", "abs"),
                   ("Exp", "exp")):  # fmt: skip
    _declare(_op, lambda b, n, name=_name: b.call(name, (t := b.get(n.inputs[0])).shape, t), 6, _same)  # type: ignore[misc]


def _relu(build: Build, node: Node) -> T:
    tensor = build.get(node.inputs[0])
    return build.call("relu", tensor.shape, tensor)


def _gelu(build: Build, node: Node) -> T:
    tensor = build.get(node.inputs[0])
    return build.call("gelu_erf", tensor.shape, tensor)


def _exact_gelu(node: Node, graph: Graph) -> str:
    if node.attributes.get("approximate", "none") not in ("none", b"none"):
        return "ggml approximates GELU by a table of 16-bit numbers: only approximate=none is the same"
    return _same(node, graph)


_declare("Relu", _relu, 6, _same)
_declare("Gelu", _gelu, 20, _exact_gelu)


# ------------------------------------------------------------------------------------------------------------- of rows


def _last_axis(default: int) -> Callable[[Node, Graph], str]:
    def check(node: Node, graph: Graph) -> str:
        rank = _rank(node, graph)
        axis = node.attributes.get("axis", default if node.version >= 13 else 1)
        if not rank or axis not in (-1, rank - 1):
            return "only the last axis"
        return _same(node, graph)

    return check


def _softmax(build: Build, node: Node) -> T:
    tensor = build.get(node.inputs[0])
    return build.call("soft_max", tensor.shape, tensor)


def _norm(build: Build, node: Node) -> T:
    tensor = build.get(node.inputs[0])
    epsilon = node.attributes.get("epsilon", 1e-5)
    assert isinstance(epsilon, int | float)
    tensor = build.call("norm", tensor.shape, tensor, float(epsilon))
    tensor = build.both("mul", tensor, build.get(node.inputs[1]))
    if len(node.inputs) > 2 and node.inputs[2] != NO_VALUE:
        tensor = build.both("add", tensor, build.get(node.inputs[2]))
    return tensor


def _norm_fits(node: Node, graph: Graph) -> str:
    rank = _rank(node, graph)
    if not rank or node.attributes.get("axis", -1) not in (-1, rank - 1):
        return "only the last axis"
    epsilon = node.attributes.get("epsilon", 1e-5)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1e30:
        return "its epsilon is negative, or no number"
    width = _shape(graph, node.inputs[0])[-1]
    for index in node.inputs[1:]:
        if index != NO_VALUE and _shape(graph, index) not in ((width,), (1,), ()):
            return "its scale and bias must be as long as a row"
        if index != NO_VALUE and graph.spec(index).dtype != graph.spec(node.inputs[0]).dtype:
            return "its inputs are of two types"
    if len(node.inputs) < 2 or node.inputs[1] == NO_VALUE:
        return "it needs a scale"
    return _same(node, graph)


_declare("Softmax", _softmax, 1, _last_axis(-1))
_declare("LayerNormalization", _norm, 17, _norm_fits)


# --------------------------------------------------------------------------------------------------------- of matrices


def _matmul(build: Build, node: Node) -> T:
    a, b = build.get(node.inputs[0]), node.inputs[1]
    shape = _shape(build.graph, node.outputs[0])
    other = _shape(build.graph, b)
    if len(other) == 1:
        right, index = build.reshape(build.get(b), (other[0], 1)), NO_VALUE
    elif build.graph.values[b].data is not None:
        right, index = T(0, other), b  # turned around once, before it is given to the device
    else:
        right, index = build.get(b), NO_VALUE
    if len(a.shape) == 1:
        a = build.reshape(a, (1, a.shape[0]))
    return build.reshape(build.matmul(a, right, index), shape)


def _matmul_fits(node: Node, graph: Graph) -> str:
    if len(node.inputs) != 2 or NO_VALUE in node.inputs:
        return "it needs two inputs"
    a, b = (_shape(graph, index) for index in node.inputs)
    if graph.spec(node.inputs[0]).dtype != graph.spec(node.inputs[1]).dtype:
        return "its inputs are of two types"
    if not a or not b:
        return "a number is no matrix"
    left, right = a if len(a) > 1 else (1, *a), b if len(b) > 1 else (*b, 1)
    try:
        batch = np.broadcast_shapes(left[:-2], right[:-2])
    except ValueError:
        return "its inputs' sizes do not fit each other"
    made = (*batch, *left[-2:-1] * (len(a) > 1), *right[-1:] * (len(b) > 1))
    if left[-1] != right[-2] or made != _shape(graph, node.outputs[0]):
        return "its inputs' and output's sizes do not fit each other"
    return ""


def _number(node: Node, name: str, default: float) -> float:
    value = node.attributes.get(name, default)
    return float(value) if isinstance(value, int | float) else math.nan


def _gemm(build: Build, node: Node) -> T:
    a, b = build.get(node.inputs[0]), node.inputs[1]
    if node.attributes.get("transA", 0):
        a = build.transpose(a, (1, 0))
    shape = _shape(build.graph, b)
    data = build.graph.values[b].data
    if node.attributes.get("transB", 0):
        # ggml wants the second one turned around, and it already is.
        made = build.call("mul_mat", (a.shape[0], shape[0]), build.get(b), a)
    elif data is not None:
        made = build.matmul(a, T(0, shape), b)
    else:
        made = build.matmul(a, build.get(b))
    if (alpha := _number(node, "alpha", 1.0)) != 1:
        made = build.call("scale", made.shape, made, alpha)
    if len(node.inputs) > 2 and node.inputs[2] != NO_VALUE:
        bias = build.get(node.inputs[2])
        if (beta := _number(node, "beta", 1.0)) != 1:
            bias = build.call("scale", bias.shape, bias, beta)
        made = build.both("add", made, bias)
    return made


def _gemm_fits(node: Node, graph: Graph) -> str:
    if len(node.inputs) < 2 or NO_VALUE in node.inputs[:2]:
        return "it needs two inputs"
    present = [index for index in node.inputs if index != NO_VALUE]
    if len({graph.spec(index).dtype for index in present}) != 1:
        return "its inputs are of two types"
    if not all(math.isfinite(_number(node, name, 1.0)) for name in ("alpha", "beta")):
        return "its factors are no finite numbers"
    a, b = (_shape(graph, index) for index in node.inputs[:2])
    if len(a) != 2 or len(b) != 2:
        return "its inputs are no matrices"
    left = a[::-1] if node.attributes.get("transA", 0) else a
    right = b[::-1] if node.attributes.get("transB", 0) else b
    made = (left[0], right[1])
    if left[1] != right[0] or made != _shape(graph, node.outputs[0]):
        return "its inputs' and output's sizes do not fit each other"
    if len(present) > 2:
        try:
            if tuple(np.broadcast_shapes(made, _shape(graph, present[2]))) != made:
                return "its third input does not fit"
        except ValueError:
            return "its third input does not fit"
    return ""


_declare("MatMul", _matmul, 1, _matmul_fits)
_declare("Gemm", _gemm, 7, _gemm_fits)


# ----------------------------------------------------------------------------------------------------------- of shapes


def _reshape(build: Build, node: Node) -> T:
    return build.reshape(build.get(node.inputs[0]), _shape(build.graph, node.outputs[0]))


def _as_many(node: Node, graph: Graph) -> str:
    if any(index != NO_VALUE and graph.values[index].data is None for index in node.inputs[1:]):
        return "its shape must be a constant"
    before, after = (_shape(graph, index) for index in (node.inputs[0], node.outputs[0]))
    return "" if math.prod(before) == math.prod(after) else "its output has another number of elements"


for _op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"):
    _declare(_op, _reshape, 1, _as_many)


def _order(node: Node, graph: Graph) -> tuple[int, ...]:
    order = node.attributes.get("perm")
    return tuple(reversed(range(_rank(node, graph)))) if order is None else order  # type: ignore[return-value]


def _transpose(build: Build, node: Node) -> T:
    return build.transpose(build.get(node.inputs[0]), _order(node, build.graph))


def _order_fits(node: Node, graph: Graph) -> str:
    order, shape = _order(node, graph), _shape(graph, node.inputs[0])
    if not isinstance(order, tuple) or sorted(order) != list(range(len(shape))):
        return "its perm is no order of its input's dimensions"
    if tuple(shape[each] for each in order) != _shape(graph, node.outputs[0]):
        return "its output's size does not fit"
    return ""


_declare("Transpose", _transpose, 1, _order_fits)


def build_node(build: Build, node: Node) -> T:
    """Add a node that was found to be supported. Raises NotSupported: it is not."""
    if node.op not in KERNELS or node.domain:
        raise NotSupported(f"{node} is not implemented")
    return KERNELS[node.op](build, node)
