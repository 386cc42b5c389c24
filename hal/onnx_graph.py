"""ONNX files as graphs, and graphs as ONNX files.

A file comes from a stranger. It is parsed by the ONNX library, so it is bounded first; what it refers to outside of
itself is refused, never opened. Shapes are inferred by the same library; what it cannot tell stays unknown.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ai_assistant.errors import InvalidArgument, InvalidModel, NotSupported, OutOfMemory
from ai_assistant.hal.graph import NO_VALUE, Array, Attribute, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.onnx_inference import STANDARD, infer
from ai_assistant.hal.operators import NEWEST_OPSET

MAX_BYTES = (1 << 31) - 1
"""What protocol buffers can hold."""
MAX_NODES = 100_000
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_CONSTANT_BYTES = 1 << 34

_DTYPES = {
    1: DType.F32, 2: DType.U8, 3: DType.I8, 4: DType.U16, 5: DType.I16, 6: DType.I32, 7: DType.I64, 9: DType.BOOL,
    10: DType.F16, 11: DType.F64, 12: DType.U32, 13: DType.U64, 16: DType.BF16,
}  # fmt: skip
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


def read(data: bytes | Any, shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
    """The graph of an ONNX model.

    Args:
        data: the file's bytes, or an `onnx.ModelProto`.
        shapes: sizes of inputs that the model leaves open, by name.

    Raises:
        InvalidModel: truncated, no ONNX, or it contradicts itself.
        NotSupported: sound, and of a kind that is not run here; says what.
        InvalidArgument: `shapes` does not fit the model.
        OutOfMemory: its constants would take more than 16 GiB.
    """
    import onnx

    model = _parsed(data) if isinstance(data, bytes | bytearray | memoryview) else data
    opsets = _opsets(model)
    graph = model.graph
    _bounded(model)
    known = {each.name for each in (*graph.input, *graph.initializer)}
    nodes = _in_order(graph.node, known)
    given = _fixed(model, shapes or {})
    if any(mine is not theirs for mine, theirs in zip(nodes, graph.node, strict=True)):
        # The library infers in the order of the file.
        sorted_model = onnx.ModelProto()
        sorted_model.CopyFrom(given)
        del sorted_model.graph.node[:]
        sorted_model.graph.node.extend(nodes)
        given = sorted_model
    inferred = infer(given)
    specs: dict[str, TensorSpec] = {}
    for info in (*inferred.value_info, *inferred.output, *inferred.input):
        spec = _spec(info)
        if spec is not None:
            specs[info.name] = spec
    return _Reader(graph, nodes, opsets, specs).graph()


def write(graph: Graph) -> bytes:
    """The graph as an ONNX model. Its inputs are named i0, i1, …, its outputs o0, o1, …

    Raises:
        NotSupported: the type of an input or output is not known, or no operator set has all of its operators in the
            versions that they are of.
    """
    from onnx import helper, numpy_helper

    opsets = _covering(graph)
    names = [f"v{index}" for index in range(len(graph.values))]
    for number, index in enumerate(graph.inputs):
        names[index] = f"i{number}"
    copies = []
    for number, index in enumerate(graph.outputs):
        if index in graph.producers and names[index].startswith("v"):
            names[index] = f"o{number}"
        else:  # asked for twice, or an input or a constant: a copy gives each a name of its own
            copies.append((number, index))
    nodes = []
    for number, node in enumerate(graph.nodes):
        made_of = ["" if index == NO_VALUE else names[index] for index in node.inputs]
        makes = ["" if index == NO_VALUE else names[index] for index in node.outputs]
        proto = helper.make_node(node.op, made_of, makes, name=f"n{number}", domain=node.domain)
        for key, value in sorted(node.attributes.items()):
            plain = numpy_helper.from_array(value) if isinstance(value, np.ndarray) else _plain(value)
            # Nothing tells what an empty list is a list of; only lists of integers may be empty in ONNX's operators.
            proto.attribute.append(helper.make_attribute(key, plain, attr_type=7 if plain == [] else None))
        nodes.append(proto)
    for number, index in copies:
        nodes.append(helper.make_node("Identity", [names[index]], [f"o{number}"], name=f"out{number}"))
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [_info(f"i{number}", graph.spec(index)) for number, index in enumerate(graph.inputs)],
            [_info(f"o{number}", graph.spec(index)) for number, index in enumerate(graph.outputs)],
            [_tensor(value, names[index]) for index, value in enumerate(graph.values) if value.data is not None],
        ),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        ir_version=10,
    )
    if made.ByteSize() > MAX_BYTES:
        raise NotSupported("the graph is larger than the 2 GB that an ONNX file can hold")
    content: bytes = made.SerializeToString(deterministic=True)
    return content


def _covering(graph: Graph) -> dict[str, int]:
    """Operator sets in which every node of ONNX's own means what its version says: the graph's, or others."""
    opsets = {"": 17} | dict(graph.opsets)
    newest = 0
    for node in graph.nodes:
        if node.domain:
            opsets[node.domain] = max(opsets.get(node.domain, 1), node.version)
            continue
        if node.version > NEWEST_OPSET:
            raise NotSupported(f"{node} is newer than what is known: versions up to {NEWEST_OPSET} are")
        newest = max(newest, node.version)
    for standard in (max(opsets[""], newest), newest):
        other = next(
            (node for node in graph.nodes if not node.domain and _since(node.op, standard) > node.version), None
        )
        if other is None:
            return opsets | {"": max(1, standard)}
    assert other is not None
    raise NotSupported(
        f"{other} means something else in operator set {newest}, which another operator of the graph is of: "
        f"there it is of version {_since(other.op, newest)}"
    )


@lru_cache(4096)  # names come from files
def _since(op: str, opset: int) -> int:
    """The version of an operator that is meant in an operator set; 0 where it has none of that name."""
    from onnx import defs

    try:
        return int(defs.get_schema(op, opset).since_version)
    except defs.SchemaError:
        return 0


def output_specs(graph: Graph, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What the outputs of a graph are when its inputs have these sizes.

    Raises:
        InvalidArgument: they do not fit the graph.
        NotSupported: the sizes depend on values.
    """
    shapes = {f"i{number}": spec.sizes for number, spec in enumerate(inputs)}
    found = read(write(graph), shapes).output_specs
    for number, spec in enumerate(found):
        if not spec.static:
            raise NotSupported(f"the size of output {number} depends on values: {spec}")
    return found


