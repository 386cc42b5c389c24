"""What a long run has done already, so that it goes on where it was stopped, and the figures that it prints."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


@dataclass
class Ledger:
    """A file of JSON, written anew after each test; without a path nothing is kept."""

    path: Path | None
    passed: dict[str, float] = field(default_factory=dict)  # seconds
    figures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_environment(cls) -> Self:
        """AI_ASSISTANT_LEDGER names the file; a broken one is begun again."""
        name = os.environ.get("AI_ASSISTANT_LEDGER")
        ledger = cls(Path(name) if name else None)
        if ledger.path is not None and ledger.path.exists():
            try:
                content = json.loads(ledger.path.read_text())
                ledger.passed = {str(key): float(value) for key, value in content["passed"].items()}
                ledger.figures = {str(key): str(value) for key, value in content["figures"].items()}
            except (ValueError, KeyError, AttributeError, TypeError):
                ledger.passed, ledger.figures = {}, {}
        return ledger

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"passed": self.passed, "figures": self.figures}, indent=1, sort_keys=True))
            partial.replace(self.path)


def seed() -> int:
    """AI_ASSISTANT_SEED; the same seed gives the same choices."""
    return int(os.environ.get("AI_ASSISTANT_SEED", "1"))
