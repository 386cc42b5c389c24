"""The cpu backend: ONNX's own cases for every operator, open sizes, kept programs, values that ask for too much."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import AIAssistantError, InvalidArgument, InvalidModel, NotSupported, OutOfMemory
from ai_assistant.hal.backends.cpu import BACKEND, CpuContext
from ai_assistant.hal.backends.cpu_kernels import OPERATORS
from ai_assistant.hal.backends.cpu_kernels.erf import erf
from ai_assistant.hal.contract import Tensor
from ai_assistant.hal.graph import Array, DType, Graph, Node, TensorSpec, Value

_TOLERANCE = {"float16": 2e-3, "float32": 1e-4, "float64": 1e-7}


@pytest.fixture
def device() -> Iterator[CpuContext]:
    with BACKEND().open() as device:
        yield device


def _run(device: CpuContext, graph: Graph, *inputs: Array, outputs: list[Tensor] | None = None) -> list[Array]:
    program = device.compile(graph)
    given = [device.allocator.upload(each) for each in inputs]
    if outputs is None:
        outputs = [device.allocator.tensor(spec) for spec in program.output_specs([each.spec for each in given])]
    device.queue().submit(program, given, outputs).wait(60)
    return [device.allocator.download(each) for each in outputs]


def _one(op: str, version: int, result: TensorSpec, *inputs: Array, constants: int = 0, **attributes: Any) -> Graph:
    """A graph of one operator; the last `constants` inputs are constants."""
    values = [
        Value(f"x{n}", TensorSpec(DType.of(each.dtype), each.shape), each if n >= len(inputs) - constants else None)
        for n, each in enumerate(inputs)
    ]
    node = Node(op, version, tuple(range(len(inputs))), (len(inputs),), attributes)
    return Graph((*values, Value("y", result)), (node,), tuple(range(len(inputs) - constants)), (len(inputs),))


def test_there_are_many_operators() -> None:
    assert len(OPERATORS) >= 110


@pytest.mark.engine
def test_every_case_that_onnx_ships_for_its_operators(device: CpuContext) -> None:
    from ai_assistant.hal import onnx_graph
    from ai_assistant.hal.conformance import reference

    reference.load()  # which the cases import
    from onnx.backend.test.case.node import collect_testcases

    passed, operators = 0, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        try:
            graph = onnx_graph.read(case.model)
        except NotSupported:
            continue
        if not all(device.supports(node, graph) for node in graph.nodes):
            continue
        program = device.compile(graph)
        for inputs, outputs in case.data_sets:
            if not all(isinstance(each, np.ndarray | np.generic) for each in (*inputs, *outputs)):
                continue
            given = [device.allocator.upload(np.asarray(each)) for each in inputs]
            made = [device.allocator.upload(np.zeros_like(each)) for each in outputs]
            program.run(given, made)
            for place, wanted in zip(made, outputs, strict=True):
                close = _TOLERANCE.get(str(wanted.dtype), 0)
                np.testing.assert_allclose(place.numpy(), wanted, rtol=close, atol=close, err_msg=case.name)
            passed += 1
            operators |= {node.op for node in graph.nodes}
    assert passed >= 700
    assert len(operators) >= 110


def test_the_error_function_to_the_last_places() -> None:
    points = np.concatenate([np.linspace(-7, 7, 4001), np.geomspace(1e-300, 1, 200), [0.0, -0.0, np.inf, -np.inf]])
    wanted = np.array([math.erf(each) for each in points])
    np.testing.assert_allclose(erf(points), wanted, rtol=4e-15, atol=0)
    assert np.isnan(erf(np.array([np.nan])))[0]
    assert erf(np.array([1.0], np.float32)).dtype == np.float32


def test_whole_numbers_are_divided_towards_zero_and_never_trap(device: CpuContext) -> None:
    a = np.array([7, -7, 7, -7, 5, np.iinfo(np.int32).min], np.int32)
    b = np.array([2, 2, -2, -2, 0, 1], np.int32)
    (found,) = _run(device, _one("Div", 14, TensorSpec(DType.I32, (6,)), a, b), a, b)
    assert found.tolist() == [3, -3, -3, 3, 0, np.iinfo(np.int32).min]


@pytest.mark.engine
def test_sizes_that_are_known_when_it_runs(device: CpuContext) -> None:
    open_size = TensorSpec(DType.F32, (None, 3))
    graph = Graph((Value("x", open_size), Value("y", open_size)), (Node("Relu", 14, (0,), (1,)),), (0,), (1,))
    for rows in (1, 5, 0):
        x = np.full((rows, 3), -1.0, np.float32)
        assert _run(device, graph, x)[0].shape == (rows, 3)


_MUCH = np.array([1 << 50], np.int64)
_ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("op", "version", "inputs", "attributes", "error"),
    [
        ("Expand", 13, (_ONE, _MUCH), {}, OutOfMemory),
        ("Tile", 13, (_ONE, _MUCH), {}, OutOfMemory),
        ("ConstantOfShape", 9, (_MUCH,), {}, OutOfMemory),
        ("Pad", 13, (_ONE, np.array([1 << 50, 0], np.int64)), {}, OutOfMemory),
        ("Range", 11, (np.float32(0), np.float32(1e30), np.float32(1)), {}, (OutOfMemory, InvalidArgument)),
        ("Range", 11, (np.float32(0), np.float32(1), np.float32(0)), {}, InvalidArgument),
        ("Reshape", 13, (_ONE, _MUCH), {}, InvalidArgument),
        ("ConstantOfShape", 9, (np.array([-1], np.int64),), {}, InvalidArgument),
        ("Gather", 13, (_ONE, np.array([5], np.int64)), {}, InvalidArgument),
        ("Gather", 13, (_ONE, np.array([-2], np.int64)), {}, InvalidArgument),
        ("GatherElements", 13, (_ONE, np.array([9], np.int64)), {}, InvalidArgument),
        ("ScatterND", 16, (_ONE, np.array([[9]], np.int64), _ONE), {}, InvalidArgument),
        ("Slice", 13, (_ONE, *(np.array([each], np.int64) for each in (0, 1, 0, 0))), {}, InvalidArgument),
        ("Slice", 13, (_ONE, *(np.array([each], np.int64) for each in (0, 1, 7, 1))), {}, InvalidArgument),
        ("Squeeze", 13, (np.ones((2, 3), np.float32), np.array([0], np.int64)), {}, InvalidArgument),
        ("TopK", 11, (_ONE, np.array([9], np.int64)), {}, InvalidArgument),
        ("Split", 13, (_ONE, np.array([2, -1], np.int64)), {}, InvalidArgument),
        ("OneHot", 11, (np.array([1]), np.array(1 << 50), np.array([0, 1], np.float32)), {}, OutOfMemory),
        ("Conv", 11, (np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1, 9, 9), np.float32)), {}, InvalidArgument),
        ("Conv", 11, (np.ones((1, 3, 2, 2), np.float32), np.ones((1, 1, 1, 1), np.float32)), {}, InvalidArgument),
        (
            "MaxPool",
            12,
            (np.ones((1, 1, 4, 4), np.float32),),
            {"kernel_shape": (1, 1), "pads": (1 << 50, 0, 0, 0)},
            OutOfMemory,
        ),
        ("Concat", 13, (_ONE,), {"axis": 4}, InvalidArgument),
    ],
)
def test_values_that_ask_for_the_impossible(
    device: CpuContext, op: str, version: int, inputs: tuple[Any, ...], attributes: dict[str, Any],
    error: type[AIAssistantError] | tuple[type[AIAssistantError], ...],
) -> None:  # fmt: skip
    arrays = [np.asarray(each) for each in inputs]
    graph = _one(op, version, TensorSpec(DType.F32, (1,)), *arrays, **attributes)
    queue = device.queue()
    given = [device.allocator.upload(each) for each in arrays]
    queue.submit(device.compile(graph), given, [device.allocator.tensor(TensorSpec(DType.F32, (1,)))])
    with pytest.raises(error):
        queue.synchronize(60)
    # The next one works.
    relu = _one("Relu", 14, TensorSpec(DType.F32, (1,)), _ONE)
    assert _run(device, relu, _ONE)[0].tolist() == [1]


def test_an_output_of_another_size_than_promised_is_an_error(device: CpuContext) -> None:
    graph = _one("NonZero", 13, TensorSpec(DType.I64, (1, None)), np.array([1, 0, 1], np.float32))
    place = device.allocator.tensor(TensorSpec(DType.I64, (1, 3)))
    queue = device.queue()
    x = device.allocator.upload(np.array([1, 0, 1], np.float32))
    queue.submit(device.compile(graph), [x], [place])
    with pytest.raises(InvalidArgument, match=r"i64\[1, 2\]"):
        queue.synchronize(60)


@pytest.mark.engine
def test_a_program_is_kept_and_a_damaged_one_refused(device: CpuContext) -> None:
    x = np.array([[1, -2]], np.float32)
    graph = _one("Softmax", 13, TensorSpec(DType.F32, (1, 2)), x, axis=-1)
    blob = device.compile(graph).blob()
    again = device.load(blob)
    assert (again.inputs, again.outputs) == (graph.input_specs, graph.output_specs)
    for damaged in (blob[:-1], blob + b"x", blob[:60] + b"\0" + blob[61:]):
        with pytest.raises(InvalidModel):
            device.load(damaged)
    for other in (b"", b"ai-assistant cpu 2\n" + bytes(99), b"\x7fELF"):
        with pytest.raises(NotSupported):
            device.load(other)


def test_what_is_not_implemented_says_why(device: CpuContext) -> None:
    x = np.ones((1, 1, 4, 4), np.float32)
    pool = _one("MaxPool", 12, TensorSpec(DType.F32, (1, 1, 2, 2)), x, kernel_shape=(2, 2), ceil_mode=1)
    with pytest.raises(NotSupported, match="ceil_mode is not implemented"):
        device.compile(pool)
    with pytest.raises(NotSupported, match="Resize-19 is not implemented"):
        device.compile(_one("Resize", 19, TensorSpec(DType.F32, (1,)), _ONE))
    values = (Value("x", TensorSpec(DType.BF16, (1,))), Value("y", TensorSpec(DType.BF16, (1,))))
    half = Graph(values, (Node("Relu", 14, (0,), (1,)),), (0,), (1,))
    with pytest.raises(NotSupported, match="not implemented for bf16"):
        device.compile(half)
    with pytest.raises(NotSupported, match="no device"):
        BACKEND().open("gpu7")


@pytest.mark.parametrize("wrong", ["text", 1.5, (1, 2), ("a",)])
def test_attributes_of_another_kind_are_a_named_error(device: CpuContext, wrong: Any) -> None:
    x = np.ones((1, 1, 4, 4), np.float32)
    graph = _one("Softmax", 13, TensorSpec(DType.F32, x.shape), x, axis=wrong)
    with pytest.raises(InvalidModel, match="attribute axis of Softmax-13"):
        _run(device, graph, x)
    # Already by what looks at it before it is compiled.
    with pytest.raises(InvalidModel, match="attribute ceil_mode"):
        device.compile(_one("MaxPool", 12, TensorSpec(DType.F32, x.shape), x, kernel_shape=(1, 1), ceil_mode=wrong))


def test_whole_numbers_are_raised_exactly_and_around_the_end(device: CpuContext) -> None:
    base, power = np.array([3, -3, 3, 2], np.int64), np.array([39, 39, 41, 64], np.int64)
    (found,) = _run(device, _one("Pow", 15, TensorSpec(DType.I64, (4,)), base, power), base, power)
    wanted = [(number**by + 2**63) % 2**64 - 2**63 for number, by in zip([3, -3, 3, 2], [39, 39, 41, 64], strict=True)]
    assert found.tolist() == wanted


def test_what_a_layer_normalization_says_of_mean_and_deviation_is_float32(device: CpuContext) -> None:
    x, ones = np.arange(8, dtype=np.float64).reshape(2, 4), np.ones(4)
    small = TensorSpec(DType.F32, (2, 1))
    specs = (TensorSpec(DType.F64, (2, 4)), TensorSpec(DType.F64, (4,)), TensorSpec(DType.F64, (2, 4)), small, small)
    node = Node("LayerNormalization", 17, (0, 1), (2, 3, 4))
    graph = Graph(tuple(Value(f"v{n}", spec) for n, spec in enumerate(specs)), (node,), (0, 1), (2, 3, 4))
    _, mean, inverse = _run(device, graph, x, ones)
    np.testing.assert_allclose(mean.ravel(), [1.5, 5.5])
    np.testing.assert_allclose(inverse.ravel(), 1 / np.sqrt(1.25 + 1e-5), rtol=1e-6)
