"""Decoding beside other work: one process per core that never stops computing must not make it collapse.

    tests/overlay bench threads [--shape NAME] [--tokens N] [--tiny] [--json]

In one worker, one after the other: quiet, one hog per core, quiet again. Claims: ≥ 45 % of the quiet speed
remains; two seconds after the hogs have gone it is ≥ 0.97 × what it was; and the quiet speed is ≥ 0.97 × that
of a fixed count of threads. The hogs get half of the weight that the worker has, as CPUWeight=200 of its slice
does in the appliance (nice 3: 526 against 1024).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench._load import ask, words
from bench._servers import Server, model_file, ours
from bench.harness import Row, arguments, at_least, report

REMAINS, KEPT = 0.45, 0.97
BACK_S = 2.0
_NICE = 3


@contextmanager
def hogs() -> Iterator[None]:
    """One for each core that this process may use, in a session of its own; ended by their ids."""
    command = [sys.executable, "-c", "while True: pass"]
    started = []
    try:
        for _ in os.sched_getaffinity(0):
            started.append(subprocess.Popen(["nice", "-n", str(_NICE), *command], start_new_session=True))
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def speed(server: Server, index: int, tokens: int) -> float:
    """Decoded tokens per second of one generation."""
    found = asyncio.run(ask(server.address, server.model, words(index, 8), tokens))
    return (found.tokens - 1) / (found.last - found.first)


def measure(shape: str, pairs: int, tokens: int) -> list[Row]:
    from ai_assistant.engines.native import default_threads

    quiet, loaded, after = [], [], []
    with ours(model_file(shape), 1, default_threads()) as server:
        speed(server, 10_000, tokens)
        for index in range(pairs):
            quiet.append(speed(server, 3 * index, tokens))
            with hogs():
                loaded.append(speed(server, 3 * index + 1, tokens))
            # A generation goes on meanwhile: nothing is learnt while nothing is decoded.
            end = time.monotonic() + BACK_S
            while time.monotonic() < end:
                speed(server, 20_000 + index, 8)
            after.append(speed(server, 3 * index + 2, tokens))
    return [
        at_least("decode beside one hog per core (tok/s)", loaded, quiet, REMAINS),
        at_least(f"decode {BACK_S:g} s after they have gone (tok/s)", after, quiet, KEPT),
    ]


def against_fixed(shape: str, pairs: int, tokens: int) -> Row:
    """The same engine with and without the control of threads, in turn, on a quiet machine."""
    from ai_assistant.engines.contract import Finished, GenerateRequest, LoadOptions
    from ai_assistant.engines.llama import LlamaEngine
    from ai_assistant.engines.native import default_threads
    from ai_assistant.engines.threads import ThreadControl
    from bench.harness import pairs as in_turn

    class Fixed(ThreadControl):
        def for_step(self, tokens: int) -> int:
            return self.most

    options = LoadOptions(context_length=2048, sequences=1, kv_type="f16", speculative="off")
    with LlamaEngine.open(str(model_file(shape)), options) as engine:
        context = engine._scheduler._context
        controls = {True: ThreadControl(default_threads()), False: Fixed(default_threads())}

        def sample(index: int, controlled: bool) -> float:
            context._threads = controls[controlled]
            request = GenerateRequest(prompt=words(index, 8), max_tokens=tokens, temperature=0.0, ignore_eos=True)
            usage = next(each.usage for each in engine.generate(request) if isinstance(each, Finished))
            return (usage.completion_tokens - 1) / usage.decode_s

        sample(9999, True)
        sample(9998, False)
        found = in_turn(lambda index: sample(index, True), lambda index: sample(index + 5000, False), pairs)
    return at_least("quiet, against a fixed count of threads (tok/s)", *found, KEPT)


def main() -> int:
    parser = arguments(__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--shape", default="0.5B")
    parser.add_argument("--tokens", type=int, default=160, help="tokens per generation")
    parser.add_argument("--tiny", action="store_true", help="try the bench itself; the figures mean nothing")
    chosen = parser.parse_args()
    shape, tokens = ("tiny", 16) if chosen.tiny else (chosen.shape, chosen.tokens)
    count = chosen.pairs
    rows = [*measure(shape, 2 if chosen.tiny else count, tokens), against_fixed(shape, count, tokens)]
    return report(rows, as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
