"""ggml as a backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.errors import InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.backends import ggml as module
from ai_assistant.hal.contract import Context
from ai_assistant.hal.ggml import library
from ai_assistant.hal.graph import NO_VALUE, Array, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.remote import RemoteBackend
from tests.hal.backends.graphs import block, block_result, f32, one, run

_RANDOM = np.random.default_rng(3)


def _some(*shape: int) -> Array:
    return _RANDOM.standard_normal(shape, np.float32)


def _specs(*arrays: Array) -> list[TensorSpec]:
    return [TensorSpec(DType.of(each.dtype), each.shape) for each in arrays]


def test_not_installed_is_said_with_what_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    backend = module.BACKEND()
    probe = backend.probe()
    assert not probe
    assert "not installed" in probe.unavailable
    assert "LLAMA_CPP_LIB_PATH" in probe.hint
    assert backend.version == "0"
    with pytest.raises(NotSupported):
        backend.open()


def test_a_library_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    (tmp_path / "libggml.so").write_bytes(b"\x7fELF garbage")
    (tmp_path / "libggml-base.so").write_bytes(b"")
    assert "does not load" in module.BACKEND().probe().unavailable


@pytest.fixture
def cpu() -> Iterator[Context]:
    with module.BACKEND().open("CPU") as context:
        yield context


@pytest.mark.engine
def test_the_processor_is_a_device() -> None:
    backend = module.BACKEND()
    devices = {each.id: each for each in backend.probe().devices}
    assert devices["CPU"].kind == "cpu"
    assert backend.version[0].isdigit()
    for name in ("no", "cpu", "CPU\0", "x" * 999):
        with pytest.raises(NotSupported):
            backend.open(name)


@pytest.mark.engine
def test_no_more_memory_than_the_device_says(cpu: Context) -> None:
    assert cpu.capabilities.memory_bytes > 0
    with pytest.raises(OutOfMemory):
        cpu.allocator.allocate(cpu.capabilities.memory_bytes + 1)


@pytest.mark.engine
def test_every_device_computes() -> None:
    graph, x = block(), _some(8, 16)
    backend = module.BACKEND()
    for device in backend.probe().devices:
        with backend.open(device.id) as context:
            assert np.allclose(run(context, graph, x)[0], block_result(graph, x), atol=1e-2, rtol=1e-2)


_ELEMENTS: list[tuple[str, int, Any]] = [
    ("Add", 14, np.add), ("Sub", 14, np.subtract), ("Mul", 14, np.multiply), ("Div", 14, np.divide),
]  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((), (2, 3)), ((2, 3), ()), ((), ()),
     ((2, 1, 4, 1), (3, 1, 5)), ((1,), (2, 3, 4, 5)), ((6, 4), (1, 4)), ((2, 3, 4), (2, 1, 4))],
)  # fmt: skip
@pytest.mark.parametrize(("op", "version", "expected"), _ELEMENTS)
def test_elements_with_broadcasting(
    cpu: Context, op: str, version: int, expected: Any, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    a, b = _some(*left), np.asarray(_some(*right) + 3, np.float32)
    a = np.asarray(a, np.float32)
    wanted = np.asarray(expected(a, b), np.float32)
    for constants in ({}, {0: a}, {1: b}):
        graph = one(op, version, _specs(a, b), _specs(wanted), constants=constants)
        inputs = [each for number, each in enumerate((a, b)) if number not in constants]
        assert np.allclose(run(cpu, graph, *inputs)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((1, 7), (7, 1)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((3, 4), (2, 4, 5)),
     ((2, 1, 3, 4), (1, 5, 4, 6)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4,)),
     ((33, 65), (65, 31)), ((4,), (2, 4, 5)), ((1, 3, 4), (2, 4, 5))],
)  # fmt: skip
def test_matmul(cpu: Context, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = _some(*left), _some(*right)
    wanted = np.asarray(np.matmul(a, b))
    for constants in ({}, {0: a}, {1: b}):
        graph = one("MatMul", 13, _specs(a, b), _specs(wanted), constants=constants)
        inputs = [each for number, each in enumerate((a, b)) if number not in constants]
        assert np.allclose(run(cpu, graph, *inputs)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.engine
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (5,), (3, 1), (1, 5), (3, 5)])
def test_gemm(cpu: Context, trans_a: int, trans_b: int, bias: tuple[int, ...] | None) -> None:
    a, b = _some(3, 4), _some(4, 5)
    wanted = 0.5 * (a @ b)
    inputs = [a.T.copy() if trans_a else a, b.T.copy() if trans_b else b]
    if bias is not None:
        inputs.append(np.asarray(_some(*bias), np.float32))
        wanted = wanted + 2 * inputs[2]
    attributes = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0}
    for constants in ({}, {1: inputs[1]}):
        graph = one("Gemm", 13, _specs(*inputs), _specs(wanted.astype(np.float32)), attributes, constants)
        given = [each for number, each in enumerate(inputs) if number not in constants]
        assert np.allclose(run(cpu, graph, *given)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.engine
def test_rows(cpu: Context) -> None:
    x = 10 * _some(2, 3, 17)
    powers = np.exp(x - x.max(-1, keepdims=True))
    graph = one("Softmax", 13, _specs(x), _specs(x), {"axis": -1})
    assert np.allclose(run(cpu, graph, x)[0], powers / powers.sum(-1, keepdims=True), atol=1e-6)
    scale, bias = _some(17), _some(17)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    for last, wanted in (([scale], normal * scale), ([scale, bias], normal * scale + bias)):
        graph = one("LayerNormalization", 17, _specs(x, *last), _specs(x), {"axis": 2, "epsilon": 1e-3})
        assert np.allclose(run(cpu, graph, x, *last)[0], wanted, atol=1e-4)


@pytest.mark.engine
def test_single_values(cpu: Context) -> None:
    x = np.abs(_some(4, 5)) * 3 - 1
    erf = np.vectorize(math.erf)
    with np.errstate(invalid="ignore"):
        expected: dict[str, tuple[int, Any]] = {
            "Relu": (14, np.maximum(x, 0)), "Gelu": (20, 0.5 * x * (1 + erf(x / math.sqrt(2)))),
            "Tanh": (13, np.tanh(x)), "Sigmoid": (13, 1 / (1 + np.exp(-x))), "Neg": (13, -x), "Abs": (13, np.abs(x)),
            "Exp": (13, np.exp(x)), "Sqrt": (13, np.sqrt(x)),
        }  # fmt: skip
    for op, (version, wanted) in expected.items():
        assert np.allclose(run(cpu, one(op, version, _specs(x), _specs(x)), x)[0], wanted, atol=1e-5, equal_nan=True), (
            op
        )


@pytest.mark.engine
def test_shapes(cpu: Context) -> None:
    x = _some(2, 3, 4)
    for perm in [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1), (0, 2, 1), None]:
        wanted = np.ascontiguousarray(np.transpose(x, perm))
        attributes = {} if perm is None else {"perm": perm}
        assert np.array_equal(run(cpu, one("Transpose", 13, _specs(x), _specs(wanted), attributes), x)[0], wanted)
    y = _some(2, 3, 4, 5)
    for order in [(3, 1, 0, 2), (1, 0, 3, 2), (2, 3, 1, 0)]:
        wanted = np.ascontiguousarray(np.transpose(y, order))
        graph = one("Transpose", 13, _specs(y), _specs(wanted), {"perm": order})
        assert np.array_equal(run(cpu, graph, y)[0], wanted)
    shape = np.array([4, -1])
    graph = one("Reshape", 14, [f32(2, 3, 4), TensorSpec(DType.I64, (2,))], [f32(4, 6)], constants={1: shape})
    assert np.array_equal(run(cpu, graph, x)[0], x.reshape(4, 6))


@pytest.mark.engine
def test_sixteen_bits(cpu: Context) -> None:
    a, b = _some(3, 4).astype(np.float16), _some(4, 5).astype(np.float16)
    wanted = (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float16)
    graph = one("MatMul", 13, _specs(a, b), _specs(wanted), constants={1: b})
    assert np.allclose(run(cpu, graph, a)[0], wanted, rtol=2e-3, atol=2e-3)
    big = np.full(4, 60000, np.float16)
    assert np.isinf(run(cpu, one("Add", 14, _specs(big, big), _specs(big)), big, big)[0]).all()


@pytest.mark.engine
def test_inputs_and_constants_as_outputs_and_inputs_that_nobody_uses(cpu: Context) -> None:
    constant = np.array([7, 8], np.float32)
    values = (Value("x", f32(2)), Value("unused", f32(3)), Value("c", f32(2), constant), Value("y", f32(2)),
              Value("z", f32(2, 1)), Value("s", TensorSpec(DType.I64, (2,)), np.array([2, 1])))  # fmt: skip
    nodes = (Node("Relu", 14, (0,), (3,)), Node("Reshape", 14, (3, 5), (4,)))
    graph = Graph(values, nodes, (0, 1), (0, 2, 3, 4, 3))
    found = run(cpu, graph, np.array([-1, 2], np.float32), np.zeros(3, np.float32))
    assert [each.tolist() for each in found] == [[-1, 2], [7, 8], [0, 2], [[0], [2]], [0, 2]]


@pytest.mark.engine
def test_what_is_not_supported_says_why(cpu: Context) -> None:
    """And never reaches ggml, which would end the process."""
    f64, i64 = TensorSpec(DType.F64, (4,)), TensorSpec(DType.I64, (4,))
    for graph, says in [
        (one("Conv", 11, [f32(1, 1, 4, 4), f32(1, 1, 2, 2)], [f32(1, 1, 3, 3)]), "not implemented"),
        (one("Erf", 13, [f32(4)], [f32(4)]), "not implemented"),
        (one("Relu", 14, [f64], [f64]), "f64"),
        (one("Add", 14, [i64, i64], [i64]), "i64"),
        (one("Add", 14, [f32(4), f32(3)], [f32(4)]), "do not fit"),
        (one("Add", 14, [f32(4), f32(4)], [f32(5)]), "does not fit"),
        (one("Add", 14, [f32(4), TensorSpec(DType.F16, (4,))], [f32(4)]), "two types"),
        (one("Add", 14, [f32(4)], [f32(4)]), "two inputs"),
        (one("Relu", 14, [f32(None)], [f32(None)]), "fixed sizes"),
        (one("Relu", 14, [f32(1, 1, 1, 1, 1)], [f32(1, 1, 1, 1, 1)]), "4 dimensions"),
        (one("Relu", 14, [f32(0)], [f32(0)]), "empty"),
        (one("Relu", 14, [f32(4)], [f32(8)]), "does not fit"),
        (one("Softmax", 13, [f32(3, 4)], [f32(3, 4)], {"axis": 0}), "last axis"),
        (one("Softmax", 11, [f32(2, 3, 4)], [f32(2, 3, 4)]), "last axis"),
        (one("Gelu", 20, [f32(4)], [f32(4)], {"approximate": "tanh"}), "table"),
        (one("LayerNormalization", 17, [f32(3, 4), f32(3)], [f32(3, 4)]), "as long as a row"),
        (one("LayerNormalization", 17, [f32(4), f32(4)], [f32(4)], {"epsilon": float("nan")}), "epsilon"),
        (one("LayerNormalization", 17, [f32(4), f32(4)], [f32(4), f32(1)]), "first output"),
        (one("MatMul", 13, [f32(3, 4), f32(5, 6)], [f32(3, 6)]), "do not fit"),
        (one("MatMul", 13, [f32(2, 3, 4), f32(3, 4, 6)], [f32(2, 3, 6)]), "do not fit"),
        (one("MatMul", 13, [f32(), f32(4)], [f32()]), "no matrix"),
        (one("Gemm", 13, [f32(3, 4), f32(4, 5)], [f32(5, 3)]), "do not fit"),
        (one("Gemm", 13, [f32(3, 4), f32(4, 5), f32(4)], [f32(3, 5)]), "third"),
        (one("Gemm", 13, [f32(3, 4), f32(4, 5)], [f32(3, 5)], {"alpha": float("inf")}), "finite"),
        (one("Transpose", 13, [f32(3, 4)], [f32(4, 3)], {"perm": (0, 0)}), "perm"),
        (one("Transpose", 13, [f32(3, 4)], [f32(3, 4)], {"perm": (1, 0)}), "does not fit"),
        (one("Reshape", 14, [f32(4), TensorSpec(DType.I64, (1,))], [f32(4)]), "constant"),
        (one("Flatten", 13, [f32(4)], [f32(1, 5)]), "number of elements"),
    ]:
        support = cpu.supports(graph.nodes[0], graph)
        assert not support
        assert says in support.reason, (graph.nodes[0], support.reason)
        with pytest.raises(NotSupported):
            cpu.compile(graph)
    left_out = Graph((Value("x", f32(1)), Value("y", f32(1))), (Node("Add", 14, (0, NO_VALUE), (1,)),), (0,), (1,))
    assert not cpu.supports(left_out.nodes[0], left_out)


@pytest.mark.engine
def test_programs_on_many_queues_and_after_they_were_closed(cpu: Context) -> None:
    graph = block()
    program = cpu.compile(graph)
    queues = [cpu.queue() for _ in range(3)]
    pairs = []
    for number in range(12):
        x = _some(8, 16)
        pairs.append((x, cpu.allocator.adopt(x), cpu.allocator.tensor(f32(8, 16))))
        queues[number % 3].submit(program, [pairs[-1][1]], [pairs[-1][2]])
    for queue in queues:
        queue.synchronize(60)
    for x, _, y in pairs:
        assert np.allclose(y.numpy(), block_result(graph, x), atol=1e-3)
    program.close()
    program.close()
    with pytest.raises(InvalidArgument, match="closed"):
        queues[0].submit(program, [pairs[0][1]], [pairs[0][2]]).wait(60)
    with pytest.raises(InvalidArgument):
        program.output_specs([f32(9, 16)])
    for _ in range(50):
        cpu.compile(graph)
    cpu.close()
    with pytest.raises(InvalidArgument):
        cpu.compile(graph)


@pytest.mark.engine
def test_in_a_process_of_its_own() -> None:
    graph, x = block(), _some(8, 16)
    with RemoteBackend("ggml").open("CPU") as context:
        assert np.allclose(run(context, graph, x)[0], block_result(graph, x), atol=1e-3)
