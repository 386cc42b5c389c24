"""How fast this machine reads and writes memory, which bounds how fast a model can write tokens."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ARRAY_BYTES = 64 << 20
"""Of each of three arrays; well beyond any cache of a small machine."""
ROUNDS = 5
_BLOCK = 1 << 15
"""Elements that are worked on at a time, so that what is written between the two steps stays in the cache."""


def measure(
    array_bytes: int = ARRAY_BYTES, rounds: int = ROUNDS, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes a second of a = b + s × c with all cores; the best of several rounds. Takes about a second.

    Raises:
        ImportError: numpy is missing.
    """
    import numpy as np

    count = max(_BLOCK, array_bytes // 4)
    threads = len(os.sched_getaffinity(0))
    b = np.ones(count, np.float32)
    c = np.ones(count, np.float32)
    a = np.empty(count, np.float32)
    a.fill(0)  # pages that were never written are all the same one

    def part(index: int) -> None:
        for at in range(index * count // threads, (index + 1) * count // threads, _BLOCK):
            end = min(at + _BLOCK, (index + 1) * count // threads)
            np.multiply(c[at:end], np.float32(3), out=a[at:end])
            np.add(a[at:end], b[at:end], out=a[at:end])

    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begin = clock()
            list(pool.map(part, range(threads)))
            best = min(best, clock() - begin)
    return 3 * 4 * count / max(best, 1e-9)


def measured_once(
    machine: str, cache: Path | None = None, make: Callable[[], float] = measure, *, again: bool = False
) -> float:
    """`measure`, remembered for this machine.

    Args:
        machine: what must be the same, such as processor and number of cores.
        again: measure although it is known.
        cache: file to remember it in; default: in $XDG_CACHE_HOME/ai-assistant.
    """
    path = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-assistant/bandwidth.json"
    try:
        values: Any = json.loads(path.read_bytes())
        known = values["bytes_per_s"]
        if not again and values["machine"] == machine and type(known) in (int, float) and 0 < known < math.inf:
            return float(known)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"machine": machine, "bytes_per_s": found}))
        new.replace(path)
    except OSError:
        pass  # Then it is measured again the next time.
    return found
