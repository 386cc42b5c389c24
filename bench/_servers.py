"""The two sides of the serving bench: the product's daemon with its worker, and llama-server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench._load import Address
from bench.api_overhead import Side
from bench.harness import note

CONTEXT = 2048
_HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "hidden": 512, "vocabulary": 32_768},
    "0.5B": {"layers": 24, "width": 1024, "heads": 16, "kv_heads": 8, "hidden": 4096, "vocabulary": 65_536},
    "1B": {"layers": 20, "width": 2048, "heads": 32, "kv_heads": 8, "hidden": 5632, "vocabulary": 32_768},
    "7B": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14_336, "vocabulary": 32_768},
}
"""Llama-shaped, random weights: speed only."""


@dataclass(frozen=True, slots=True)
class Server:
    address: Address
    model: str
    pid: int
    """Of the process that answers; ours has the model in a child."""
    name: str = "ours"
    log: str = ""
    """Where it says what went wrong."""


def cache() -> Path:
    found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-assistant" / "bench"
    found.mkdir(parents=True, exist_ok=True)
    return found


def model_file(shape: str, kind: str = "Q4_0") -> Path:
    """A model of random weights, made once into the cache."""
    from tests.support.gguf_writer import write_llama

    path = cache() / f"random-{shape}-{kind}-v1.gguf"
    if not path.exists():
        note(f"serving: writing {path.name} (once)")
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            write_llama(partial, kind=kind, context=CONTEXT, **SHAPES[shape])
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


@contextmanager
def ours(model: Path, sequences: int, threads: int, context: int = CONTEXT, aside_bytes: int = 0) -> Iterator[Server]:
    """The daemon's service, its socket and a real worker. Caches and guessing as the peer has them: f16, none.

    Args:
        context: tokens per sequence; 0 is the product's own choice.
        aside_bytes: memory for states of idle conversations.
    """
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = Path(name)
        settings = folder / "etc/ai-assistant/config.d"
        settings.mkdir(parents=True)
        (settings / "bench.toml").write_text(
            f'[models]\nsequences = {sequences}\nthreads = {threads}\nkv_type = "f16"\nspeculative = "off"\n'
            f"spill_memory_bytes = {aside_bytes}\n[limits]\nstreams_per_caller = 256\ncalls_per_caller = 256\n"
        )
        log = cache() / "serving-ours.log"
        with Side("daemon", model, "--folder", name, "--context", str(context), log=log) as side:
            yield Server(folder / "api.sock", side.ask(None), side._child.pid, "ours", str(log))


def like_ours(sequences: int, context: int = CONTEXT) -> tuple[str, ...]:
    """Settings of llama-server with room for as many sequences of the same context as ours."""
    return ("-np", str(sequences), "-c", str(context * sequences))


@contextmanager
def llama_server(model: Path, settings: Sequence[str], threads: int) -> Iterator[Server]:
    """The peer with these settings; everything else, and all of it where there are none, is its default."""
    folder = peer()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        str(folder / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
        "-t", str(threads), "-tb", str(threads), *settings,
    ]  # fmt: skip
    path = cache() / "llama-server.log"
    with path.open("wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _await_health(child, port)
        yield Server(("127.0.0.1", port), "peer", child.pid, "llama-server", str(path))
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _await_health(child: subprocess.Popen[bytes], port: int, timeout_s: float = 600) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise SystemExit(f"serving: llama-server did not start; see {cache() / 'llama-server.log'}")


def peer(script: str = "llama-server") -> Path:
    """The folder with a peer; made by that script of this folder when the cache has none."""
    done = subprocess.run([str(_HERE / script)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"serving: the peer cannot be made: bench/{script}")
    return Path(done.stdout.strip().splitlines()[-1])


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def status_bytes(text: str, *names: str) -> int:
    """Sum of fields of /proc/PID/status, which are in KiB."""
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in text.splitlines()}
    return sum(int(found[name][0]) for name in names) << 10


def memory_of(pid: int, *names: str) -> int:
    """Fields of /proc/PID/status over a process and its children."""
    return sum(status_bytes(Path(f"/proc/{each}/status").read_text(), *names) for each in (pid, *children(pid)))


def cpu_s(stat: str) -> float:
    """User and system seconds from the text of /proc/PID/stat, whose second field may hold anything."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def python(*arguments: str, env: dict[str, str] | None = None) -> str:
    """Run a module of this checkout and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=_HERE.parent, env=os.environ | (env or {}),
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"serving: {' '.join(arguments)} failed with {done.returncode}; what it said is above")
    return done.stdout