def _parsed(data: bytes | bytearray | memoryview) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    if len(data) > MAX_BYTES:
        raise NotSupported("the file is larger than 2 GB", hint="ONNX files beyond that keep their weights outside")
    try:
        model = onnx.load_model_from_string(bytes(data))
    except (DecodeError, ValueError, RuntimeError, MemoryError) as error:
        raise InvalidModel("the file is no ONNX model, or it is truncated") from error
    if not model.HasField("graph") or not model.graph.output:
        raise InvalidModel("the file is no ONNX model, or it is truncated: it has no graph with an output")
    return model


def _opsets(model: Any) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain in STANDARD else entry.domain
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise InvalidModel(f"the model names two versions of the operators of {domain or 'ONNX'!r}")
    if not opsets.get(""):
        opsets[""] = 1
    if not 1 <= opsets[""] <= NEWEST_OPSET:
        raise NotSupported(f"the model uses operators of version {opsets['']}; up to {NEWEST_OPSET} works")
    return opsets


def _bounded(model: Any) -> None:
    graph = model.graph
    names = (text for node in graph.node for text in (node.op_type, node.domain, node.name, *node.input, *node.output))
    others = (each.name for each in (*graph.input, *graph.output, *graph.value_info, *graph.initializer))
    # The library gives bytes where a text is no UTF-8.
    if not all(isinstance(text, str) for text in (*names, *others)):
        raise InvalidModel("the model has a name that is not UTF-8")
    if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_TENSORS:
        raise NotSupported(f"the graph has {len(graph.node)} operators, and up to {MAX_NODES} are taken")
    if model.functions:
        raise NotSupported("the model has functions of its own", hint="export it with inlined functions")
    if graph.sparse_initializer:
        raise NotSupported("the model has sparse weights")
    total = 0
    for tensor in graph.initializer:
        total += _checked(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type in (5, 10):
                raise NotSupported(f"the operator {node.op_type[:60]!r} contains a graph: control flow is not run here")
            if attribute.type in (11, 12, 13, 14):
                raise NotSupported(f"the operator {node.op_type[:60]!r} has a sparse tensor or a type as attribute")
            if attribute.ref_attr_name:
                raise InvalidModel(f"the operator {node.op_type[:60]!r} refers to an attribute of no function")
            # Whatever kind it says it is: a tensor that nobody looked at could name a file.
            if attribute.type == 4 or attribute.HasField("t"):
                total += _checked(attribute.t)
    if total > MAX_CONSTANT_BYTES:
        raise OutOfMemory(f"the model's constants take {total} bytes")


def _checked(tensor: Any) -> int:
    """Bytes of a constant. Raises what `read` does."""
    if tensor.data_location == 1 or tensor.external_data:
        raise NotSupported(
            f"the constant {tensor.name[:60]!r} lies in another file", hint="store the model in one file"
        )
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        raise NotSupported(f"the constant {tensor.name[:60]!r} is of type {tensor.data_type}, which is not run here")
    if len(tensor.dims) > MAX_RANK or any(size < 0 for size in tensor.dims):
        raise InvalidModel(f"the constant {tensor.name[:60]!r} has an impossible shape")
    count = TensorSpec(dtype, tuple(tensor.dims)).nbytes
    if tensor.HasField("raw_data") and len(tensor.raw_data) != count:
        raise InvalidModel(f"the constant {tensor.name[:60]!r} has {len(tensor.raw_data)} bytes instead of {count}")
    return count


def _fixed(model: Any, shapes: Mapping[str, Sequence[int]]) -> Any:
    """The model with the sizes that its inputs are given."""
    if not shapes:
        return model
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    constants = {tensor.name for tensor in changed.graph.initializer}
    inputs = {info.name: info for info in changed.graph.input if info.name not in constants}
    for name, sizes in shapes.items():
        if name not in inputs:
            raise InvalidArgument(
                f"the model has no input {name[:60]!r}", hint=f"its inputs: {', '.join(inputs)[:200]}", param="shapes"
            )
        dims = inputs[name].type.tensor_type.shape.dim
        if len(dims) != len(sizes) or any(size < 0 for size in sizes):
            raise InvalidArgument(f"the input {name[:60]!r} has {len(dims)} sizes", param="shapes")
        for dim, size in zip(dims, sizes, strict=True):
            if dim.HasField("dim_value") and dim.dim_value != size:
                raise InvalidArgument(f"the input {name[:60]!r} has {dim.dim_value} where {size} was given")
            dim.dim_value = size
    # What was written down for the open sizes would contradict the fixed ones.
    del changed.graph.value_info[:]
    for info in changed.graph.output:
        info.type.tensor_type.ClearField("shape")
    return changed


def _spec(info: Any) -> TensorSpec | None:
    if not info.type.HasField("tensor_type"):
        return None
    kind = info.type.tensor_type
    dtype = _DTYPES.get(kind.elem_type)
    if dtype is None or not kind.HasField("shape"):
        return None
    if len(kind.shape.dim) > MAX_RANK:
        raise NotSupported(f"{info.name[:60]!r} has {len(kind.shape.dim)} dimensions; up to {MAX_RANK} are taken")
    return TensorSpec(dtype, tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim))


