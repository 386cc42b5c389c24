"""What a backend compiles: operators in order, and the tensors between them.

A graph is plain data without protocol buffers, so that a backend needs no ONNX library; `ai_assistant.hal.onnx_graph`
makes it from an ONNX file and back. The C header has the same structures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidModel, NotSupported

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Attribute = int | float | str | bytes | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Array
"""What ONNX lets an operator be configured with. Graphs within operators (If, Loop) are not taken."""

MAX_ELEMENTS = 1 << 40
NO_VALUE = -1
"""In a node's inputs: an optional input that is left out; in its outputs: one that nobody wants."""


class DType(StrEnum):
    """Types of elements, by ONNX's short names."""

    F16 = "f16"
    BF16 = "bf16"
    F32 = "f32"
    F64 = "f64"
    I8 = "i8"
    I16 = "i16"
    I32 = "i32"
    I64 = "i64"
    U8 = "u8"
    U16 = "u16"
    U32 = "u32"
    U64 = "u64"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _ITEMSIZE[self]

    @property
    def numpy(self) -> np.dtype[Any]:
        """Raises NotSupported: NumPy has no such type (bfloat16)."""
        if self is DType.BF16:
            raise NotSupported("NumPy has no bfloat16", hint="copy the bytes, or convert to f32")
        name = {"f": "float", "i": "int", "u": "uint"}.get(self.value[0], "")
        return np.dtype("bool" if self is DType.BOOL else name + self.value[1:])

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> DType:
        """Raises NotSupported: no tensor has elements of that type."""
        try:
            return cls(_SHORT[dtype.name])
        except KeyError:
            raise NotSupported(f"tensors of {dtype.name[:40]} are not supported") from None


_ITEMSIZE = {each: 1 if each is DType.BOOL else int(each.value.lstrip("bfiu")) // 8 for each in DType}
_SHORT = {
    **{f"{kind}{bits}": f"{kind[0]}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"f{bits}" for bits in (16, 32, 64)},
    "bool": "bool",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The type and shape of a tensor: row-major, without gaps.

    Args:
        shape: sizes; None where it is known only when the program runs.
    """

    dtype: DType
    shape: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if any(size is not None and size < 0 for size in self.shape):
            raise InvalidModel(f"a tensor has a negative size: {self.shape}")
        if math.prod(size for size in self.shape if size is not None and size) > MAX_ELEMENTS:
            raise InvalidModel(f"a tensor has more than 2^40 elements: {self.shape}")

    @property
    def static(self) -> bool:
        return None not in self.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a static tensor.

        Raises:
            NotSupported: a size is not known.
        """
        sizes = tuple(size for size in self.shape if size is not None)
        if len(sizes) != len(self.shape):
            raise NotSupported(f"the shape {self} is not fixed", hint="give every input a fixed shape")
        return sizes

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of a graph. With data it is a constant.

    Args:
        spec: None where the type cannot be told before the graph runs.
    """

    name: str
    spec: TensorSpec | None
    data: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operator: ONNX's domain ("" for the standard one), name, and the version that its meaning is of.

    Args:
        version: the operator set in which this meaning came in (`since_version`): Softmax of 11 is not that of 13.
        inputs, outputs: indices of the graph's values; NO_VALUE where an optional one is left out.
    """

    op: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.op}-{self.version}"


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in an order in which they can run.

    Args:
        inputs, outputs: indices of values, in the order in which a program is given its tensors.
        opsets: version of each domain's operator set.

    Raises:
        InvalidModel: an index points nowhere, a value is made twice or used before it is made.
    """

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    opsets: Mapping[str, int] = field(default_factory=lambda: {"": 17})
    name: str = "graph"

    def __post_init__(self) -> None:
        known = {index for index, value in enumerate(self.values) if value.data is not None}
        for index in self.inputs:
            if not 0 <= index < len(self.values) or index in known:
                raise InvalidModel(f"input {index} of the graph is a constant, given twice, or no value")
            known.add(index)
        for node in self.nodes:
            for index in node.inputs:
                if index != NO_VALUE and index not in known:
                    raise InvalidModel(f"{node} {node.name[:60]!r} uses a value before it is made")
            for index in node.outputs:
                if index == NO_VALUE:
                    continue
                if not 0 <= index < len(self.values) or index in known:
                    raise InvalidModel(f"{node} {node.name[:60]!r} makes a value that exists, or none")
                known.add(index)
        if any(index not in known for index in self.outputs) or not self.outputs:
            raise InvalidModel("the graph has an output that nothing makes, or none at all")

    @cached_property
    def producers(self) -> Mapping[int, int]:
        """Value → the node that makes it."""
        return {index: number for number, node in enumerate(self.nodes) for index in node.outputs if index != NO_VALUE}

    @cached_property
    def consumers(self) -> Mapping[int, tuple[int, ...]]:
        """Value → the nodes that use it."""
        found: dict[int, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for index in {each for each in node.inputs if each != NO_VALUE}:
                found.setdefault(index, []).append(number)
        return {index: tuple(numbers) for index, numbers in found.items()}

    def spec(self, index: int) -> TensorSpec:
        """Raises NotSupported: the type of that value is not known."""
        value = self.values[index]
        if value.spec is None:
            raise NotSupported(f"the type of {value.name[:60]!r} is not known before the graph runs")
        return value.spec

    def input_values(self, node: Node) -> Iterator[Value | None]:
        for index in node.inputs:
            yield None if index == NO_VALUE else self.values[index]

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.spec(index) for index in self.inputs)

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.spec(index) for index in self.outputs)

    def part(self, numbers: tuple[int, ...], name: str = "") -> tuple[Graph, tuple[int, ...], tuple[int, ...]]:
        """The graph of some nodes alone.

        Returns the graph, and which of this graph's values are its inputs and its outputs.
        """
        chosen = sorted(set(numbers))
        made = {index for number in chosen for index in self.nodes[number].outputs if index != NO_VALUE}
        used = dict.fromkeys(
            index for number in chosen for index in self.nodes[number].inputs if index != NO_VALUE and index not in made
        )
        inputs = tuple(index for index in used if self.values[index].data is None)
        inside = set(chosen)
        wanted = set(self.outputs)
        outputs = tuple(
            index
            for number in chosen
            for index in self.nodes[number].outputs
            if index != NO_VALUE
            and (index in wanted or any(each not in inside for each in self.consumers.get(index, ())))
        )
        order = [*used, *sorted(made)]
        place = {index: number for number, index in enumerate(order)} | {NO_VALUE: NO_VALUE}
        nodes = tuple(
            Node(
                node.op,
                node.version,
                tuple(place[index] for index in node.inputs),
                tuple(place[index] for index in node.outputs),
                node.attributes,
                node.domain,
                node.name,
            )
            for node in (self.nodes[number] for number in chosen)
        )
        graph = Graph(
            tuple(self.values[index] for index in order),
            nodes,
            tuple(place[index] for index in inputs),
            tuple(place[index] for index in outputs),
            self.opsets,
            name or self.name,
        )
        return graph, inputs, outputs
