"""Programs that a bench starts: a session of their own, ended with everything in it when the bench is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import NotSupported, Timeout

_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Done:
    """How a program ended.

    Args:
        first_s: from its start to its first line of output; to its end where it printed none.
    """

    status: int
    output: str
    error: str
    first_s: float
    seconds: float


def run(
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 1800.0,
    watch: Callable[[], None] | None = None,
) -> Done:
    """Run a program to its end. Ctrl-C here ends it and what it has started.

    Args:
        environment: all of it; default: ours.
        watch: is called about every second while it runs.

    Raises:
        NotSupported: there is no such program.
        Timeout: it took too long.
    """
    said: list[str] = []
    complained: list[str] = []
    firsts: list[float] = []
    begin = time.monotonic()
    try:
        child = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
            # Ctrl-C reaches this process alone, which ends the others in order.
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise NotSupported(
            f"{command[0]} is not installed", hint="run this in the tools tree: tests/overlay"
        ) from error
    assert child.stdout is not None
    assert child.stderr is not None
    out, err = child.stdout, child.stderr

    def listen() -> None:
        for line in out:
            if not firsts:
                firsts.append(time.monotonic() - begin)
            said.append(line)

    listeners = [threading.Thread(target=listen), threading.Thread(target=lambda: complained.extend(err))]
    for each in listeners:
        each.start()
    try:
        while True:
            try:
                status = child.wait(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() - begin > timeout_s:
                    raise Timeout(f"{Path(command[0]).name} did not end within {timeout_s:.0f} s") from None
                if watch is not None:
                    watch()
    except BaseException:
        _end(child)
        raise
    finally:
        for each in listeners:
            each.join()
        out.close()
        err.close()
    took = time.monotonic() - begin
    return Done(status, "".join(said), "".join(complained), firsts[0] if firsts else took, took)


def _end(child: subprocess.Popen[str]) -> None:
    """Ask the whole group, then force it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    child.wait()
