"""Runs the suite on one of the fakes, as it runs on a vendor's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ai_assistant.hal.conformance.case import Result
from ai_assistant.hal.conformance.run import Run, Settings, run

Certify = Callable[..., dict[str, Result]]


def fake_file(folder: Path, name: str) -> Path:
    path = folder / f"{name.lower()}.py"
    path.write_text(f"from tests.hal.conformance.fakes import {name}\n\nBACKEND = {name}\n")
    return path


@pytest.fixture
def fake(tmp_path: Path) -> Callable[[str], str]:
    return lambda name: str(fake_file(tmp_path, name))


@pytest.fixture
def outcomes(fake: Callable[[str], str]) -> Certify:
    def certify(name: str, *only: str, level: int = 2, limit_s: float = 60.0, examples: int = 8) -> dict[str, Result]:
        settings = Settings(fake(name), level=level, only=only, limit_s=limit_s, examples=examples, soak_s=0.5)
        made: Run = run(settings)
        return {result.case: result for result in made.results}

    return certify