class _Reader:
    """One pass over the nodes of a model."""

    def __init__(
        self, graph: Any, nodes: Sequence[Any], opsets: Mapping[str, int], specs: Mapping[str, TensorSpec]
    ) -> None:
        self._proto = graph
        self._nodes = nodes
        self._opsets = opsets
        self._specs = specs
        self._values: list[Value] = []
        self._places: dict[str, int] = {}

    def graph(self) -> Graph:
        constants = {tensor.name: tensor for tensor in self._proto.initializer}
        if len(constants) != len(self._proto.initializer) or "" in constants:
            raise InvalidModel("two constants have one name, or one has none")
        for name, tensor in constants.items():
            self._constant(name, _array(tensor))
        inputs = [self._new(info.name) for info in self._proto.input if info.name not in constants]
        for index in inputs:
            if self._values[index].spec is None:
                raise NotSupported(f"the input {self._values[index].name[:60]!r} is no tensor of a known type")
        nodes = []
        for proto in self._nodes:
            if proto.op_type == "Constant" and proto.domain in STANDARD:
                self._constant(proto.output[0], _constant_of(proto))
            else:
                nodes.append(self._node(proto))
        outputs = []
        for info in self._proto.output:
            if info.name not in self._places:
                raise InvalidModel(f"nothing makes the output {info.name[:60]!r}")
            outputs.append(self._places[info.name])
        return Graph(
            tuple(self._values), tuple(nodes), tuple(inputs), tuple(outputs), dict(self._opsets), self._proto.name[:200]
        )

    def _new(self, name: str, data: Array | None = None) -> int:
        if not name or name in self._places:
            raise InvalidModel(f"two values are named {name[:60]!r}" if name else "a value has no name")
        spec = self._specs.get(name) if data is None else TensorSpec(DType.of(data.dtype), data.shape)
        self._places[name] = len(self._values)
        self._values.append(Value(name[:200], spec, data))
        return self._places[name]

    def _constant(self, name: str, data: Array) -> None:
        self._new(name, data)

    def _node(self, proto: Any) -> Node:
        domain = "" if proto.domain in STANDARD else proto.domain
        inputs = tuple(NO_VALUE if name == "" else self._places[name] for name in proto.input)
        outputs = tuple(NO_VALUE if name == "" else self._new(name) for name in proto.output)
        if all(index == NO_VALUE for index in outputs):
            raise InvalidModel(f"the operator {proto.op_type[:60]!r} makes nothing")
        return Node(
            proto.op_type,
            _version(proto.op_type, domain, self._opsets),
            inputs,
            outputs,
            {each.name: _attribute(each) for each in proto.attribute},
            domain,
            proto.name[:200],
        )


