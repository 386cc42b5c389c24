"""Everything that the C example declares is right: shapes, types and attributes in sweeps against onnx.reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import BackendFailed, InvalidArgument
from ai_assistant.hal.graph import Array, Graph, Node, TensorSpec, Value
from ai_assistant.hal.graph import DType as D
from ai_assistant.hal.native import NativeBackend
from tests.hal.native import build

pytestmark = pytest.mark.engine


def _spec(array: Array) -> TensorSpec:
    return TensorSpec(D.of(array.dtype), array.shape)


def _reference(op: str, opset: int, inputs: list[Array | None], attributes: dict[str, Any]) -> Array:
    import onnx
    from onnx import helper

    from ai_assistant.hal.conformance import reference

    names = ["" if each is None else f"x{number}" for number, each in enumerate(inputs)]
    node = helper.make_node(op, names, ["y"], **attributes)
    ends = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape)
        for name, each in zip(names, inputs, strict=True)
        if each is not None
    ]
    graph = helper.make_graph([node], "one", ends, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    feeds = {name: each for name, each in zip(names, inputs, strict=True) if each is not None}
    made: Array = np.asarray(reference.load()(model).run(None, feeds)[0])
    return made


def _version(op: str, opset: int) -> int:
    from onnx import defs

    return int(defs.get_schema(op, opset).since_version)


def _graph(op: str, version: int, inputs: list[Array | None], made: Array, attributes: dict[str, Any]) -> Graph:
    given = [each for each in inputs if each is not None]
    places = iter(range(len(given)))
    indices = tuple(-1 if each is None else next(places) for each in inputs)
    values = (*(Value(f"x{n}", _spec(each)) for n, each in enumerate(given)), Value("y", _spec(made)))
    last = len(given)
    return Graph(values, (Node(op, version, indices, (last,), attributes),), tuple(range(last)), (last,))


def check(backend: NativeBackend, op: str, inputs: list[Array | None], *, opset: int = 21, **attributes: Any) -> None:
    # The reference fails on elements of none where it computes one by one; there is nothing to compute.
    nothing = op in ("Erf", "Gelu") and inputs[0] is not None and not inputs[0].size
    wanted = inputs[0] if nothing and inputs[0] is not None else _reference(op, opset, inputs, attributes)
    if op == "Gather" and inputs[0] is not None and inputs[1] is not None and not inputs[1].size:
        wanted = np.take(inputs[0], inputs[1], attributes["axis"])  # the reference forgets the other dimensions
    graph = _graph(op, _version(op, opset), inputs, wanted, attributes)
    with backend.open() as device:
        support = device.supports(graph.nodes[0], graph)
        assert support, (support.reason, [getattr(each, "shape", None) for each in inputs], attributes, wanted.shape)
        program = device.compile(graph)
        given = [device.allocator.upload(each) for each in inputs if each is not None]
        made = device.allocator.tensor(program.outputs[0])
        device.queue().submit(program, given, [made]).wait(60)
        np.testing.assert_allclose(
            device.allocator.download(made), wanted, rtol=2e-4, atol=2e-5, err_msg=f"{op} {attributes}"
        )


RANDOM = np.random.default_rng(5)


def f32(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def _broadcastable() -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    yield from [((), ()), ((3,), ()), ((0,), (1,)), ((2, 0, 3), (1, 1)), ((1,), (1, 1, 1)), ((4, 1), (1, 5))]
    for _ in range(30):
        full = [int(size) for size in RANDOM.choice([1, 2, 3, 7, 8, 9, 17], int(RANDOM.integers(0, 6)))]
        pair = []
        for _ in range(2):
            cut = full[int(RANDOM.integers(0, len(full) + 1)) :]
            pair.append(tuple(1 if RANDOM.random() < 0.3 else size for size in cut))
        yield pair[0], pair[1]


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_pairs_are_broadcast(example: NativeBackend, op: str) -> None:
    for opset in (7, 13, 21):
        for one, other in _broadcastable():
            check(example, op, [f32(*one), f32(*other)], opset=opset)


SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (7,), (2, 3), (3, 0, 2), (2, 3, 4), (1, 2, 3, 4), (2, 1, 3, 2, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_by_one(example: NativeBackend, shape: tuple[int, ...]) -> None:
    odd = np.resize(np.array([np.nan, np.inf, -np.inf, -0.0, 3.0, -3.0], np.float32), shape)
    for values in (f32(*shape), odd):
        check(example, "Relu", [values])
        check(example, "Erf", [values])
    for approximate in ("none", "tanh"):
        check(example, "Gelu", [f32(*shape)], approximate=approximate)
    check(example, "Gelu", [f32(*shape)])
    check(example, "Relu", [f32(*shape)], opset=6)


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_and_transpose(example: NativeBackend, shape: tuple[int, ...]) -> None:
    rank = len(shape)
    for axis in range(-rank, rank):
        if all(shape):
            check(example, "Softmax", [f32(*shape) * 10], axis=axis)
    for _ in range(4):
        perm = [int(place) for place in RANDOM.permutation(rank)]
        check(example, "Transpose", [f32(*shape)], perm=perm) if rank else None
    check(example, "Transpose", [RANDOM.integers(-9, 9, shape).astype(np.int64)])


def test_softmax_of_infinities(example: NativeBackend) -> None:
    check(example, "Softmax", [np.array([[-np.inf, 0, 1], [1e30, -1e30, 0]], np.float32)])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((3,), (3,)), ((3,), (3, 4)), ((2, 3), (3,)), ((2, 3), (3, 4)), ((5, 17), (17, 33)), ((4, 16), (16, 16)),
        ((2, 5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4)), ((1, 5, 3), (6, 3, 4)), ((2, 1, 3, 4), (5, 4, 2)),
        ((3,), (2, 3, 4)),
        ((2, 2, 3), (3,)), ((0, 3), (3, 2)), ((2, 0), (0, 3)), ((2, 3), (3, 0)), ((0, 2, 3), (3, 4)),
        ((2, 1, 1, 2, 3), (3, 1, 3, 2)),
        ((9, 31), (31, 40)), ((1, 64), (64, 100)),
    ],
)  # fmt: skip
def test_matmul(example: NativeBackend, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    check(example, "MatMul", [f32(*one), f32(*other)])
    check(example, "MatMul", [f32(*one), f32(*other)], opset=9)


def test_gemm(example: NativeBackend) -> None:
    for trans_a in (0, 1):
        for trans_b in (0, 1):
            for m, n, k in ((3, 5, 4), (1, 1, 1), (17, 33, 8), (2, 16, 3)):
                a, b = f32(*((k, m) if trans_a else (m, k))), f32(*((n, k) if trans_b else (k, n)))
                for c in (None, f32(m, n), f32(n), f32(1, n), f32(m, 1), f32(1), f32()):
                    inputs: list[Array | None] = [a, b] if c is None else [a, b, c]
                    check(example, "Gemm", inputs, transA=trans_a, transB=trans_b, alpha=0.5, beta=-2.0)
    check(example, "Gemm", [f32(2, 3), f32(3, 4), f32(4)], opset=7)


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), (1, 2, 3, 4), (2, 1, 2, 3, 3)])
def test_layer_normalization(example: NativeBackend, shape: tuple[int, ...]) -> None:
    for axis in range(-len(shape), len(shape)):
        inner = shape[axis:]
        check(example, "LayerNormalization", [f32(*shape), f32(*inner), f32(*inner)], axis=axis, epsilon=1e-3)
        check(example, "LayerNormalization", [f32(*shape) + 5, f32(*inner)], axis=axis)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_conv(example: NativeBackend, spatial: int) -> None:
    for _ in range(25):
        group = int(RANDOM.choice([1, 1, 2, 3]))
        channels, makes = group * int(RANDOM.integers(1, 4)), group * int(RANDOM.integers(1, 6))
        kernel = [int(size) for size in RANDOM.integers(1, 4, spatial)]
        dilations = [int(size) for size in RANDOM.integers(1, 3, spatial)]
        strides = [int(size) for size in RANDOM.integers(1, 4, spatial)]
        pads = [int(size) for size in RANDOM.integers(0, 3, 2 * spatial)]
        image = [d * (k - 1) + 1 + int(RANDOM.integers(0, 6)) for k, d in zip(kernel, dilations, strict=True)]
        x, w = f32(int(RANDOM.integers(1, 3)), channels, *image), f32(makes, channels // group, *kernel)
        inputs: list[Array | None] = [x, w] if RANDOM.random() < 0.3 else [x, w, f32(makes)]
        check(
            example, "Conv", inputs, group=group, dilations=dilations, strides=strides, pads=pads, kernel_shape=kernel
        )
    check(example, "Conv", [f32(1, 2, *[5] * spatial), f32(3, 2, *[3] * spatial)])
    # A batch of none is beyond the reference.
    none = _graph("Conv", 11, [f32(0, 2, 5), f32(3, 2, 3)], np.zeros((0, 3, 3), np.float32), {})
    with example.open() as device:
        assert device.supports(none.nodes[0], none)


def test_gather(example: NativeBackend) -> None:
    for shape in ((5,), (3, 4), (2, 3, 4), (1, 2, 3, 2)):
        for axis in range(-len(shape), len(shape)):
            size = shape[axis]
            for indices in ((), (3,), (2, 2), (0,)):
                for kind in (np.int32, np.int64):
                    at = RANDOM.integers(-size, size, indices).astype(kind)
                    check(example, "Gather", [f32(*shape), at], axis=axis)
    check(example, "Gather", [RANDOM.integers(0, 9, (4, 2)), np.array([1, 0], np.int64)])


def test_reshape(example: NativeBackend) -> None:
    cases: list[tuple[tuple[int, ...], list[int], int]] = [
        ((2, 3, 4), [4, 6], 0), ((2, 3, 4), [-1], 0), ((2, 3, 4), [0, -1], 0), ((2, 3, 4), [0, 0, 2, 2], 0),
        ((), [1, 1], 0),
        ((1,), [], 0), ((0, 3), [3, 0], 1), ((6,), [2, 3], 0), ((2, 3), [3, -1], 1),
    ]  # fmt: skip
    for shape, sizes, allowzero in cases:
        check(example, "Reshape", [f32(*shape), np.array(sizes, np.int64)], allowzero=allowzero)
    check(example, "Reshape", [f32(2, 3), np.array([3, 2], np.int64)], opset=5)


def _try(device: Any, graph: Graph, inputs: list[Array]) -> None:
    program = device.compile(graph)
    given = [device.allocator.upload(each) for each in inputs]
    device.queue().submit(program, given, [device.allocator.tensor(program.outputs[0])]).wait(60)


def test_what_is_wrong_only_at_run_time_is_named(example: NativeBackend) -> None:
    with example.open() as device:
        at = np.array([1, 9], np.int64)
        graph = _graph("Gather", 13, [f32(3), at], f32(2), {})
        with pytest.raises(InvalidArgument, match="out of range"):
            _try(device, graph, [f32(3), at])
        graph = _graph("Reshape", 14, [f32(6), at], f32(2, 3), {})
        with pytest.raises((InvalidArgument, BackendFailed), match="out of range"):
            _try(device, graph, [f32(6), at])


@pytest.mark.parametrize(
    ("op", "version", "shapes", "made", "attributes", "reason"),
    [
        ("Sin", 7, [(2,)], (2,), {}, "not implemented"),
        ("Add", 6, [(2,), (2,)], (2,), {}, "version"),
        ("Add", 99, [(2,), (2,)], (2,), {}, "version"),
        ("Add", 14, [(2,)], (2,), {}, "number of inputs"),
        ("Add", 14, [(2,), (3,)], (3,), {}, "broadcast"),
        ("Add", 14, [(2,), (2,)], (3,), {}, "declared shape"),
        ("MatMul", 13, [(2, 3), (2, 3)], (2, 3), {}, "rows of B"),
        ("Softmax", 13, [(2,)], (2,), {"axis": 4}, "axis"),
        ("Softmax", 13, [(2,)], (2,), {"axis": "0"}, "axis"),
        ("Softmax", 13, [()], (), {}, "axis"),
        ("Transpose", 13, [(2, 3)], (3, 2), {"perm": (0, 0)}, "permutation"),
        ("Transpose", 13, [(2, 3)], (3, 2), {"perm": (5, -1)}, "permutation"),
        ("Transpose", 13, [(2, 3)], (3, 2), {"perm": (0,)}, "perm"),
        ("Conv", 11, [(1, 2, 5), (3, 2, 3)], (1, 3, 5), {"auto_pad": "SAME_UPPER"}, "auto_pad"),
        ("Conv", 11, [(1, 2, 5), (3, 2, 3)], (1, 3, 3), {"group": -1}, "groups"),
        ("Conv", 11, [(1, 2, 5), (3, 2, 3)], (1, 3, 3), {"group": 0}, "groups"),
        ("Conv", 11, [(1, 2, 5), (3, 2, 3)], (1, 3, 3), {"strides": (0,)}, "out of range"),
        ("Conv", 11, [(1, 2, 5), (3, 2, 3)], (1, 3, 3), {"pads": (-1, 1)}, "out of range"),
        ("Conv", 11, [(1, 2, 2), (3, 2, 3)], (1, 3, 1), {}, "larger than the input"),
        ("Conv", 11, [(1, 2), (3, 2)], (1, 3), {}, "spatial"),
        ("LayerNormalization", 17, [(2, 3), (1,)], (2, 3), {}, "scale"),
        ("LayerNormalization", 17, [(2, 3), (3,)], (2, 3), {"stash_type": 16}, "stash_type"),
        ("Gelu", 20, [(2,)], (2,), {"approximate": "other"}, "approximate"),
        ("Gemm", 13, [(2, 3), (3, 4), (5,)], (2, 4), {}, "broadcast"),
        ("Gather", 13, [(1,) * 20, (1,) * 13], (1,) * 32, {}, "indices"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_with_the_reason(
    example: NativeBackend,
    op: str,
    version: int,
    shapes: list[tuple[int, ...]],
    made: tuple[int, ...],
    attributes: dict[str, Any],
    reason: str,
) -> None:
    graph = _graph(op, version, [np.zeros(each, np.float32) for each in shapes], np.zeros(made, np.float32), attributes)
    with example.open() as device:
        support = device.supports(graph.nodes[0], graph)
        assert not support
        assert reason in support.reason


def test_types_that_are_not_implemented_are_named(example: NativeBackend) -> None:
    with example.open() as device:
        for kind, reason in (
            (np.float64, "only implemented for f32"),
            (np.int32, "i32 and i64 where elements only move"),
        ):
            x = np.zeros(2, kind)
            graph = _graph("Add", 14, [x, x], x, {})
            assert reason in device.supports(graph.nodes[0], graph).reason
        unknown = Graph(
            (Value("x", TensorSpec(D.F32, (None,))), Value("y", None)), (Node("Relu", 14, (0,), (1,)),), (0,), (1,)
        )
        assert "fixed shapes" in device.supports(unknown.nodes[0], unknown).reason


def test_an_operator_beyond_the_profile(tmp_path: Path) -> None:
    """The README's Tanh, put where it says."""
    code = (build.EXAMPLE / "example.c").read_text()
    lines = [line.removeprefix("   ") for line in (build.EXAMPLE / "README.md").read_text().splitlines()]
    places = [number for number, line in enumerate(lines) if line == "```c"]
    kernel, read = ("\n".join(lines[start + 1 : lines.index("```", start)]) for start in places)
    for old, new in (
        ("static ai_hal_status (*const KERNELS[])", f"{kernel}\n\nstatic ai_hal_status (*const KERNELS[])"),
        ("    [AI_HAL_OP_TRANSPOSE] = transpose,", "    [AI_HAL_OP_TRANSPOSE] = transpose, [OP_TANH] = own_tanh,"),
        ("    const char *wrong = ai_hal_read_op(graph, node, op);", read),
    ):
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tmp_path / "own.c").write_text(code)
    own = NativeBackend(build.library(tmp_path, "own", [tmp_path / "own.c"], "-O1"))
    x = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    check(own, "Tanh", [x])
    check(own, "Relu", [x])
    f32 = TensorSpec(D.F32, (3,))
    with own.open() as device:
        for node, declared in ((Node("Tanh", 6, (0,), (1,)), (4,)), (Node("Tanh", 99, (0,), (1,)), (3,))):
            graph = Graph((Value("x", f32), Value("y", TensorSpec(D.F32, declared))), (node,), (0,), (1,))
            assert not device.supports(node, graph)
