"""Whole networks for L4, as ONNX models with seeded weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ai_assistant.hal.conformance.weights import HEADS, HIDDEN, INNER, LAYERS, Weights, minilm
from ai_assistant.hal.graph import Array

OPSET = 17
"""What the exporters of the frameworks write most: no Gelu yet, so that it stands there as Erf."""


@dataclass(frozen=True, slots=True)
class Network:
    """A model, inputs for it, and what its weights are."""

    model: onnx.ModelProto
    inputs: tuple[Array, ...]
    about: str


class Builder:
    """Writes nodes one after the other; each method gives the name of what it makes."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, name: str, array: Array) -> str:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self._inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        return name

    def constant(self, array: Any, kind: Any = np.float32) -> str:
        self._count += 1
        name = f"w{self._count}"
        self._constants.append(numpy_helper.from_array(np.asarray(array, kind), name))
        return name

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        self._count += 1
        name = f"v{self._count}"
        self._nodes.append(helper.make_node(op, inputs, [name], f"n{self._count}", **attributes))
        return name

    def shape(self, *sizes: int) -> str:
        return self.constant(sizes, np.int64)

    def model(self, output: str, shape: tuple[int, ...]) -> onnx.ModelProto:
        made = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self._nodes, "network", self._inputs, [made], self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _dense(b: Builder, x: str, weights: Weights, name: str, rows: int, columns: int) -> str:
    """Args: weights: of shape (columns, rows), as frameworks keep them."""
    product = b("MatMul", x, b.constant(weights(f"{name}.weight", (columns, rows)).T.copy()))
    return b("Add", product, b.constant(weights(f"{name}.bias", (columns,))))


