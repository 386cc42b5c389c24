"""How fast memory and processor are, measured once per machine and kept.

The bandwidth is that of copies between buffers larger than the caches, on every core at once; a copy of n bytes counts
2n: read and written. Arithmetic is a matrix product by onnxruntime, where that is installed: NumPy's would measure
Debian's reference BLAS, which is no measure of a processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ai_assistant.errors import AIAssistantError, InvalidConfig
from ai_assistant.hal.detect.product import SIDE
from ai_assistant.hal.device import Device, DeviceKind, Source, Throughput

FILE = "measured.json"
VERSION = 1
MAX_FILE = 64 * 1024
COPY_BYTES = 128 << 20
PRODUCT_TIMEOUT_S = 120
MAX_TFLOP_S = 10_000
ROUNDS = 5


def key(devices: Iterable[Device]) -> str:
    """What a measurement holds for: this processor with this much memory."""
    parts = [
        (d.name, d.attributes.get("threads"), d.attributes.get("bytes"), d.attributes.get("isa"))
        for d in devices
        if d.kind in (DeviceKind.CPU, DeviceKind.MEMORY)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load(folder: Path) -> dict[str, Any]:
    """What was kept; empty when there is nothing, or nothing that can be used."""
    try:
        with (folder / FILE).open("rb") as file:
            data = json.loads(file.read(MAX_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) and data.get("version") == VERSION else {}


def add(devices: Sequence[Device], kept: dict[str, Any]) -> list[Device]:
    """The devices with what was measured on this machine; a measurement of another one is left out."""
    if not kept or kept.get("key") != key(devices):
        return list(devices)
    results: dict[DeviceKind, list[Throughput]] = {}
    for kind in (DeviceKind.CPU, DeviceKind.MEMORY):
        rows = kept.get(kind.value)
        for row in rows if isinstance(rows, list) else []:
            with contextlib.suppress(AIAssistantError):
                results.setdefault(kind, []).append(Throughput.from_dict(row))
    return [replace(d, throughput=(*d.throughput, *results.get(d.kind, []))) for d in devices]


def measure(devices: Sequence[Device], folder: Path, *, copy_bytes: int = COPY_BYTES) -> dict[str, Any]:
    """Measures what is not kept yet; a few seconds with every core busy, the first time.

    Args:
        devices: all of this machine's, as of `detect`.
        folder: where the result is kept; it must exist.
        copy_bytes: how much is copied, in all; twice that is taken for a moment.

    Raises:
        InvalidConfig: nothing can be kept in the folder.
    """
    kept = load(folder)
    if kept.get("key") == key(devices):
        return kept
    threads = len(os.sched_getaffinity(0))
    memory = bandwidth_gb_s(threads, copy_bytes)
    rows: dict[str, list[Throughput]] = {
        DeviceKind.MEMORY.value: [
            Throughput(round(memory, 1), "GB/s", "", Source.MEASURED, f"copies by {threads} threads, read and written")
        ]
    }
    if tflop_s := product_tflop_s():
        how = f"matrix product of {SIDE}³ by onnxruntime"
        rows[DeviceKind.CPU.value] = [Throughput(tflop_s, "TFLOP/s", "fp32", Source.MEASURED, how)]
    data: dict[str, Any] = {"version": VERSION, "key": key(devices)}
    data |= {kind: [row.to_dict() for row in found] for kind, found in rows.items()}
    _keep(folder, data)
    return data


def bandwidth_gb_s(threads: int, nbytes: int) -> float:
    """Copies by several threads at once; the best of some rounds, since others only ever slow them down.

    Args:
        nbytes: of all that is copied from, and as much again that is copied to.
    """
    each = max(4096, nbytes // max(1, threads))
    pairs = [(ctypes.create_string_buffer(each), ctypes.create_string_buffer(each)) for _ in range(max(1, threads))]
    for target, source in pairs:
        # Pages exist once they are written to; all of one zero page would be read from the cache.
        ctypes.memset(source, 1, each)
        ctypes.memset(target, 2, each)
    best = 0.0
    for _ in range(ROUNDS):
        seconds = _together([partial(ctypes.memmove, target, source, each) for target, source in pairs])
        best = max(best, 2 * each * len(pairs) / seconds)
    return best / 1e9


def _together(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds from the start of the first to the end of the last, each on a thread of its own."""
    gate = threading.Barrier(len(calls) + 1)

    def run(call: Callable[[], object]) -> None:
        gate.wait()
        call()

    running = [threading.Thread(target=run, args=(call,)) for call in calls]
    for one in running:
        one.start()
    gate.wait()
    start = time.perf_counter()
    for one in running:
        one.join()
    return max(time.perf_counter() - start, 1e-9)


def product_tflop_s() -> float:
    """fp32 TFLOP/s of a matrix product on all cores; 0 where onnxruntime is not installed or does not work."""
    # A process of its own: the library prints its complaints, and keeps its threads and memory for good.
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ai_assistant.hal.detect.product"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PRODUCT_TIMEOUT_S,
            check=True,
        )
        found = float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0
    return float(f"{found:.2g}") if 0 < found < MAX_TFLOP_S else 0.0


def _keep(folder: Path, data: dict[str, Any]) -> None:
    """Whole or not at all: others may be reading."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{FILE}.", delete=False) as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(folder / FILE)
    except OSError as error:
        raise InvalidConfig(
            f"the measurement cannot be kept in {folder}: {error.strerror}",
            hint="the folder must exist and be writable",
        ) from error
