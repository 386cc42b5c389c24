"""Processes that cannot outlive their starter, and the one error of this package."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO


class VMError(Exception):
    """The machine did not do what was asked in time; the message ends with its console."""


PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def spawn(
    command: Sequence[str | Path],
    *,
    stdin: int | None = subprocess.DEVNULL,
    output: IO[bytes] | None = None,
    pass_fds: Iterable[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command`; the kernel kills it when this thread ends, however it ends."""
    starter = os.getpid()

    def end_with_starter() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != starter:  # it has ended already
            os._exit(1)

    # Not by setpriv(1), which leaves a moment between here and its own call.
    return subprocess.Popen(
        [str(each) for each in command],
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        pass_fds=tuple(pass_fds),
        preexec_fn=end_with_starter,
    )


def finish(process: subprocess.Popen[bytes], grace_s: float = 10.0) -> None:
    """End one process that `spawn` started, politely first; idempotent."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_path(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 20.0) -> None:
    wait_until(path.exists, f"{path.name} did not appear", process, timeout_s)


def wait_until(condition: Callable[[], bool], message: str, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Poll `condition`; VMError(message) when the time is up or the process is gone."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            raise VMError(message)
        time.sleep(0.05)


def tool(*command: str | Path, stdin: bytes | None = None) -> bytes:
    """Run a tool and return its output; its failure is a VMError with its last words."""
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise VMError(f"{Path(command[0]).name} ended with {done.returncode}: {words[-2000:]}")
    return done.stdout