def _norm(b: Builder, x: str, weights: Weights, name: str, hidden: int) -> str:
    scale, bias = (b.constant(weights(f"{name}.{part}", (hidden,))) for part in ("weight", "bias"))
    return b("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)


def _gelu(b: Builder, x: str) -> str:
    half = b("Mul", x, b.constant(0.5))
    return b("Mul", half, b("Add", b("Erf", b("Div", x, b.constant(math.sqrt(2)))), b.constant(1.0)))


def _block(b: Builder, x: str, mask: str, weights: Weights, name: str, sizes: tuple[int, int, int, int, int]) -> str:
    """One layer as BERT has it. Args: sizes: batch, tokens, hidden, heads, inner."""
    batch, tokens, hidden, heads, inner = sizes

    def split(part: str, order: tuple[int, ...]) -> str:
        made = _dense(b, x, weights, f"{name}.attention.self.{part}", hidden, hidden)
        return b("Transpose", b("Reshape", made, b.shape(batch, tokens, heads, hidden // heads)), perm=order)

    query, key, value = split("query", (0, 2, 1, 3)), split("key", (0, 2, 3, 1)), split("value", (0, 2, 1, 3))
    scores = b("Div", b("MatMul", query, key), b.constant(math.sqrt(hidden // heads)))
    mixed = b("MatMul", b("Softmax", b("Add", scores, mask), axis=-1), value)
    joined = b("Reshape", b("Transpose", mixed, perm=(0, 2, 1, 3)), b.shape(batch, tokens, hidden))
    output = _dense(b, joined, weights, f"{name}.attention.output.dense", hidden, hidden)
    x = _norm(b, b("Add", output, x), weights, f"{name}.attention.output.LayerNorm", hidden)
    middle = _gelu(b, _dense(b, x, weights, f"{name}.intermediate.dense", hidden, inner))
    output = _dense(b, middle, weights, f"{name}.output.dense", inner, hidden)
    return _norm(b, b("Add", output, x), weights, f"{name}.output.LayerNorm", hidden)


def transformer(random: np.random.Generator) -> Network:
    """One transformer block of random weights: batch 2, 12 tokens, 64 features, 4 heads."""
    sizes = (2, 12, 64, 4, 128)

    def weights(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith("LayerNorm.weight"):
            return np.ones(shape, np.float32)
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    x = random.standard_normal((2, 12, 64), np.float32)
    mask = np.where(np.arange(12) < np.array([[12], [7]]), 0, -1e4).astype(np.float32)[:, None, None, :]
    b = Builder()
    output = _block(b, b.input("x", x), b.input("mask", mask), weights, "layer", sizes)
    return Network(b.model(output, (2, 12, 64)), (x, mask), "random weights")


def cnn(random: np.random.Generator) -> Network:
    """A small convolutional network with a residual connection: 32 x 32 pixels, 10 classes."""

    def weights(*shape: int) -> str:
        return b.constant(random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:])))

    def norm(x: str, channels: int) -> str:
        spans = ((0.5, 1.5), (-0.1, 0.1), (-0.1, 0.1), (0.5, 1.5))
        return b("BatchNormalization", x, *(b.constant(random.uniform(*span, channels)) for span in spans))

    image = random.standard_normal((2, 3, 32, 32), np.float32)
    b = Builder()
    three: dict[str, Any] = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}
    x = b.input("image", image)
    x = b("Relu", norm(b("Conv", x, weights(16, 3, 3, 3), **three), 16))
    x = b("MaxPool", x, kernel_shape=(2, 2), strides=(2, 2))
    inner = b("Relu", norm(b("Conv", x, weights(16, 16, 3, 3), **three), 16))
    inner = norm(b("Conv", inner, weights(16, 16, 3, 3), **three), 16)
    x = b("Relu", b("Add", inner, x))
    x = b("Relu", b("Conv", x, weights(32, 16, 3, 3), b.constant(np.zeros(32)), strides=(2, 2), **three))
    x = b("Relu", b("Conv", x, weights(32, 1, 3, 3), group=32, **three))
    x = b("Flatten", b("GlobalAveragePool", x), axis=1)
    x = b("Softmax", b("Gemm", x, weights(10, 32), b.constant(np.zeros(10)), transB=1), axis=-1)
    return Network(b.model(x, (2, 10)), (image,), "random weights")


def mini_lm(random: np.random.Generator) -> Network:
    """all-MiniLM-L6-v2: two texts of 16 tokens, one of them padded, to two unit vectors."""
    weights, vocabulary, about = minilm(random)
    batch, tokens = 2, 16
    ids = random.integers(1000, vocabulary, (batch, tokens)).astype(np.int64)
    lengths = np.array([[16], [9]])
    kept = (np.arange(tokens) < lengths).astype(np.float32)
    b = Builder()
    token, mask = b.input("ids", ids), b.input("kept", kept)
    words = b.constant(weights("embeddings.word_embeddings.weight", (vocabulary, HIDDEN)))
    places = weights("embeddings.position_embeddings.weight", (512, HIDDEN))[:tokens]
    kinds = weights("embeddings.token_type_embeddings.weight", (2, HIDDEN))[0]
    x = b("Add", b("Gather", words, token, axis=0), b.constant(places + kinds))
    x = _norm(b, x, weights, "embeddings.LayerNorm", HIDDEN)
    wide = b("Reshape", mask, b.shape(batch, 1, 1, tokens))
    hidden = b("Mul", b("Sub", b.constant(1.0), wide), b.constant(-1e4))
    for layer in range(LAYERS):
        x = _block(b, x, hidden, weights, f"encoder.layer.{layer}", (batch, tokens, HIDDEN, HEADS, INNER))
    column = b("Unsqueeze", mask, b.shape(2))
    total = b("ReduceSum", b("Mul", x, column), b.shape(1), keepdims=0)
    mean = b("Div", total, b("ReduceSum", mask, b.shape(1), keepdims=1))
    length = b("Sqrt", b("ReduceSum", b("Mul", mean, mean), b.shape(1), keepdims=1))
    return Network(b.model(b("Div", mean, length), (batch, HIDDEN)), (ids, kept), about)
