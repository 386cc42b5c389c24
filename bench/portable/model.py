"""A classifier of pictures with random weights, in the shape of ViT-Tiny: a convolution, then an encoder.

Weights come from a seeded generator, so the file has the same bytes wherever the same libraries make it.
"""

from __future__ import annotations

import math
from typing import Any

from ai_assistant.hal.graph import Graph
from bench._hal_graphs import Net

CLASSES = 1000


def classifier(
    size: int = 224, patch: int = 16, layers: int = 12, width: int = 192, heads: int = 3, classes: int = CLASSES
) -> Graph:
    """(1, 3, size, size) floats in, (1, classes) scores out."""
    net = Net("vit-tiny-shaped", seed=5)
    side, depth = size // patch, width // heads
    tokens = side * side
    picture = net.input(1, 3, size, size)
    cut = net.op(
        "Conv", picture, net.weight(width, 3, patch, patch), net.constant([0.0] * width), shape=(1, width, side, side),
        kernel_shape=(patch, patch), strides=(patch, patch), pads=(0, 0, 0, 0), dilations=(1, 1), group=1,
    )  # fmt: skip
    rows = net.op("Reshape", cut, net.constant([1, width, tokens], "int64"), shape=(1, width, tokens))
    state = net.op("Transpose", rows, shape=(1, tokens, width), perm=(0, 2, 1))
    state = net.op("Add", state, net.weight(tokens, width))
    split = net.constant([1, tokens, heads, depth], "int64")
    join = net.constant([1, tokens, width], "int64")
    scale = net.constant(1 / math.sqrt(depth))

    def headed(value: int, perm: tuple[int, ...]) -> int:
        shape = (1, tokens, heads, depth)
        parts = net.op("Reshape", value, split, shape=shape)
        return net.op("Transpose", parts, shape=tuple(shape[axis] for axis in perm), perm=perm)

    for _ in range(layers):
        normal = net.norm(state)
        query, key, value = (
            headed(net.linear(normal, width), perm) for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
        )
        mixed = net.matmul(net.op("Softmax", net.op("Mul", net.matmul(query, key), scale), axis=-1), value)
        back = net.op("Transpose", mixed, shape=(1, tokens, heads, depth), perm=(0, 2, 1, 3))
        state = net.op("Add", net.linear(net.op("Reshape", back, join, shape=(1, tokens, width)), width), state)
        inner = net.linear(net.norm(state), 4 * width)
        erf = net.op("Erf", net.op("Mul", inner, net.constant(math.sqrt(0.5))))
        gelu = net.op("Mul", net.op("Mul", inner, net.op("Add", erf, net.constant(1.0))), net.constant(0.5))
        state = net.op("Add", net.linear(gelu, width), state)
    pooled = net.op("Transpose", net.norm(state), shape=(1, width, tokens), perm=(0, 2, 1))
    pooled = net.op("GlobalAveragePool", pooled, shape=(1, width, 1))
    flat = net.op("Reshape", pooled, net.constant([1, width], "int64"), shape=(1, width))
    return net.graph(
        net.op("Gemm", flat, net.weight(width, classes), net.constant([0.0] * classes), shape=(1, classes))
    )


def picture(size: int = 224) -> Any:
    """A pattern between -1 and 1 without any library's functions, so that nothing of it depends on the machine."""
    import numpy as np

    row, column = np.indices((size, size))
    planes = [(row * (3 + channel) + column * column * (channel + 1)) % 251 for channel in range(3)]
    return (np.stack(planes)[None] / 125.0 - 1.0).astype(np.float32)
