"""Certifies a backend: runs the suite, twice for gold, and writes the report and the matrix."""

from __future__ import annotations

import hashlib
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ai_assistant.errors import InvalidConfig
from ai_assistant.hal.conformance import VERSION, matrix, suite
from ai_assistant.hal.conformance.case import Result
from ai_assistant.hal.conformance.levels import Level
from ai_assistant.hal.conformance.report import Report, signed
from ai_assistant.hal.conformance.run import Progress, Run, Settings, run, with_expected
from ai_assistant.hal.conformance.subject import is_path

EXPECTED = Path(__file__).parent / "expected"


def read_expected(path: Path) -> dict[str, str]:
    """A backend's list of expected failures: a TOML table `[expected]` of case = "why".

    Raises:
        InvalidConfig: it is none.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path.name} is no TOML: {error}") from error
    table = found.get("expected")
    if set(found) != {"expected"} or not isinstance(table, dict):
        raise InvalidConfig(f"{path.name} must have one table, [expected]")
    for case, reason in table.items():
        if not isinstance(reason, str) or not reason.strip() or len(reason) > 300:
            raise InvalidConfig(f"{path.name}: {case[:60]} needs its reason as a text")
        if not case.startswith("L3.") or case.startswith("L3.profile."):
            raise InvalidConfig(
                f"{path.name}: {case[:60]} cannot be expected to fail",
                hint="only operators outside of the mandatory profile can",
            )
    return table


def expected_of(name: str) -> dict[str, str]:
    """The list that comes with the product, for a backend of that name; empty where there is none."""
    path = EXPECTED / f"{name}.toml"
    return read_expected(path) if name.isidentifier() and path.is_file() else {}


def certify(
    settings: Settings,
    *,
    expected: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total, case: None,
) -> Report:
    """Run the suite up to a level; for gold twice.

    Args:
        expected: failures that are known; without it, those that come with the product.

    Raises:
        NotSupported, BackendFailed: as `run`.
        InvalidConfig: the list of expected failures names a case that does not exist.
    """
    path = Path(settings.backend) if is_path(settings.backend) else None
    runs = 2 if settings.level >= 4 else 1
    known = dict(expected if expected is not None else expected_of(settings.backend))
    names = {case.id for case in suite.cases(settings.level, path)}
    if settings.level >= 3 and (wrong := sorted(set(known) - names)):
        raise InvalidConfig(f"the list of expected failures names {wrong[0][:60]!r}, and there is no such case")

    def shifted(number: int) -> Progress:
        return lambda done, total, case: progress(number * total + done, runs * total, case)

    done = [run(settings, shifted(number)) for number in range(runs)]
    results, same = _merge(done)
    who = dict(done[0].backend)
    if path is not None:
        who |= {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Report(
        backend=who,
        device=done[0].device,
        host={
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        suite={"version": VERSION, "sha256": suite.digest()},
        seed=settings.seed,
        examples=settings.examples,
        reproduced=runs > 1 and same,
        made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        results=with_expected(results, known),
        expected=known,
    )


def _merge(runs: list[Run]) -> tuple[tuple[Result, ...], bool]:
    """The worse outcome of each case, and whether all runs had the same, for as many of the examples."""
    first, last = runs[0].results, runs[-1].results
    merged = []
    same = True
    for one, two in zip(first, last, strict=True):
        equal = (one.outcome, one.examples, one.supported) == (two.outcome, two.examples, two.supported)
        same = same and equal
        if not equal:
            worse = two if two.outcome.bad or not one.outcome.bad else one
            merged.append(replace(worse, detail=f"another outcome when it was run again; {worse.detail}"[:400]))
        else:
            merged.append(one)
    return tuple(merged), same


def write(report: Report, folder: Path, key: Ed25519PrivateKey | None) -> dict[str, Path]:
    """Write report.json, matrix.md and matrix.html into a folder, which is made. Gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": signed(report, key),
        "matrix.md": matrix.markdown(report, signed=key is not None).encode(),
        "matrix.html": matrix.html(report, signed=key is not None).encode(),
    }
    for name, data in contents.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(data)
        partial.replace(folder / name)
    return {name: folder / name for name in contents}


def wanted(level: str) -> Level:
    """Raises ValueError: there is no such level."""
    found = Level(level)
    if found is Level.NONE:
        raise ValueError(level)
    return found
