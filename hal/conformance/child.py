"""The process in which cases run: python -m ai_assistant.hal.conformance.child, started by run.py only.

Its first line of input is a JSON object (`Job`); what it writes to its standard output are JSON lines:
{"ready": …} once, {"begin": case}, {"doing": text}, {"end": case, "outcome": …}. It ends when its input is closed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ai_assistant.errors import AIAssistantError, BackendFailed
from ai_assistant.hal.conformance import suite
from ai_assistant.hal.conformance.case import Case, CaseFailed, Note, Outcome, Result, Unsupported
from ai_assistant.hal.conformance.subject import Subject, is_path, load

DETAIL = 400
"""How many characters of a reason are kept: it is a backend's text."""


def tidy(text: str) -> str:
    """One line of printable text, without the folders of this machine."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    home = str(Path.cwd())
    return line.replace(home, ".")[:DETAIL] if len(home) > 1 else line[:DETAIL]


def judge(case: Case, subject: Subject) -> Result:
    """Run one case here."""
    try:
        note = case.run(subject) or Note()
    except Unsupported as reason:
        return Result(case.id, Outcome.UNSUPPORTED, tidy(str(reason)))
    except CaseFailed as reason:
        return Result(case.id, Outcome.FAILED, tidy(str(reason)))
    except AIAssistantError as error:
        return Result(case.id, Outcome.FAILED, tidy(f"{error.name}: {error.message}"))
    except Exception as error:
        return Result(case.id, Outcome.FAILED, tidy(f"{type(error).__name__}: {error}"))
    return Result(case.id, Outcome.PASSED, tidy(note.detail), note.examples, note.supported)


def describe(subject: Subject) -> dict[str, Any]:
    """Who is tested.

    Raises:
        AIAssistantError: there is no device, or none of that name.
        BackendFailed: probing raised something else.
    """
    backend = subject.backend
    try:
        probe = backend.probe()
    except AIAssistantError:
        raise
    except Exception as error:
        raise BackendFailed(f"probing failed: {type(error).__name__}: {error}") from error
    devices = [each for each in probe.devices if subject.device in ("", each.id)]
    device = devices[0] if devices else None
    return {
        "backend": {"name": tidy(str(backend.name)), "version": tidy(str(backend.version))},
        "device": None if device is None else {k: tidy(str(v)) for k, v in asdict(device).items()},
        "unavailable": tidy(probe.unavailable),
        "hint": tidy(probe.hint),
    }


def work(job: dict[str, Any], out: TextIO) -> None:
    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    spec = str(job["backend"])
    path = Path(spec) if is_path(spec) else None
    try:
        subject = Subject(
            load(spec),
            job["device"],
            path,
            job["seed"],
            job["examples"],
            job["soak_s"],
            lambda text: say(doing=tidy(text)[:200]),
        )
        known = {case.id: case for case in suite.cases(job["level"], path)}
        say(ready=describe(subject))
    except AIAssistantError as error:
        say(error=error.to_dict())
        return
    for name in job["cases"]:
        say(begin=name)
        say(end=name, **{key: value for key, value in asdict(judge(known[name], subject)).items() if key != "case"})


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(3)


def main() -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    # What a library prints to standard output must not get between the messages.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(job, out)
    out.flush()
    # Threads of a backend that hang must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
