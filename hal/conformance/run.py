"""Runs cases in a process of their own: a backend that crashes or hangs fails its case, not the certifier."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ai_assistant.errors import AIAssistantError, BackendFailed, from_name
from ai_assistant.hal.conformance import suite
from ai_assistant.hal.conformance.case import Case, Outcome, Result
from ai_assistant.hal.conformance.subject import is_path

LINE = 1 << 20
"""A longer message is a defect, and ends the process that sends it."""
STDERR = 2000
Progress = Callable[[int, int, str], None]
"""Told how many cases have ended, of how many, and the one that runs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run.

    Args:
        backend: a name, or the path of a shared library or Python file.
        device: its id; "" for the first one.
        level: 1 to 4.
        limit_s: how long an ordinary case may take.
        only: cases whose id starts so; everything when empty.
    """

    backend: str
    device: str = ""
    level: int = 4
    seed: int = 0
    examples: int = 20
    limit_s: float = 60.0
    soak_s: float = 10.0
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """What came out: who was tested, and how each case ended."""

    backend: dict[str, str]
    device: dict[str, str]
    results: tuple[Result, ...]


class _Child:
    """One process with the backend in it."""

    def __init__(self, job: dict[str, Any]) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(each or str(Path.cwd()) for each in sys.path))
        environment["PYTHONFAULTHANDLER"] = "1"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process is
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ai_assistant.hal.conformance.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._rest = b""
        self._ended: str | None = None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def message(self, limit_s: float) -> dict[str, Any] | None:
        """The next message; None when the process has ended.

        Raises:
            TimeoutError: it said nothing for so long.
        """
        stream: IO[bytes] | None = self._process.stdout
        assert stream is not None
        end = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                data = os.read(stream.fileno(), 65536)
                if not data or len(self._rest) > LINE:
                    return None
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def end(self) -> str:
        """Make sure that it has ended, and say in words what it died of. Idempotent."""
        if self._ended is not None:
            return self._ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its output is closed a moment before it has ended
        return self.kill()

    def kill(self) -> str:
        if self._ended is not None:
            return self._ended
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        self._errors.seek(0)
        last = self._errors.read(STDERR).decode(errors="replace").strip().splitlines()[-1:]
        self._errors.close()
        if code is not None and code < 0:
            self._ended = f"the process died of {signal.Signals(-code).name}"
        else:
            self._ended = f"the process ended with status {code}" + (f": {last[0][:200]}" if last else "")
        return self._ended


def run(settings: Settings, progress: Progress = lambda done, total, case: None) -> Run:
    """Run the suite on a backend.

    Raises:
        NotSupported: there is no such backend or device, or packages are missing.
        BackendFailed: it does not even load: it crashes, hangs, or raises.
    """
    path = Path(settings.backend) if is_path(settings.backend) else None
    cases = {case.id: case for case in suite.cases(settings.level, path)}
    wanted = [name for name in cases if not settings.only or name.startswith(settings.only)]
    results: dict[str, Result] = {}
    who: dict[str, Any] | None = None
    while (left := [name for name in wanted if name not in results]) or who is None:
        for kind, value in _pass(settings, left, lambda name: _limit(settings, cases[name])):
            if kind == "ready":
                who = who or value
            elif kind == "begin":
                progress(len(results), len(wanted), value)
            else:
                results[value.case] = value
    progress(len(results), len(wanted), "")
    return Run(who["backend"], who["device"], tuple(results[name] for name in wanted))


def _limit(settings: Settings, case: Case) -> float:
    return settings.limit_s * case.weight + (settings.soak_s if case.level == 4 else 0.0)


def _unavailable(who: dict[str, Any]) -> AIAssistantError:
    message = who["unavailable"] or "it has no such device"
    return from_name("NotSupported", f"{who['backend']['name']}: {message}", hint=who["hint"])


def _pass(settings: Settings, names: list[str], limit: Callable[[str], float]) -> Iterator[tuple[str, Any]]:
    """One process, until it has done everything, crashed or hung: gives what happened."""
    job = {
        "backend": settings.backend,
        "device": settings.device,
        "level": settings.level,
        "seed": settings.seed,
        "examples": settings.examples,
        "soak_s": settings.soak_s,
        "cases": names,
    }
    child = _Child(job)
    current, doing, moved = "", "", False
    try:
        while True:
            try:
                message = child.message(limit(current) if current else settings.limit_s)
            except TimeoutError:
                if not current:
                    raise BackendFailed(f"the backend does not load within {settings.limit_s:g} s") from None
                yield "end", Result(current, Outcome.HUNG, f"it did not end within {limit(current):g} s{doing}")
                return
            if message is None:
                if current:
                    yield "end", Result(current, Outcome.CRASHED, child.end() + doing)
                elif not moved:
                    raise BackendFailed(f"the backend does not load: {child.end()}")
                return
            if "error" in message:
                raise from_name(**message["error"])
            if "ready" in message:
                yield "ready", message["ready"]
                if not message["ready"]["device"]:
                    raise _unavailable(message["ready"])
                moved = not names
            elif "begin" in message:
                current, doing = str(message["begin"]), ""
                yield "begin", current
            elif "doing" in message:
                doing = f" at {message['doing']}"
            else:
                yield "end", _result(message)
                current, moved = "", True
            if moved and not current and (not names or message.get("end") == names[-1]):
                return
    finally:
        child.kill()


def _result(message: dict[str, Any]) -> Result:
    return Result(
        str(message["end"]),
        Outcome(message["outcome"]),
        str(message["detail"]),
        int(message["examples"]),
        int(message["supported"]),
    )


def with_expected(results: tuple[Result, ...], expected: dict[str, str]) -> tuple[Result, ...]:
    """Count failures that a backend's list names as expected, and passes that it names as unexpected.

    A crash or a hang is never expected.
    """
    changed = []
    for result in results:
        reason = expected.get(result.case)
        if reason is not None and result.outcome == Outcome.FAILED:
            result = replace(result, outcome=Outcome.EXPECTED, detail=f"{reason}: {result.detail}"[:400])
        elif reason is not None and result.outcome in (Outcome.PASSED, Outcome.UNSUPPORTED):
            result = replace(result, outcome=Outcome.UNEXPECTED, detail=f"the list says: {reason}"[:400])
        changed.append(result)
    return tuple(changed)
