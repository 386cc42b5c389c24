"""Networks of random weights for the HAL bench, as the HAL's own graphs; shapes are those of well-known models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ai_assistant.hal.graph import Array, Attribute, DType, Graph, Node, TensorSpec, Value

OPSET = 17
_SINCE = {
    "Add": 14, "Mul": 14, "Sub": 14, "Div": 14, "Relu": 14, "MatMul": 13, "Gemm": 13, "Conv": 11, "MaxPool": 12,
    "GlobalAveragePool": 1, "Flatten": 13, "Softmax": 13, "LayerNormalization": 17, "Erf": 13, "Reshape": 14,
    "Transpose": 13, "Gather": 13, "Tanh": 13, "Sigmoid": 13, "Concat": 13,
}  # fmt: skip


class Net:
    """Puts a graph together, one operator at a time; values are their indices."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.inputs: list[int] = []
        self._rng = np.random.default_rng(seed)

    def _value(self, spec: TensorSpec, data: Array | None = None) -> int:
        self.values.append(Value(f"v{len(self.values)}", spec, data))
        return len(self.values) - 1

    def input(self, *shape: int, dtype: DType = DType.F32) -> int:
        self.inputs.append(self._value(TensorSpec(dtype, shape)))
        return self.inputs[-1]

    def constant(self, data: Any, dtype: str = "float32") -> int:
        array = np.ascontiguousarray(np.array(data, dtype))
        return self._value(TensorSpec(DType.of(array.dtype), array.shape), array)

    def weight(self, *shape: int) -> int:
        """Scaled so that values neither grow nor vanish on their way."""
        inward = math.prod(shape[1:]) if len(shape) == 4 else shape[0]
        return self.constant(self._rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(inward)))

    def shape(self, value: int) -> tuple[int, ...]:
        spec = self.values[value].spec
        assert spec is not None
        return spec.sizes

    def op(self, op: str, *inputs: int, shape: tuple[int, ...] | None = None, **attributes: Attribute) -> int:
        """An operator; its output has the first input's shape unless told."""
        output = self._value(TensorSpec(DType.F32, self.shape(inputs[0]) if shape is None else shape))
        self.nodes.append(Node(op, _SINCE[op], inputs, (output,), attributes, name=f"n{len(self.nodes)}"))
        return output

    def matmul(self, left: int, right: int) -> int:
        return self.op("MatMul", left, right, shape=(*self.shape(left)[:-1], self.shape(right)[-1]))

    def linear(self, value: int, out: int) -> int:
        made = self.matmul(value, self.weight(self.shape(value)[-1], out))
        return self.op("Add", made, self.constant(np.zeros(out)))

    def norm(self, value: int) -> int:
        width = self.shape(value)[-1]
        scale, bias = self.constant(np.ones(width)), self.constant(np.zeros(width))
        return self.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=1e-12)

    def conv(self, value: int, out: int, kernel: int, stride: int = 1, *, relu: bool = True) -> int:
        batch, channels, height, width = self.shape(value)
        pad = kernel // 2
        made = self.op(
            "Conv", value, self.weight(out, channels, kernel, kernel), self.constant(np.zeros(out)),
            shape=(batch, out, *((size + 2 * pad - kernel) // stride + 1 for size in (height, width))),
            kernel_shape=(kernel, kernel), strides=(stride, stride), pads=(pad,) * 4, dilations=(1, 1), group=1,
        )  # fmt: skip
        return self.op("Relu", made) if relu else made

    def graph(self, *outputs: int) -> Graph:
        return Graph(
            tuple(self.values), tuple(self.nodes), tuple(self.inputs), outputs, {"": OPSET}, self.name
        )  # fmt: skip


def transformer(
    layers: int = 6, width: int = 384, heads: int = 12, hidden: int = 1536, length: int = 128, vocabulary: int = 30522
) -> Graph:
    """An encoder in the shape of all-MiniLM-L6-v2: token numbers in, hidden states out."""
    net = Net("minilm-shaped")
    tokens = net.input(1, length, dtype=DType.I64)
    state = net.op("Gather", net.weight(vocabulary, width), tokens, shape=(1, length, width), axis=0)
    state = net.norm(net.op("Add", state, net.weight(length, width)))
    size = width // heads
    split, join = net.constant([1, length, heads, size], "int64"), net.constant([1, length, width], "int64")

    def headed(value: int, perm: tuple[int, ...]) -> int:
        cut = net.op("Reshape", value, split, shape=(1, length, heads, size))
        return net.op("Transpose", cut, shape=tuple((1, length, heads, size)[axis] for axis in perm), perm=perm)

    for _ in range(layers):
        query, key, value = (headed(net.linear(state, width), perm) for perm in
                             ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)))  # fmt: skip
        scores = net.op("Div", net.matmul(query, key), net.constant(math.sqrt(size)))
        mixed = net.matmul(net.op("Softmax", scores, axis=-1), value)
        back = net.op("Transpose", mixed, shape=(1, length, heads, size), perm=(0, 2, 1, 3))
        joined = net.op("Reshape", back, join, shape=(1, length, width))
        state = net.norm(net.op("Add", net.linear(joined, width), state))
        inner = net.linear(state, hidden)
        erf = net.op("Erf", net.op("Div", inner, net.constant(math.sqrt(2))))
        gelu = net.op("Mul", net.op("Mul", inner, net.op("Add", erf, net.constant(1.0))), net.constant(0.5))
        state = net.norm(net.op("Add", net.linear(gelu, width), state))
    return net.graph(state)


