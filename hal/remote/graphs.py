"""A graph as bytes for the other process, and back: constants are used where they lie, without a copy."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidModel, NotSupported
from ai_assistant.hal.graph import Array, Attribute, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.remote import wire

_ALIGNMENT = 64
_HEADER = 16


def pack(graph: Graph) -> list[bytes | Array]:
    """Pieces that make the graph when they stand one after the other.

    Raises:
        NotSupported: a constant is of a type that has no name here.
    """
    data = _Data()
    head = {
        "name": graph.name,
        "opsets": dict(graph.opsets),
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "values": [
            [each.name, each.spec and wire.of_spec(each.spec), None if each.data is None else data.add(each.data)]
            for each in graph.values
        ],
        "nodes": [
            [
                each.op, each.version, each.inputs, each.outputs, each.domain, each.name,
                {name: _attribute(value, data) for name, value in each.attributes.items()},
            ]
            for each in graph.nodes
        ],
    }  # fmt: skip
    text = json.dumps(head, separators=(",", ":")).encode()
    start = -(-(_HEADER + len(text)) // _ALIGNMENT) * _ALIGNMENT
    header = len(text).to_bytes(8, "little") + start.to_bytes(8, "little")
    return [header, text, bytes(start - _HEADER - len(text)), *data.pieces]


def unpack(memory: Array) -> Graph:
    """The graph that `pack` wrote.

    Raises:
        InvalidModel: the bytes are damaged.
    """
    try:
        header = memory[:_HEADER].tobytes()
        size, start = int.from_bytes(header[:8], "little"), int.from_bytes(header[8:], "little")
        head = json.loads(memory[_HEADER : _HEADER + size].tobytes())
        rest = memory[start:]
        return Graph(
            tuple(
                Value(name, None if spec is None else wire.spec(spec), None if place is None else _array(place, rest))
                for name, spec, place in head["values"]
            ),
            tuple(
                Node(
                    op, version, tuple(inputs), tuple(outputs),
                    {key: _value(value, rest) for key, value in attributes.items()}, domain, name,
                )
                for op, version, inputs, outputs, domain, name, attributes in head["nodes"]
            ),
            tuple(head["inputs"]),
            tuple(head["outputs"]),
            head["opsets"],
            head["name"],
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, wire.Garbage) as error:
        raise InvalidModel("the graph is damaged") from error


class _Data:
    """Constants, each at a multiple of 64 bytes."""

    def __init__(self) -> None:
        self.pieces: list[bytes | Array] = []
        self._end = 0

    def add(self, array: Array) -> list[object]:
        array = np.asarray(array, order="C")  # ascontiguousarray would make a number a list of one
        place = [wire.of_spec(TensorSpec(DType.of(array.dtype), array.shape)), self._end]
        self.pieces.append(array.reshape(-1).view(np.uint8))
        gap = -array.nbytes % _ALIGNMENT
        self.pieces.append(bytes(gap))
        self._end += array.nbytes + gap
        return list(place)


def _array(place: list[Any], rest: Array) -> Array:
    spec = wire.spec(place[0])
    offset = wire.integer(place[1])
    part = rest[offset : offset + spec.nbytes]
    array = part.view(spec.dtype.numpy).reshape(spec.sizes)
    array.flags.writeable = False
    return array


def _attribute(value: Attribute, data: _Data) -> list[object]:
    """[kind, value]: JSON alone tells neither 1 from 1.0 nor text from bytes."""
    if isinstance(value, np.ndarray):
        return ["array", data.add(value)]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, str):
        return ["one", value]
    if isinstance(value, tuple):
        return ["many", list(value)]
    if isinstance(value, int | float):
        return ["one", value]
    raise NotSupported(f"attributes of type {type(value).__name__} cannot be sent to another process")


def _value(pair: list[Any], rest: Array) -> Attribute:
    kind, value = pair
    if kind == "array":
        return _array(value, rest)
    if kind == "bytes":
        return base64.b64decode(value)
    return tuple(value) if kind == "many" else value
