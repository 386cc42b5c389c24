"""Graphs as the structures of the C header."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import addressof
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidModel, NotSupported
from ai_assistant.hal.graph import Array, Attribute, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.native import abi
from ai_assistant.hal.native.abi import AttributeType

MAX_NODES = 1 << 24


class NativeGraph:
    """A graph in C's memory, for as long as this object is there. The bytes of constants are not copied.

    Raises:
        NotSupported: something does not fit C's types: a rank over 32, a zero in a name, an integer of over 64 bits.
        InvalidModel: a constant is not what its spec says.
    """

    def __init__(self, graph: Graph) -> None:
        self._kept: list[Any] = []
        if len(graph.nodes) > MAX_NODES or len(graph.values) > MAX_NODES:
            raise NotSupported("the graph has more than 2^24 nodes or values")
        opsets = (abi.Opset * len(graph.opsets))(
            *(abi.Opset(self._text(name), _integer(version)) for name, version in graph.opsets.items())
        )
        self.struct = abi.filled(
            abi.Graph,
            name=self._text(graph.name),
            values=self._pointers([self._value(value) for value in graph.values]),
            nodes=self._pointers([self._node(node) for node in graph.nodes]),
            inputs=self._array(ctypes.c_int32, graph.inputs),
            outputs=self._array(ctypes.c_int32, graph.outputs),
            opsets=self._keep(opsets),
            value_count=len(graph.values),
            node_count=len(graph.nodes),
            input_count=len(graph.inputs),
            output_count=len(graph.outputs),
            opset_count=len(graph.opsets),
        )

    @property
    def address(self) -> int:
        return addressof(self.struct)

    def _keep(self, thing: Any) -> int:
        self._kept.append(thing)
        return addressof(thing)

    def _array(self, kind: Any, numbers: Sequence[Any]) -> int | None:
        return self._keep((kind * len(numbers))(*numbers)) if numbers else None

    def _pointers(self, structures: list[Any]) -> int | None:
        return self._array(ctypes.c_void_p, [self._keep(each) for each in structures])

    def _text(self, name: str) -> bytes:
        raw = name.encode("utf-8", "replace")
        if b"\0" in raw or len(raw) >= abi.MAX_STRING:
            raise NotSupported(f"the name {name[:40]!r} holds a zero or is longer than {abi.MAX_STRING - 1} bytes")
        return raw

    def _spec(self, spec: TensorSpec | None) -> Any:
        if spec is None:
            return abi.Spec()
        if len(spec.shape) > abi.MAX_RANK:
            raise NotSupported(f"a tensor has {len(spec.shape)} dimensions, {abi.MAX_RANK} are possible")
        dims = [abi.UNKNOWN_SIZE if size is None else size for size in spec.shape]
        return abi.Spec(abi.DTYPES[spec.dtype], len(dims), self._array(ctypes.c_int64, dims))

    def _value(self, value: Value) -> Any:
        if value.data is None:
            return abi.filled(abi.Value, name=self._text(value.name), spec=self._spec(value.spec))
        return self._constant(value.name, value.spec, value.data)

    def _constant(self, name: str, spec: TensorSpec | None, data: Array) -> Any:
        data = np.ascontiguousarray(data).reshape(data.shape)  # the first makes one dimension of none
        own = spec
        if spec is None or spec.dtype is not DType.BF16:
            own = TensorSpec(DType.of(data.dtype), data.shape)
            if spec is not None and (spec.dtype != own.dtype or spec.shape != own.shape):
                raise InvalidModel(f"the constant {name[:60]!r} is {own}, and said to be {spec}")
        assert own is not None
        if own.nbytes != data.nbytes:
            raise InvalidModel(f"the constant {name[:60]!r} has {data.nbytes} bytes, {own} has {own.nbytes}")
        self._kept.append(data)
        return abi.filled(
            abi.Value, name=self._text(name), spec=self._spec(own), data=data.ctypes.data, nbytes=data.nbytes
        )

    def _node(self, node: Node) -> Any:
        return abi.filled(
            abi.Node,
            domain=self._text(node.domain),
            op=self._text(node.op),
            version=_integer(node.version),
            name=self._text(node.name),
            input_count=len(node.inputs),
            output_count=len(node.outputs),
            inputs=self._array(ctypes.c_int32, node.inputs),
            outputs=self._array(ctypes.c_int32, node.outputs),
            attribute_count=len(node.attributes),
            attributes=self._pointers([self._attribute(name, value) for name, value in node.attributes.items()]),
        )

    def _attribute(self, name: str, value: Attribute) -> Any:
        if isinstance(value, np.ndarray):
            tensor = self._keep(self._constant(name, None, value))
            return self._filled(name, AttributeType.TENSOR, 1, tensor=tensor)
        several = isinstance(value, (tuple, list))
        items: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
        # What an empty list is of cannot be told; a list of integers is what ONNX's operators have.
        if all(isinstance(each, (int, np.integer)) for each in items):
            ints = self._array(ctypes.c_int64, [_integer(each) for each in items])
            return self._filled(
                name, AttributeType.INTS if several else AttributeType.INT, len(items), ints=ints or self._nothing()
            )
        if all(isinstance(each, (int, float, np.number)) for each in items):
            floats = self._array(ctypes.c_double, [float(each) for each in items])
            return self._filled(
                name, AttributeType.FLOATS if several else AttributeType.FLOAT, len(items), floats=floats
            )
        if all(isinstance(each, (str, bytes)) for each in items):
            strings = self._array(abi.Bytes, [self._bytes(each) for each in items])
            return self._filled(
                name, AttributeType.STRINGS if several else AttributeType.STRING, len(items), strings=strings
            )
        raise NotSupported(f"the attribute {name[:60]!r} is no number, text, tensor or list of one kind")

    def _filled(self, name: str, kind: AttributeType, count: int, **pointer: int | None) -> Any:
        return abi.filled(abi.Attribute, type=kind, name=self._text(name), count=count, **pointer)

    def _nothing(self) -> int:
        return self._keep(ctypes.c_int64())

    def _bytes(self, item: str | bytes) -> Any:
        raw = item.encode("utf-8", "replace") if isinstance(item, str) else bytes(item)
        return abi.Bytes(self._keep(ctypes.create_string_buffer(raw, len(raw) + 1)), len(raw))


def _integer(number: Any) -> int:
    if not -(1 << 63) <= int(number) < 1 << 63:
        raise NotSupported(f"{str(number)[:40]} does not fit 64 bits")
    return int(number)