def _in_order(nodes: Iterable[Any], known: Collection[str]) -> list[Any]:
    """The nodes so that each comes after those it needs: files need not be sorted, though they should.

    Raises:
        InvalidModel: a cycle, or an input that nothing makes.
    """
    nodes = list(nodes)
    makers = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    waiting = [{makers[name] for name in node.input if name and name not in known and name in makers} for node in nodes]
    for number, node in enumerate(nodes):
        missing = [name for name in node.input if name and name not in known and name not in makers]
        if missing:
            raise InvalidModel(f"nothing makes {missing[0][:60]!r}, which the operator {node.op_type[:60]!r} uses")
        waiting[number].discard(-1)
    users: dict[int, list[int]] = {}
    for number, needs in enumerate(waiting):
        for need in needs:
            users.setdefault(need, []).append(number)
    left = [len(needs) for needs in waiting]
    ready = [number for number, count in enumerate(left) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        number = heapq.heappop(ready)
        order.append(nodes[number])
        for user in users.get(number, ()):
            left[user] -= 1
            if not left[user]:
                heapq.heappush(ready, user)
    if len(order) != len(nodes):
        stuck = next(nodes[number] for number, count in enumerate(left) if count)
        raise InvalidModel(f"the graph has a cycle: the operator {stuck.op_type[:60]!r} needs what it makes")
    return order


def _version(op: str, domain: str, opsets: Mapping[str, int]) -> int:
    """The version in which the operator's meaning came in.

    Raises:
        NotSupported: there is no such operator.
    """
    import onnx.defs

    if domain not in opsets:
        raise InvalidModel(f"the model uses the operators of {domain[:60]!r} and does not say in which version")
    if domain:
        return opsets[domain]
    try:
        return int(onnx.defs.get_schema(op, opsets[domain], domain).since_version)
    except onnx.defs.SchemaError:
        raise NotSupported(f"ONNX has no operator {op[:60]!r} in version {opsets[domain]}") from None


def _array(tensor: Any) -> Array:
    from onnx import numpy_helper

    if tensor.data_type == 16:
        raise NotSupported(
            f"the constant {tensor.name[:60]!r} is bfloat16", hint="export the model in float16 or float32"
        )
    try:
        found: Array = np.ascontiguousarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidModel(f"the constant {tensor.name[:60]!r} is damaged: {_short(error)}") from error
    # A constant of one number loses its empty shape on the way through ascontiguousarray.
    found = found.reshape(tuple(tensor.dims))
    found.flags.writeable = False
    return found


def _constant_of(proto: Any) -> Array:
    if len(proto.attribute) != 1 or len(proto.output) != 1:
        raise InvalidModel("a Constant has one attribute and one output")
    attribute = proto.attribute[0]
    name = attribute.name
    kinds: dict[str, tuple[str, int, type[Any]]] = {
        "value": ("t", 4, np.float32),
        "value_float": ("f", 1, np.float32),
        "value_floats": ("floats", 6, np.float32),
        "value_int": ("i", 2, np.int64),
        "value_ints": ("ints", 7, np.int64),
    }
    if name not in kinds:
        raise NotSupported(f"a Constant of kind {name[:40]!r} is not run here")
    field, kind, dtype = kinds[name]
    if attribute.type != kind:
        raise InvalidModel(f"a Constant's {name} is of another kind than that")
    if name == "value":
        return _array(attribute.t)
    return np.array(getattr(attribute, field), dtype)


def _attribute(proto: Any) -> Attribute:
    kind = proto.type
    if kind == 1:
        return float(proto.f)
    if kind == 2:
        return int(proto.i)
    if kind == 3:
        return _text(proto.s)
    if kind == 4:
        return _array(proto.t)
    if kind == 6:
        return tuple(float(each) for each in proto.floats)
    if kind == 7:
        return tuple(int(each) for each in proto.ints)
    if kind == 8:
        return tuple(_text(each) for each in proto.strings)
    raise NotSupported(f"the attribute {proto.name[:60]!r} is of a kind that is not run here")


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidModel("an attribute is text, and not UTF-8") from None


def _plain(value: Attribute) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _info(name: str, spec: TensorSpec) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, _NUMBERS[spec.dtype], spec.shape)


def _tensor(value: Value, name: str) -> Any:
    from onnx import numpy_helper

    assert value.data is not None
    return numpy_helper.from_array(value.data, name)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
