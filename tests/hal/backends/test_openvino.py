"""OpenVINO as a backend. Debian has no package of it, so most of this is skipped where nobody installed it."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

from ai_assistant.errors import AIAssistantError, InvalidArgument, InvalidModel, NotSupported
from ai_assistant.hal.backends import openvino as module
from ai_assistant.hal.contract import Context
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value
from tests.hal.backends.graphs import block, block_result, f32, one, run

_X = np.random.default_rng(2).standard_normal((8, 16), np.float32)
installed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None or importlib.util.find_spec("onnx") is None,
    reason="OpenVINO is not installed",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_loaded", None)


def _unavailable(says: str) -> None:
    backend = module.BACKEND()
    probe = backend.probe()
    assert not probe
    assert says in probe.unavailable
    assert "pip install openvino" in probe.hint
    with pytest.raises(NotSupported):
        backend.open()


def test_not_installed_is_said_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", types.ModuleType("onnx"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    _unavailable("openvino")
    assert module.BACKEND().version == "0"


def test_a_library_that_does_not_start_and_one_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Exception from src/core.cpp:7:\nno plugins.xml\n")

    class Empty:
        available_devices: tuple[str, ...] = ()

    class Broken:
        @property
        def available_devices(self) -> list[str]:
            raise RuntimeError("Exception from x\nthe driver is too old")

    monkeypatch.setitem(sys.modules, "onnx", types.ModuleType("onnx"))
    for core, says in ((fail, "does not start: no plugins.xml"), (Empty, "no device here"), (Broken, "too old")):
        fake = types.ModuleType("openvino")
        fake.Core, fake.__version__ = core, "1"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "openvino", fake)
        monkeypatch.setattr(module, "_loaded", None)
        _unavailable(says)


@pytest.fixture
def cpu() -> Iterator[Context]:
    with module.BACKEND().open("CPU") as context:
        yield context


@installed
def test_every_device_computes() -> None:
    backend, graph = module.BACKEND(threads=1), block()
    assert backend.version[0].isdigit()
    for device in backend.probe().devices:
        with backend.open(device.id) as context:
            assert all(context.supports(node, graph) for node in graph.nodes)
            tolerance = 0.2 if device.kind == "npu" else 1e-3
            assert np.allclose(run(context, graph, _X)[0], block_result(graph, _X), atol=tolerance)
    with pytest.raises(NotSupported):
        backend.open("no")


@installed
def test_nothing_is_copied(cpu: Context) -> None:
    graph = one("Add", 14, [f32(4), f32(4)], [f32(4)])
    a, b, y = (np.full(4, number, np.float32) for number in (1, 2, 0))
    tensors = [cpu.allocator.adopt(each) for each in (a, b, y)]
    queue = cpu.queue()
    program = cpu.compile(graph)
    queue.submit(program, tensors[:2], tensors[2:]).wait(60)
    a += 10
    queue.submit(program, tensors[:2], tensors[2:]).wait(60)
    assert y.tolist() == [13] * 4


@installed
def test_sizes_that_are_open(cpu: Context) -> None:
    graph = one("Add", 14, [f32(None, 3), f32(3)], [f32(None, 3)])
    program = cpu.compile(graph)
    bias = np.array([1, 2, 3], np.float32)
    for rows in (1, 5):
        x = np.ones((rows, 3), np.float32)
        assert run(cpu, graph, x, bias, program=program)[0].tolist() == (x + bias).tolist()
    wrong, queue = cpu.allocator.tensor(f32(2, 3)), cpu.queue()
    sources = [cpu.allocator.upload(np.ones((5, 3), np.float32)), cpu.allocator.upload(bias)]
    with pytest.raises(InvalidArgument, match="output 0 is"):
        queue.submit(program, sources, [wrong]).wait(60)
    with pytest.raises(NotSupported):
        program.blob()


@installed
def test_inputs_and_constants_as_outputs_and_inputs_that_nobody_uses(cpu: Context) -> None:
    constant = np.array([7, 8], np.float32)
    values = (Value("x", f32(2)), Value("unused", f32(3)), Value("c", f32(2), constant), Value("y", f32(2)))
    graph = Graph(values, (Node("Relu", 14, (0,), (3,)),), (0, 1), (0, 2, 3, 3))
    found = run(cpu, graph, np.array([-1, 2], np.float32), np.zeros(3, np.float32))
    assert [each.tolist() for each in found] == [[-1, 2], [7, 8], [0, 2], [0, 2]]


@installed
def test_numbers_and_types(cpu: Context) -> None:
    for dtype in sorted(cpu.capabilities.dtypes):
        spec = TensorSpec(dtype, (2, 1))
        graph = one("Reshape", 14, [spec, TensorSpec(DType.I64, (1,))], [TensorSpec(dtype, (2,))],
                    constants={1: np.array([2])})  # fmt: skip
        if cpu.supports(graph.nodes[0], graph):
            assert run(cpu, graph, np.array([[1], [0]], dtype.numpy))[0].tolist() == [1, 0]
    graph = one("Add", 14, [f32(), f32()], [f32()])
    assert run(cpu, graph, np.array(1, np.float32), np.array(2, np.float32))[0].tolist() == 3


@installed
def test_what_is_not_supported_says_why(cpu: Context) -> None:
    bf16 = TensorSpec(DType.BF16, (4,))
    for graph, says in [
        (one("NoSuchOperator", 1, [f32(4)], [f32(4)]), "NoSuchOperator"),
        (one("Relu", 14, [bf16], [bf16]), "bf16"),
        (one("Add", 14, [f32(4), f32(3)], [f32(4)]), ""),
    ]:
        support = cpu.supports(graph.nodes[0], graph)
        assert not support
        assert says in support.reason
        assert support.reason
        with pytest.raises(AIAssistantError):
            cpu.compile(graph)


@installed
def test_programs_are_kept_and_damage_is_seen(cpu: Context) -> None:
    graph = block()
    program = cpu.compile(graph)
    blob = program.blob()
    assert np.allclose(run(cpu, graph, _X, program=cpu.load(blob))[0], block_result(graph, _X), atol=1e-3)
    for damaged in (b"", b"x", blob[:-1], blob[:40], blob[: len(blob) // 2] + b"?!" + blob[len(blob) // 2 + 2 :]):
        with pytest.raises(InvalidModel):
            cpu.load(damaged)
    program.close()
    with pytest.raises(InvalidArgument):
        program.blob()


@installed
def test_one_program_on_many_queues(cpu: Context) -> None:
    graph = block()
    program = cpu.compile(graph)
    queues = [cpu.queue() for _ in range(3)]
    pairs = []
    for number in range(12):
        x = _X * number
        pairs.append((x, cpu.allocator.upload(x), cpu.allocator.tensor(f32(8, 16))))
        queues[number % 3].submit(program, [pairs[-1][1]], [pairs[-1][2]])
    for queue in queues:
        queue.synchronize(60)
    for x, _, y in pairs:
        assert np.allclose(y.numpy(), block_result(graph, x), atol=1e-2)