def resnet(size: int = 224, blocks: tuple[int, ...] = (3, 4, 6, 3), base: int = 64) -> Graph:
    """A convolutional network in the shape of ResNet-50, its normalisations folded into the convolutions."""
    net = Net("resnet50-shaped")
    value = net.conv(net.input(1, 3, size, size), base, 7, 2)
    batch, channels, height, width = net.shape(value)
    value = net.op(
        "MaxPool", value, shape=(batch, channels, (height + 1) // 2, (width + 1) // 2),
        kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1),
    )  # fmt: skip
    for stage, count in enumerate(blocks):
        inner = base << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            made = net.conv(net.conv(net.conv(value, inner, 1), inner, 3, stride), 4 * inner, 1, relu=False)
            # Near the input of a block: otherwise values would double with each block.
            same = value if block else net.conv(value, 4 * inner, 1, stride, relu=False)
            value = net.op("Relu", net.op("Add", net.op("Mul", made, net.constant(0.3)), same))
    channels = net.shape(value)[1]
    pooled = net.op("GlobalAveragePool", value, shape=(1, channels, 1, 1))
    flat = net.op("Flatten", pooled, shape=(1, channels), axis=1)
    return net.graph(net.op("Gemm", flat, net.weight(channels, 1000), net.constant(np.zeros(1000)), shape=(1, 1000)))


def branches(count: int = 2, length: int = 8, width: int = 512, rows: int = 64) -> Graph:
    """Equal branches of matrix products that meet in a sum."""
    net = Net(f"{count} branches")
    value = net.op("Tanh", net.input(rows, width))
    ends = []
    for _ in range(count):
        end = value
        for _ in range(length):
            end = net.op("Tanh", net.matmul(end, net.weight(width, width)))
        ends.append(end)
    total = ends[0]
    for end in ends[1:]:
        total = net.op("Add", total, end)
    return net.graph(total)


def mlp(layers: int, width: int, rows: int = 32) -> Graph:
    net = Net(f"mlp {layers} × {width}")
    value = net.input(rows, width)
    for _ in range(layers):
        value = net.op("Relu", net.linear(value, width))
    return net.graph(value)


def elementwise(length: int, size: int) -> Graph:
    net = Net(f"{length} elementwise")
    value = net.input(size)
    for number in range(length):
        value = net.op(("Tanh", "Mul", "Sigmoid", "Add")[number % 4], value,
                       *([net.constant(0.5)] if number % 2 else []))  # fmt: skip
    return net.graph(value)


def inception(blocks: int, size: int = 28, channels: int = 64) -> Graph:
    """Blocks of four branches of convolutions that are put together again."""
    net = Net(f"{blocks} inception blocks")
    value = net.input(1, channels, size, size)
    quarter = channels // 4
    for _ in range(blocks):
        ends = [net.conv(value, quarter, kernel) for kernel in (1, 3, 5, 1)]
        value = net.op("Concat", *ends, shape=(1, channels, size, size), axis=1)
    return net.graph(value)


def ladder(nodes: int, size: int = 64) -> Graph:
    """So many nodes with connections near and far, as planners dislike; what nobody uses is an output."""
    net = Net(f"{nodes} nodes")
    values = [net.input(size, size), net.input(size, size)]
    unused = set(values)
    draw = np.random.default_rng(nodes)
    weight = net.weight(size, size)
    for number in range(nodes):
        near = values[-1 - int(draw.integers(min(8, len(values))))]
        far = values[int(draw.integers(len(values)))]
        unused.discard(near)
        if number % 3 == 0:
            values.append(net.matmul(near, weight))
        elif number % 3 == 1:
            values.append(net.op("Tanh", near))
        else:
            unused.discard(far)
            values.append(net.op("Add", near, far))
        unused.add(values[-1])
    return net.graph(*sorted(unused - set(net.inputs)))


SUITE: dict[str, Callable[[], Graph]] = {
    "minilm-shaped, 128 tokens": transformer,
    "minilm-shaped, 16 tokens": lambda: transformer(length=16),
    "transformer block": lambda: transformer(layers=1, vocabulary=1000),
    "resnet-50-shaped, 112": lambda: resnet(112),
    "small cnn": lambda: resnet(64, (1, 1, 1, 1), 16),
    "two branches": branches,
    "four branches, thin": lambda: branches(4, 4, 128, 8),
    "mlp": lambda: mlp(6, 1024),
    "elementwise": lambda: elementwise(24, 1 << 18),
    "inception": lambda: inception(3),
}
