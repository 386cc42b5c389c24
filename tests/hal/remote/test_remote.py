"""Backends in processes of their own: the contract, and what happens when a vendor's code misbehaves."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    DeviceLost,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)
from ai_assistant.hal.graph import Attribute, DType, Graph, Node, TensorSpec, Value
from ai_assistant.hal.host import HostAllocator
from ai_assistant.hal.remote import Limits, RemoteBackend
from ai_assistant.hal.remote.backend import RemoteContext

VENDOR = str(Path(__file__).with_name("vendor.py"))
_FOUR = TensorSpec(DType.F32, (4,))
_LONG = 60.0


def _graph(op: str = "Double", spec: TensorSpec = _FOUR) -> Graph:
    return Graph((Value("x", spec), Value("y", spec)), (Node(op, 1, (0,), (1,), domain="vendor"),), (0,), (1,))


def _backend(**limits: float) -> RemoteBackend:
    return RemoteBackend(VENDOR, limits=Limits(**{"run_s": _LONG, "memory_bytes": 4 << 30, **limits}))  # type: ignore[arg-type]


@pytest.fixture
def context() -> Iterator[RemoteContext]:
    with _backend().open("good") as context:
        yield context


def _run(context: RemoteContext, timeout_s: float = _LONG) -> list[float]:
    program = context.compile(_graph())
    x = context.allocator.upload(np.array([1, 2, 3, math.nan], np.float32))
    y = context.allocator.tensor(_FOUR)
    queue = context.queue()
    queue.submit(program, [x], [y]).wait(timeout_s)
    queue.close()
    found: list[float] = context.allocator.download(y).tolist()
    return found


def _gone(pid: int) -> bool:
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_it_is_a_backend_like_any_other() -> None:
    backend = _backend()
    probe = backend.probe()
    assert (backend.name, backend.version, probe.devices[0].id) == ("vendor", "7.5", "good")
    with backend.open() as context:
        assert context.device.name == "a device that does good"
        assert context.capabilities.dtypes == {DType.F32}
        assert context.child.pid != os.getpid()
        assert context.power_w() == 4.5
        assert _run(context)[:3] == [2, 4, 6]
        assert math.isnan(_run(context)[3])
        pid = context.child.pid
    assert _gone(pid)


@pytest.mark.parametrize("device", ["good", "own-memory"])
def test_tensors_at_offsets_views_and_chains(device: str) -> None:
    with _backend().open(device) as context:
        program = context.compile(_graph())
        memory = context.allocator
        large = memory.tensor(TensorSpec(DType.F32, (64,)))
        large.numpy()[...] = np.arange(64)
        queue = context.queue()
        first = type(large)(large.buffer, _FOUR, 64)
        second = type(large)(large.buffer, _FOUR, 128)
        queue.submit(program, [first], [second])
        queue.submit(program, [second], [first])
        queue.synchronize(_LONG)
        assert second.numpy().tolist() == [32, 34, 36, 38]
        assert large.numpy()[14:22].tolist() == [14, 15, 64, 68, 72, 76, 20, 21]


def test_constants_and_attributes_arrive_as_they_were() -> None:
    attributes: dict[str, Attribute] = {
        "i": 3,
        "f": math.inf,
        "s": "ä\0",
        "b": b"\0\xff",
        "is": (1, 2),
        "a": np.eye(2, dtype=np.int64),
    }
    weight = np.array([1, 2, 3, 4], np.float32)
    graph = Graph(
        (Value("x", _FOUR), Value("w", _FOUR, weight), Value("y", _FOUR)),
        (Node("Double", 1, (0, 1), (2,), attributes, "vendor"),),
        (0,),
        (2,),
    )
    with _backend().open("weights") as context:
        x, y = context.allocator.upload(weight), context.allocator.tensor(_FOUR)
        context.queue().submit(context.compile(graph), [x], [y]).wait(_LONG)
        assert y.numpy().tolist() == [math.inf] * 4


def test_support_is_asked_for_with_reasons(context: RemoteContext) -> None:
    good, bad = _graph(), _graph("Halve")
    assert context.supports(good.nodes[0], good)
    assert not (support := context.supports(bad.nodes[0], bad))
    assert support.reason == "vendor.Halve-1 is not implemented"
    with pytest.raises(InvalidArgument):
        context.supports(bad.nodes[0], good)


def test_programs_are_kept_and_sizes_asked_for(context: RemoteContext) -> None:
    program = context.compile(_graph(spec=TensorSpec(DType.F32, (None,))))
    assert program.inputs[0].shape == (None,)
    assert program.output_specs([_FOUR]) == (_FOUR,)
    blob = program.blob()
    assert blob == b"double"
    assert context.load(blob).inputs == (_FOUR,)
    for damaged in (b"", b"other"):
        with pytest.raises(InvalidModel):
            context.load(damaged)
    program.close()
    program.close()


def test_what_does_not_fit_is_refused_before_it_is_sent(context: RemoteContext) -> None:
    program, queue = context.compile(_graph()), context.queue()
    good = context.allocator.tensor(_FOUR)
    with pytest.raises(InvalidArgument):
        queue.submit(program, [HostAllocator().tensor(_FOUR)], [good])
    with pytest.raises(InvalidArgument):
        queue.submit(program, [good], [])
    with pytest.raises(NotSupported):
        context.allocator.adopt(np.zeros(4, np.float32))
    with pytest.raises(NotSupported):
        _backend().open("no such device")
    good.buffer.free()
    with pytest.raises(InvalidArgument):
        queue.submit(program, [good], [good])


def test_memory_is_limited_aligned_and_given_back(context: RemoteContext) -> None:
    memory = context.allocator
    with pytest.raises(OutOfMemory):
        memory.allocate(1 << 40)
    for alignment in (1, 64, 4096, 1 << 16):
        buffer = memory.allocate(100, alignment)
        assert buffer.memory is not None
        assert buffer.memory.ctypes.data % alignment == 0
        buffer.free()
        buffer.free()
    for _ in range(2000):  # more than a process may have descriptors
        memory.allocate(8)
    memory.allocate(0)
    gc.collect()
    assert memory.statistics().in_use_bytes == 0
    assert _run(context)[:3] == [2, 4, 6]
    maps = Path(f"/proc/{context.child.pid}/maps").read_text().count("memfd:hal")
    assert maps < 20


def test_two_queues_and_many_runs(context: RemoteContext) -> None:
    program, queues = context.compile(_graph()), [context.queue(), context.queue()]
    x = context.allocator.upload(np.ones(4, np.float32))
    outputs = [context.allocator.tensor(_FOUR) for _ in range(100)]
    for number, y in enumerate(outputs):
        queues[number % 2].submit(program, [x], [y])
    for queue in queues:
        queue.synchronize(_LONG)
    assert all(y.numpy().tolist() == [2] * 4 for y in outputs)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("crash", "was killed by SIGSEGV"),
        ("abort", "was killed by SIGABRT"),
        ("exit", "ended with code 3"),
        ("garbage", "announced a message of 4294967295 bytes"),
        ("huge", "announced a message of 4294967280 bytes"),
        ("empty", "announced a message of 0 bytes"),
        ("no-json", "no JSON"),
        ("no-object", "no object"),
        ("deep", "no JSON"),
        ("unasked", "nobody asked"),
        ("no-id", "a number belongs"),
        ("bad-error", "a number belongs"),
    ],
)
def test_a_process_that_dies_or_lies_fails_all_that_waits_and_no_more(device: str, says: str) -> None:
    backend = _backend()
    context = backend.open(device)
    program = context.compile(_graph())
    x, y = context.allocator.upload(np.ones(4, np.float32)), context.allocator.tensor(_FOUR)
    queues = [context.queue(), context.queue()]
    events = [queue.submit(program, [x], [y]) for queue in queues for _ in range(3)]
    for event in events:
        with pytest.raises(BackendFailed, match=says) as caught:
            event.wait(_LONG)
    assert "starts a new process" in caught.value.hint
    assert _gone(context.child.pid)
    with pytest.raises(BackendFailed):
        context.compile(_graph())
    with pytest.raises(AIAssistantError):
        context.allocator.allocate(8)
    assert context.allocator.download(x).tolist() == [1] * 4, "the host's view of the memory outlives the process"
    context.close()
    with backend.open("good") as other:
        assert _run(other)[:3] == [2, 4, 6]


def test_a_process_that_closes_its_connection_is_ended() -> None:
    context = _backend().open("closed")
    with pytest.raises(BackendFailed, match=r"closed its connection|ended"):
        _run(context)
    assert _gone(context.child.pid)


@pytest.mark.parametrize("device", ["hang", "hang-hard"])
def test_a_process_that_hangs_is_ended_and_the_time_named(device: str) -> None:
    context = _backend(run_s=0.3).open(device)
    with pytest.raises(BackendFailed, match=r"did not answer to 'run' within 0\.3 s"):
        _run(context)
    assert _gone(context.child.pid)
    context.close()


@pytest.mark.parametrize("device", ["crash-in-open", "crash-in-compile"])
def test_crashes_elsewhere(device: str) -> None:
    with pytest.raises(BackendFailed, match="was killed by"):
        _backend().open(device).compile(_graph())


def test_a_death_may_count_as_the_loss_of_the_device() -> None:
    backend = RemoteBackend(VENDOR, loss=True)
    context = backend.open("crash")
    with pytest.raises(DeviceLost, match="SIGSEGV"):
        _run(context)
    with pytest.raises(DeviceLost, match="SIGSEGV"):
        context.compile(_graph())


def test_what_a_backend_says_is_passed_on_and_made_harmless() -> None:
    with _backend().open("lost") as context:
        with pytest.raises(DeviceLost, match="pulled out") as caught:
            _run(context)
        assert caught.value.hint == "put it back"
        with pytest.raises(DeviceLost):
            _run(context)
        assert not context.child.failed
    with _backend().open("other-error") as context, pytest.raises(BackendFailed, match="SystemError") as failed:
        _run(context)
    assert "\x1b" not in failed.value.message
    assert "\n" not in failed.value.message
    assert len(failed.value.message) < 400


def test_a_leak_ends_with_its_process() -> None:
    with _backend(memory_bytes=300 << 20).open("leak") as context:
        with pytest.raises((OutOfMemory, BackendFailed)):
            _run(context)
        pid = context.child.pid
    assert _gone(pid)


def test_a_backend_that_cannot_be_loaded_is_unavailable(tmp_path: Path) -> None:
    for text, says in [
        ("import no_such_module", "No module named"),
        ("BACKEND = 3", "not name a class"),
        ("x = (", "SyntaxError"),
        ("import os; os._exit(7)", "code 7"),
    ]:
        path = tmp_path / "broken.py"
        path.write_text(text)
        backend = RemoteBackend(str(path))
        probe = backend.probe()
        assert not probe
        assert says in probe.unavailable
        with pytest.raises(AIAssistantError):
            backend.open()
    assert not RemoteBackend(str(tmp_path / "absent.py")).probe()


def test_a_context_that_nobody_closes_ends_its_process() -> None:
    context = _backend().open("good")
    pid = context.child.pid
    del context
    gc.collect()
    assert _gone(pid)
