"""ONNX files as graphs: what is sound comes through and back, what is hostile is refused with its reason."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import AIAssistantError, InvalidArgument, InvalidModel, NotSupported
from ai_assistant.hal.graph import NO_VALUE, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.onnx_graph import output_specs, read, write

pytestmark = pytest.mark.engine
onnx = pytest.importorskip("onnx")
if True:
    from onnx import TensorProto, helper, numpy_helper


def _model(nodes: list[Any], *, shape: tuple[Any, ...] = (2, 3), opset: int = 17, extra: tuple[Any, ...] = ()) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(extra),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _product(*constants: Any) -> Any:
    return _model([helper.make_node("MatMul", ["x", "w"], ["y"])], extra=constants)


_W = numpy_helper.from_array(np.ones((3, 4), np.float32), "w")
_RELU = helper.make_node("Relu", ["x"], ["y"])


def test_a_graph_with_constants_types_and_versions() -> None:
    model = _model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Constant", [], ["c"], value_float=2.0),
            helper.make_node("Mul", ["a", "c"], ["b"]),
            helper.make_node("Clip", ["b", "", "c"], ["d"]),
            helper.make_node("Softmax", ["d"], ["y"], axis=-1),
        ],
        extra=(_W,),
    )
    graph = read(model.SerializeToString())
    assert [str(node) for node in graph.nodes] == ["MatMul-13", "Mul-14", "Clip-13", "Softmax-13"]
    assert graph.nodes[2].inputs[1] == NO_VALUE
    assert graph.nodes[3].attributes == {"axis": -1}
    assert graph.output_specs == (TensorSpec(DType.F32, (2, 4)),)
    assert [value.name for value in graph.values if value.data is not None] == ["w", "c"]
    again = read(write(graph))
    assert [str(node) for node in again.nodes] == [str(node) for node in graph.nodes]
    assert again.output_specs == graph.output_specs
    assert write(read(write(graph)))


def test_outputs_that_are_inputs_or_asked_for_twice_are_copied() -> None:
    value = TensorSpec(DType.F32, (2,))
    values = tuple(Value(name, value) for name in "xyz")
    nodes = (Node("Relu", 14, (0,), (1,)), Node("Exp", 13, (1,), (2,)))
    again = read(write(Graph(values, nodes, (0,), (1, 2, 1, 0))))
    assert [node.op for node in again.nodes] == ["Relu", "Exp", "Identity", "Identity"]
    assert [again.values[index].name for index in again.outputs] == ["o0", "o1", "o2", "o3"]


def _one(op: str, version: int, opset: int = 17) -> Graph:
    value = TensorSpec(DType.F32, (2,))
    node = Node(op, version, (0,), (1,))
    return Graph((Value("x", value), Value("y", value)), (node,), (0,), (1,), {"": opset})


def test_what_is_written_means_the_same() -> None:
    assert str(read(write(_one("Gelu", 20))).nodes[0]) == "Gelu-20"  # by a newer operator set than the graph's
    assert str(read(write(_one("Softmax", 11, 12))).nodes[0]) == "Softmax-11"
    assert str(read(write(_one("Softmax", 11))).nodes[0]) == "Softmax-11"  # by an older one
    assert str(read(write(_one("Relu", 6))).nodes[0]) == "Relu-6"
    mixed = _one("Softmax", 11)
    mixed = Graph((*mixed.values, mixed.values[0]), (*mixed.nodes, Node("Gelu", 20, (1,), (2,))), (0,), (2,))
    with pytest.raises(NotSupported, match="Softmax-11 means something else in operator set 20"):
        write(mixed)
    with pytest.raises(NotSupported, match="Relu-99 is newer than what is known"):
        write(_one("Relu", 99))
    with pytest.raises(NotSupported, match="newer than what is known"):
        write(_one("Relu", 2**40))


def test_nodes_in_any_order_and_sizes_given_later() -> None:
    model = _model([helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Exp", ["x"], ["a"])], shape=("n", 3))
    graph = read(model)
    assert [node.op for node in graph.nodes] == ["Exp", "Relu"]
    assert graph.input_specs == (TensorSpec(DType.F32, (None, 3)),)
    assert read(model, {"x": (5, 3)}).output_specs == (TensorSpec(DType.F32, (5, 3)),)
    assert output_specs(graph, [TensorSpec(DType.F32, (7, 3))]) == (TensorSpec(DType.F32, (7, 3)),)
    for wrong in ({"z": (1, 1)}, {"x": (5,)}, {"x": (5, 4)}, {"x": (-1, 3)}):
        with pytest.raises(InvalidArgument):
            read(model, wrong)


def _outside() -> Any:
    tensor = TensorProto(name="w", data_type=1, dims=[3, 4], data_location=1)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return tensor


def _raw(**fields: Any) -> Any:
    return TensorProto(name="w", **{"data_type": 1, "dims": [3, 4], "raw_data": bytes(48), **fields})


_INNER = helper.make_graph([], "inner", [], [])


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (_model([helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
                 helper.make_node("Add", ["x", "a"], ["y"])]), InvalidModel, "cycle"),
        (_model([helper.make_node("Relu", ["y"], ["y"])]), InvalidModel, "cycle"),
        (_model([helper.make_node("Relu", ["nowhere"], ["y"])]), InvalidModel, "nothing makes 'nowhere'"),
        (_model([helper.make_node("Relu", ["x"], ["z"])]), InvalidModel, "nothing makes the output"),
        (_model([_RELU, _RELU]), InvalidModel, "two values are named 'y'"),
        (_model([helper.make_node("Relu", ["x"], ["x"]), _RELU]), InvalidModel, "cycle|two values"),
        (_model([helper.make_node("NoSuchThing", ["x"], ["y"])]), NotSupported, "no operator 'NoSuchThing'"),
        (_model([helper.make_node("Gelu", ["x"], ["y"])], opset=17), NotSupported, "no operator 'Gelu' in version 17"),
        (_model([helper.make_node("Thing", ["x"], ["y"], domain="acme")]), InvalidModel, "acme"),
        (_product(_outside()), NotSupported, "another file"),
        (_product(_raw(raw_data=bytes(47))),
         InvalidModel, "47 bytes instead of 48"),
        (_product(_raw(dims=[-1, 4])), InvalidModel, "impossible"),
        (_product(_raw(dims=[1 << 40, 1 << 40])),
         InvalidModel, "2\\^40"),
        (_product(_raw(data_type=8)), NotSupported, "type 8"),
        (_product(_raw(data_type=999)), NotSupported, "type 999"),
        (_product(_W, _W), InvalidModel, "two constants"),
        (_model([helper.make_node("If", ["x"], ["y"], then_branch=_INNER, else_branch=_INNER)]), NotSupported,
         "control flow"),
        (_model([_RELU], opset=999), NotSupported, "version 999"),
        (_model([_RELU], opset=-3), NotSupported, "version -3"),
        (_model([_RELU], shape=(1,) * 12), NotSupported, "12 dimensions"),
        (_model([_RELU], shape=(-5, 3)), InvalidModel, "negative"),
    ],
)  # fmt: skip
def test_what_is_refused(model: Any, error: type[AIAssistantError], says: str) -> None:
    with pytest.raises(error, match=says):
        read(model.SerializeToString())


def test_a_contradiction_of_types_is_refused() -> None:
    wrong = numpy_helper.from_array(np.ones((5, 4), np.float32), "w")
    graph = read(_product(wrong))
    assert graph.values[graph.outputs[0]].spec is None


def test_truncated_and_changed_files_never_do_worse_than_a_named_error(tmp_path: Path) -> None:
    whole = _model(
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Softmax", ["a"], ["y"])], extra=(_W,)
    ).SerializeToString()
    rng = random.Random(5)
    read(whole)
    for size in [0, *(rng.randrange(len(whole)) for _ in range(60))]:
        with pytest.raises((InvalidModel, NotSupported)):
            read(whole[:size])
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with contextlib.suppress(AIAssistantError):
            read(bytes(changed))
    for data in (b"\xff" * 100, b"GGUF" + bytes(100), rng.randbytes(4096)):
        with pytest.raises((InvalidModel, NotSupported)):
            read(data)


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
def test_no_other_file_is_read_whatever_kind_an_attribute_says_it_is(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.bin").write_bytes(bytes(48))
    node = helper.make_node("Constant", [], ["y"])
    attribute = node.attribute.add(name="value", type=kind)
    attribute.t.CopyFrom(_outside())
    attribute.t.external_data[0].value = "beside.bin"
    with pytest.raises(NotSupported, match="another file"):
        read(_model([node]).SerializeToString())


def test_a_constant_whose_value_is_of_another_kind() -> None:
    node = helper.make_node("Constant", [], ["y"], value_int=3)
    node.attribute[0].name = "value_float"
    with pytest.raises(InvalidModel):
        read(_model([node]).SerializeToString())


@pytest.mark.parametrize("equation", ["ijkl", "ijk->i", "...ijk->...i", "ij,jk", ""])
def test_equations_that_the_library_would_crash_on_or_cannot_mean(equation: str) -> None:
    node = helper.make_node("Einsum", ["x", "x"] if equation == "" else ["x"], ["y"], equation=equation)
    with pytest.raises(InvalidModel):
        read(_model([node]).SerializeToString())
    # Also where the operand's dimensions are found only by inference.
    later = helper.make_node("Einsum", ["a", "a"] if equation == "" else ["a"], ["y"], equation=equation)
    with pytest.raises(InvalidModel):
        read(_model([helper.make_node("Einsum", ["x"], ["a"], equation="ij->ji"), later]).SerializeToString())


def test_equations_that_fit_have_known_sizes() -> None:
    nodes = [
        helper.make_node("Einsum", ["x"], ["a"], equation="ij->ji"),
        helper.make_node("Einsum", ["a", "x"], ["y"], equation="ij,jk->ik"),
    ]
    assert read(_model(nodes)).output_specs == (TensorSpec(DType.F32, (3, 3)),)
