"""What the socket costs: a bare loop over llama.cpp against the whole way through the product.

Ours: HTTP on the unix socket → the daemon's service → a worker process → the engine, streamed back as
server-sent events and read off the socket. The other: tokenise, `llama_decode`, argmax, in one process, on the
same 0.5 B model of random weights, with the same library, threads and batch size. Claims: time to the first
token grows by at most 3 ms, time per output token by at most 2 %. Two more rows hold the same answers against
the engine's own clock (`usage`): what is outside it is the socket, the service and the worker's pipe, and it is
visible even when other work on the machine moves the first two by more than the goal.

    tests/overlay bench api_overhead [--json] [--pairs N] [--tokens N]

Each prompt is new, so that neither side has it in its cache, and both sides get the same one. A connection is
made for every request, as a client without a pool would.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.harness import Row, adds_at_most, arguments, at_most, note, pairs, report

TTFT_MS = 3.0
TPOT_RATIO = 1.02
_CONTEXT = 2048
_BATCH = 512
_WARM_UP = 2
_MODEL = "half-billion-v1.gguf"


@dataclass(frozen=True, slots=True)
class Timing:
    """One generation, in seconds from the moment the prompt was there."""

    first: float
    last: float
    tokens: int
    engine_first: float = 0.0
    """By the engine's clock, from the request to the first token."""
    engine_decode: float = 0.0
    """By the engine's clock, from the first token to the last."""

    @property
    def ttft_ms(self) -> float:
        return self.first * 1000

    @property
    def tpot_ms(self) -> float:
        return (self.last - self.first) / (self.tokens - 1) * 1000


class Side:
    """A child process that has the model; it says "ready" and ends with its standard input.

    Args:
        log: where what it says to people goes; our own standard error if none.
    """

    def __init__(self, role: str, model: Path, *more: str, log: Path | None = None) -> None:
        with contextlib.ExitStack() as stack:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "bench.api_overhead", "--role", role, "--model", str(model), *more],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
                stderr=None if log is None else stack.enter_context(log.open("wb")),
            )  # fmt: skip
        if self._line() != "ready":
            raise SystemExit(f"api_overhead: the {role} side did not start" + (f"; see {log}" if log else ""))

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()

    def ask(self, message: Any) -> Any:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()
        return json.loads(self._line())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def over_the_socket(path: Path, model: str, prompt: str, tokens: int) -> Timing:
    """Ask as a client would, and look at the clock when bytes arrive."""
    body = json.dumps(
        {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    first = 0.0
    received = bytearray()
    begin = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(head.encode() + body)
        while True:
            piece = sock.recv(65536)
            now = time.perf_counter()
            if not piece:
                raise SystemExit(f"api_overhead: the stream broke off: {bytes(received[-500:])!r}")
            received += piece
            if not first and b"data: " in received:
                first = now - begin
            if b"data: [DONE]" in piece or b"data: [DONE]" in received[-64:]:
                break
    usage = json.loads(bytes(received).rpartition(b'"usage":')[2].partition(b"}\n")[0])
    if usage["completion_tokens"] != tokens:
        raise SystemExit(f"api_overhead: {usage['completion_tokens']} tokens came instead of {tokens}")
    return Timing(first, now - begin, tokens, usage["queue_s"] + usage["prefill_s"], usage["decode_s"])


def bare_loop(path: Path) -> Callable[[str, int], Timing]:
    """The other side: nothing between the library and the clock but what generating needs."""
    import numpy as np

    from ai_assistant.engines.native import default_threads, library, load_model

    lib = library()
    fd = os.open(path, os.O_RDONLY)
    model = load_model(fd, None)
    os.close(fd)
    vocabulary = lib.llama_model_get_vocab(model)
    size = lib.llama_vocab_n_tokens(vocabulary)
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = _CONTEXT
    parameters.n_batch = parameters.n_ubatch = _BATCH
    parameters.n_threads = parameters.n_threads_batch = default_threads()
    parameters.no_perf = True
    context = lib.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit("api_overhead: no context")
    memory = lib.llama_get_memory(context)
    tokens = (lib.llama_token * _CONTEXT)()
    text = ctypes.create_string_buffer(256)

    def run(prompt: str, count: int) -> Timing:
        lib.llama_memory_clear(memory, True)
        first = 0.0
        begin = time.perf_counter()
        raw = prompt.encode()
        used = lib.llama_tokenize(vocabulary, raw, len(raw), tokens, _CONTEXT, True, True)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, used)):
            raise SystemExit("api_overhead: llama_decode failed")
        for index in range(count):
            row = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(size,))
            tokens[0] = int(row.argmax())
            lib.llama_token_to_piece(vocabulary, tokens[0], text, len(text), 0, True)
            if not index:
                first = time.perf_counter() - begin
            if index < count - 1 and lib.llama_decode(context, lib.llama_batch_get_one(tokens, 1)):
                raise SystemExit("api_overhead: llama_decode failed")
        return Timing(first, time.perf_counter() - begin, count)

    return run


