"""Softmax and the ways to bring a tensor to mean 0 and variance 1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.backends.cpu_kernels.common import FLOATS, axis_of, given, integer, real, widened
from ai_assistant.hal.graph import NO_VALUE, Array, Graph, Node
from ai_assistant.hal.operators import Kernel, OperatorRegistry


def _softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - np.max(x, axis=axis, keepdims=True, initial=-np.inf))
    return np.asarray(powers / np.sum(powers, axis=axis, keepdims=True))


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True)))


def _over_axis(function: Any) -> Kernel:
    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        axis = axis_of(integer(node, "axis", -1), inputs[0].ndim)
        return (np.asarray(widened(function)(inputs[0], axis)),)

    return run


def _over_the_rest(function: Any) -> Kernel:
    """Until version 12: everything from the axis on is one dimension."""

    def run(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
        x = inputs[0]
        axis = axis_of(integer(node, "axis", 1), x.ndim)
        flat = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
        return (np.asarray(widened(function)(flat, 1)).reshape(x.shape),)

    return run


def _layer(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, scale, bias = inputs[0], inputs[1], given(inputs, 2)
    axis = axis_of(integer(node, "axis", -1), x.ndim)
    over = tuple(range(axis, x.ndim))
    wide = x.astype(np.float32) if x.dtype == np.float16 else x
    mean = wide.mean(axis=over, keepdims=True)
    centred = wide - mean
    variance = np.mean(centred * centred, axis=over, keepdims=True)
    inverse = 1 / np.sqrt(variance + wide.dtype.type(real(node, "epsilon", 1e-5)))
    found = centred * inverse * scale.astype(wide.dtype)
    if bias is not None:
        found = found + bias.astype(wide.dtype)
    # Mean and deviation are float32 whatever the input is (stash_type).
    stash = (mean.astype(np.float32), inverse.astype(np.float32))
    return (np.asarray(found.astype(x.dtype)), *stash)[: len(node.outputs)]


def _batch(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    x, *given_ = inputs
    if x.ndim < 2:
        raise InvalidArgument(f"{node} needs channels, the input has the shape {x.shape}")
    wide = x.astype(np.float32) if x.dtype == np.float16 else x
    shape = (1, -1, *(1,) * (x.ndim - 2))
    scale, bias, mean, variance = (each.astype(wide.dtype).reshape(shape) for each in given_[:4])
    factor = scale / np.sqrt(variance + wide.dtype.type(real(node, "epsilon", 1e-5)))
    return (np.asarray(((wide - mean) * factor + bias).astype(x.dtype)),)


def _by_groups(x: Array, groups: int, epsilon: float) -> Array:
    parts = x.reshape(x.shape[0], groups, -1)
    centred = parts - parts.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return np.asarray((centred / np.sqrt(variance + x.dtype.type(epsilon))).reshape(x.shape))


def _instance(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    return (_scaled_groups(node, inputs, inputs[0].shape[1]),)


def _group(node: Node, inputs: list[Any]) -> tuple[Array, ...]:
    groups = integer(node, "num_groups", 1)
    if groups < 1 or inputs[0].shape[1] % groups:
        raise InvalidArgument(f"{inputs[0].shape[1]} channels cannot be {groups} groups")
    return (_scaled_groups(node, inputs, groups),)


def _scaled_groups(node: Node, inputs: list[Any], groups: int) -> Array:
    x, scale, bias = inputs
    wide = x.astype(np.float32) if x.dtype == np.float16 else x
    shape = (1, -1, *(1,) * (x.ndim - 2))
    normal = _by_groups(wide, groups, real(node, "epsilon", 1e-5))
    found = normal * scale.astype(wide.dtype).reshape(shape) + bias.astype(wide.dtype).reshape(shape)
    return np.asarray(found.astype(x.dtype))


def _batch_check(node: Node, graph: Graph) -> str:
    if integer(node, "training_mode", 0) or len(node.outputs) > 1:
        return "training is not implemented"
    return ""


def _dropout_check(node: Node, graph: Graph) -> str:
    if any(index != NO_VALUE for index in node.outputs[1:]):
        return "the mask is not implemented"
    training = node.inputs[2] if len(node.inputs) > 2 else NO_VALUE
    if training != NO_VALUE:
        data = graph.values[training].data
        if data is None or bool(np.any(data)):
            return "training is not implemented"
    return ""


def register(operators: OperatorRegistry) -> None:
    for name, function in (("Softmax", _softmax), ("LogSoftmax", _log_softmax)):
        operators.register(name, FLOATS, until=12, kernel=_over_the_rest(function))
        operators.register(name, FLOATS, since=13, kernel=_over_axis(function))
    operators.register("LayerNormalization", FLOATS, since=17, kernel=_layer)
    operators.register("BatchNormalization", FLOATS, since=9, check=_batch_check, kernel=_batch)
    operators.register("InstanceNormalization", FLOATS, since=6, kernel=_instance)
    operators.register("GroupNormalization", FLOATS, since=21, kernel=_group)
    operators.register("Dropout", FLOATS, since=7, check=_dropout_check, kernel=lambda node, x: (np.array(x[0]),))
