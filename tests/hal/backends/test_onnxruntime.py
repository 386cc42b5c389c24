"""ONNX Runtime as a backend."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ai_assistant.errors import AIAssistantError, InvalidArgument, InvalidModel, NotSupported
from ai_assistant.hal.backends import onnxruntime as module
from ai_assistant.hal.contract import Context
from ai_assistant.hal.graph import DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.remote import RemoteBackend
from tests.hal.backends.graphs import block, block_result, f32, one, run

_X = np.random.default_rng(2).standard_normal((8, 16), np.float32)


def test_not_installed_is_said_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_loaded", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    probe = module.BACKEND().probe()
    assert not probe
    assert "not installed" in probe.unavailable or "onnx" in probe.unavailable
    assert "python3-onnxruntime" in probe.hint
    assert module.BACKEND().version == "0"
    with pytest.raises(NotSupported):
        module.BACKEND().open()


@pytest.fixture
def cpu() -> Iterator[Context]:
    with module.BACKEND().open("CPUExecutionProvider") as context:
        yield context


@pytest.mark.engine
def test_every_provider_is_a_device() -> None:
    backend = module.BACKEND()
    probe = backend.probe()
    names = [each.id for each in probe.devices]
    assert "CPUExecutionProvider" in names
    assert all(each.endswith("ExecutionProvider") and "Azure" not in each for each in names)
    assert probe.devices[names.index("CPUExecutionProvider")].kind == "cpu"
    assert backend.version[0].isdigit()


@pytest.mark.engine
@pytest.mark.parametrize(
    "device", ["no", "CPUExecutionProvider@9999", "CPUExecutionProvider@x", "CPUExecutionProvider@1*2", "@0", "x" * 999,
               "NoSuchExecutionProvider@0", "AzureExecutionProvider", "CPUExecutionProvider\n"],
)  # fmt: skip
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(NotSupported):
        module.BACKEND().open(device)


@pytest.mark.engine
@pytest.mark.parametrize("device", ["", "CPUExecutionProvider", "CPUExecutionProvider*2"])
def test_it_computes(device: str) -> None:
    graph = block()
    with module.BACKEND().open(device) as context:
        assert np.allclose(run(context, graph, _X)[0], block_result(graph, _X), atol=1e-4)


@pytest.mark.engine
def test_every_provider_computes_what_it_says_it_supports() -> None:
    graph = block()
    backend = module.BACKEND()
    for device in backend.probe().devices:
        with backend.open(device.id) as context:
            answers = [context.supports(node, graph) for node in graph.nodes]
            for node, answer in zip(graph.nodes, answers, strict=True):
                assert answer or answer.reason, node
            if all(answers):
                assert np.allclose(run(context, graph, _X)[0], block_result(graph, _X), atol=1e-4)
                kept = context.load(context.compile(graph).blob())
                assert np.allclose(run(context, graph, _X, program=kept)[0], block_result(graph, _X), atol=1e-4)
            else:
                with pytest.raises(NotSupported, match=r"Add-14|MatMul-13|Relu-14"):
                    context.compile(graph)


@pytest.mark.engine
def test_nothing_is_copied(cpu: Context) -> None:
    """Adopted memory is read and written where it lies."""
    graph = one("Add", 14, [f32(4), f32(4)], [f32(4)])
    a, b, y = (np.full(4, number, np.float32) for number in (1, 2, 0))
    program = cpu.compile(graph)
    tensors = [cpu.allocator.adopt(each) for each in (a, b, y)]
    queue = cpu.queue()
    queue.submit(program, tensors[:2], tensors[2:]).wait(60)
    assert y.tolist() == [3] * 4
    a += 10
    queue.submit(program, tensors[:2], tensors[2:]).wait(60)
    assert y.tolist() == [13] * 4


@pytest.mark.engine
def test_a_device_that_is_a_core_stays_on_it() -> None:
    core = min(os.sched_getaffinity(0))
    with module.BACKEND().open(f"CPUExecutionProvider@{core}") as context:
        assert context.device.id == f"CPUExecutionProvider@{core}"
        graph = block()
        assert np.allclose(run(context, graph, _X)[0], block_result(graph, _X), atol=1e-4)
        seen: list[set[int]] = []
        context.queue().callback(lambda: seen.append(os.sched_getaffinity(0))).wait(60)
        assert seen == [{core}]
    assert len(os.sched_getaffinity(0)) >= 1
    here: list[set[int]] = []
    thread = threading.Thread(target=lambda: here.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert here == [os.sched_getaffinity(0)], "only the queue's thread was moved"


@pytest.mark.engine
def test_what_is_not_supported_says_why(cpu: Context) -> None:
    f64, bf16 = TensorSpec(DType.F64, (4,)), TensorSpec(DType.BF16, (4,))
    for graph, says in [
        (one("Erf", 13, [f64], [f64]), "implementation for Erf"),
        (one("NoSuchOperator", 1, [f32(4)], [f32(4)]), "NoSuchOperator"),
        (one("Relu", 14, [bf16], [bf16]), "bf16"),
        (one("Add", 14, [f32(4), f32(3)], [f32(4)]), "ncompatible|nvalid|dimension"),
    ]:
        support = cpu.supports(graph.nodes[0], graph)
        assert not support
        assert cpu.supports(graph.nodes[0], graph) == support
        assert re.search(says, support.reason), support.reason
        with pytest.raises(AIAssistantError):
            cpu.compile(graph)
    unknown = Graph((Value("x", f32(4)), Value("y", None)), (Node("Relu", 14, (0,), (1,)),), (0,), (1,))
    assert "not known" in cpu.supports(unknown.nodes[0], unknown).reason


@pytest.mark.engine
def test_sizes_that_are_open(cpu: Context) -> None:
    graph = one("Add", 14, [f32(None, 3), f32(3)], [f32(None, 3)])
    program = cpu.compile(graph)
    bias = np.array([1, 2, 3], np.float32)
    for rows in (1, 5, 0):
        x = np.ones((rows, 3), np.float32)
        assert run(cpu, graph, x, bias, program=program)[0].tolist() == (x + bias).tolist()
    assert program.output_specs([f32(7, 3), f32(3)]) == (f32(7, 3),)
    with pytest.raises(AIAssistantError):
        program.output_specs([f32(7, 4), f32(3)])
    wrong = cpu.allocator.tensor(f32(2, 3))
    queue = cpu.queue()
    with pytest.raises(InvalidArgument, match="output 0 is"):
        queue.submit(program, [cpu.allocator.upload(np.ones((5, 3), np.float32)), cpu.allocator.upload(bias)], [wrong]
                     ).wait(60)  # fmt: skip


@pytest.mark.engine
def test_numbers_and_all_types(cpu: Context) -> None:
    for dtype in sorted(cpu.capabilities.dtypes):
        spec = TensorSpec(dtype, ())
        graph = one("Identity", 19, [spec], [spec])
        assert run(cpu, graph, np.array(1, dtype.numpy))[0].tolist() == 1


@pytest.mark.engine
def test_values_that_do_not_fit_are_an_error_of_that_run_alone(cpu: Context) -> None:
    i64 = TensorSpec(DType.I64, (1,))
    graph = one("Gather", 13, [f32(3), i64], [f32(1)])
    program = cpu.compile(graph)
    data, place = cpu.allocator.upload(np.arange(3, dtype=np.float32)), cpu.allocator.upload(np.array([99]))
    out = cpu.allocator.tensor(f32(1))
    queue = cpu.queue()
    event = queue.submit(program, [data, place], [out])
    with pytest.raises(InvalidArgument, match=r"Gather node.*out of data bounds"):
        event.wait(60)
    with pytest.raises(InvalidArgument):
        queue.synchronize(60)
    place.numpy()[...] = 2
    queue.submit(program, [data, place], [out]).wait(60)
    assert out.numpy().tolist() == [2]
    program.close()
    with pytest.raises(InvalidArgument, match="closed"):
        queue.submit(program, [data, place], [out]).wait(60)


@pytest.mark.engine
def test_programs_are_kept_and_damage_is_seen(cpu: Context) -> None:
    graph = block()
    blob = cpu.compile(graph).blob()
    assert np.allclose(run(cpu, graph, _X, program=cpu.load(blob))[0], block_result(graph, _X), atol=1e-4)
    for damaged in (b"", b"x", blob[:-1], blob[:40], blob[: len(blob) // 2] + b"\0" + blob[len(blob) // 2 + 1 :],
                    b"ai-assistant onnxruntime 1\n" + b"[" * 5000 + b"\n"):  # fmt: skip
        with pytest.raises(InvalidModel):
            cpu.load(damaged)
    with pytest.raises(NotSupported, match="another version"):
        cpu.load(blob.replace(module.BACKEND().version.encode(), b"0.1", 1))


@pytest.mark.engine
def test_one_program_on_many_queues(cpu: Context) -> None:
    graph = block()
    program = cpu.compile(graph)
    pairs = []
    for number in range(12):
        x = _X * number
        pairs.append((x, cpu.allocator.upload(x), cpu.allocator.tensor(f32(8, 16))))
    queues = [cpu.queue() for _ in range(3)]
    for number, (_, source, target) in enumerate(pairs):
        queues[number % 3].submit(program, [source], [target])
    for queue in queues:
        queue.synchronize(60)
    for x, _, target in pairs:
        assert np.allclose(target.numpy(), block_result(graph, x), atol=1e-3)


@pytest.mark.engine
def test_in_a_process_of_its_own() -> None:
    graph = block()
    with RemoteBackend("onnxruntime").open("CPUExecutionProvider") as context:
        assert context.supports(graph.nodes[0], graph)
        assert np.allclose(run(context, graph, _X)[0], block_result(graph, _X), atol=1e-4)
        program = context.load(context.compile(graph).blob())
        assert np.allclose(run(context, graph, _X, program=program)[0], block_result(graph, _X), atol=1e-4)
        assert Path(f"/proc/{context.child.pid}").exists()


@pytest.mark.engine
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: there are no threads to wait for each other")
def test_threads_rest_when_a_run_has_ended() -> None:
    """They spin between the nodes of a run; afterwards they would take the core from other devices."""
    spec = f32(256, 256)
    graph = one("MatMul", 13, [spec, spec], [spec])
    ones = np.ones((256, 256), np.float32)
    with module.BACKEND().open("CPUExecutionProvider*2") as context:
        program = context.compile(graph)
        for _ in range(20):
            run(context, graph, ones, ones, program=program)
        used = []
        for _ in range(5):
            run(context, graph, ones, ones, program=program)
            before = time.process_time()
            time.sleep(0.1)
            used.append(time.process_time() - before)
    assert sorted(used)[2] < 0.01