def serve_bare(model: Path) -> None:
    """Role "bare": answer JSON lines on standard input."""
    run = bare_loop(model)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, tokens = json.loads(line)
        timing = run(prompt, tokens)
        print(json.dumps([timing.first, timing.last, timing.tokens]), flush=True)


async def serve_daemon(model: Path, path: Path, folder: Path, context: int) -> None:
    """Role "daemon": the daemon's service and its socket, with real workers; only the bus is left out."""
    from ai_assistant.daemon.api.server import serve
    from tests.support.local_service import local_service

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    async with local_service(folder) as service:
        # The service takes the descriptor.
        entry = await service.open_model(os.open(model, os.O_RDONLY), "bench", context, ":1.0")
        await service.residency.load(entry)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(16)

        def read() -> None:
            if sys.stdin.readline():
                print(json.dumps(entry.name), flush=True)
            else:
                loop.remove_reader(sys.stdin)
                stop.set()

        loop.add_reader(sys.stdin, read)
        print("ready", flush=True)
        await serve(service, [listener], stop, lambda _peer, _scope: True)


def prepared_model() -> Path:
    """The 0.5 B model, made once into the cache."""
    from tests.support.gguf_writer import write_half_billion

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-assistant" / "bench"
    path = cache / _MODEL
    if not path.exists():
        note("api_overhead: writing a model of random weights (once)")
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        write_half_billion(partial, context=_CONTEXT)
        partial.replace(path)
    return path


def measure(count: int, tokens: int) -> list[Row]:
    model = prepared_model()
    with tempfile.TemporaryDirectory(prefix="api-overhead-") as name:
        folder = Path(name)
        path = folder / "api.sock"
        with Side("bare", model) as bare, Side("daemon", model, "--folder", name) as daemon:
            served = daemon.ask(None)

            def prompt(index: int) -> str:
                # The first token differs, so that no prefix is shared with an earlier one.
                return f"{chr(ord('A') + index % 26)}{index} the rain in the hills"

            def ours(index: int) -> Timing:
                return over_the_socket(path, served, prompt(index), tokens)

            def other(index: int) -> Timing:
                return Timing(*bare.ask([prompt(index), tokens]))

            for index in range(_WARM_UP):
                ours(1000 + index)
                other(1000 + index)
            note(f"api_overhead: {count} pairs of {tokens} tokens")
            mine, theirs = pairs(ours, other, count)
    return judge(mine, theirs)


def judge(mine: list[Timing], theirs: list[Timing]) -> list[Row]:
    """The rows, from the generations of both sides."""
    first = [each.ttft_ms for each in mine]
    ttft, added = adds_at_most("API adds to TTFT (ms)", first, [each.ttft_ms for each in theirs], TTFT_MS, "ms")
    inside = [each.engine_first * 1000 for each in mine]
    outside, beyond = adds_at_most("… of it outside the engine (ms)", first, inside, TTFT_MS, "ms")
    for what, found in (("", added), ("outside the engine ", beyond)):
        note(f"api_overhead: TTFT {what}{found.value:+.2f} ms, 95 % within [{found.low:.2f}, {found.high:.2f}]")
    if added.high - added.low > 4 * TTFT_MS:
        note("api_overhead: the bounds are far wider than the goal: other work disturbs this machine")
    per_token = [each.tpot_ms for each in mine]
    tpot = at_most("API adds to TPOT (ms)", per_token, [each.tpot_ms for each in theirs], TPOT_RATIO)
    decode = [each.engine_decode / (each.tokens - 1) * 1000 for each in mine]
    return [ttft, outside, tpot, at_most("… of it outside the engine, TPOT (ms)", per_token, decode, TPOT_RATIO)]


def main() -> int:
    parser = arguments(__doc__.partition("\n")[0] if __doc__ else "", default_pairs=15)
    parser.add_argument("--tokens", type=int, default=48, help="tokens per generation")
    parser.add_argument("--role", choices=("bare", "daemon"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=_CONTEXT, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role == "bare":
        serve_bare(chosen.model)
        return 0
    if chosen.role == "daemon":
        asyncio.run(serve_daemon(chosen.model, chosen.folder / "api.sock", chosen.folder, chosen.context))
        return 0
    return report(measure(chosen.pairs, chosen.tokens), as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
