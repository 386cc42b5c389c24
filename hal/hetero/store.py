"""What was measured, kept on disk: one file per device, backend version and driver."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from ai_assistant.hal.contract import Context

FORMAT = 1
MAX_BYTES = 16 << 20
MAX_ENTRIES = 50_000
MAX_SECONDS = 1e6


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/ai-assistant/hal-costs`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ai-assistant" / "hal-costs"


def key(context: Context, version: str) -> str:
    """What measurements belong to: any change of it starts anew.

    Args:
        version: of the backend. The device's name has the driver's version where the backend knows it; the kernel's
            release stands for the drivers that are in it.
    """
    device = context.device
    return "\n".join((version, device.id, device.name, device.kind, device.hal_id, os.uname().release))


class Store:
    """A table of numbers by text. What is damaged counts as not there; a disk that cannot be written is no error."""

    def __init__(self, identity: str, folder: Path | None = None) -> None:
        digest = hashlib.sha256(identity.encode(errors="replace")).hexdigest()[:32]
        self._identity = identity
        self._path = (folder or default_folder()) / f"{digest}.json"
        self._table = self._read()
        self._changed = False

    def get(self, name: str) -> tuple[float, ...] | None:
        return self._table.get(name)

    def put(self, name: str, *numbers: float) -> None:
        if len(self._table) < MAX_ENTRIES and _sound(numbers):
            self._table[name] = tuple(numbers)
            self._changed = True

    def __len__(self) -> int:
        return len(self._table)

    def save(self) -> None:
        """Replace the file as a whole: a reader sees the old one or the new one."""
        if not self._changed:
            return
        document = json.dumps({"format": FORMAT, "identity": self._identity, "table": self._table})
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(document)
                Path(name).replace(self._path)
                self._changed = False
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise

    def _read(self) -> dict[str, tuple[float, ...]]:
        try:
            if self._path.stat().st_size > MAX_BYTES:
                return {}
            found: Any = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("identity") != self._identity:
            return {}
        table = found.get("table")
        if not isinstance(table, dict) or len(table) > MAX_ENTRIES:
            return {}
        return {name: tuple(map(float, row)) for name, row in table.items() if isinstance(row, list) and _sound(row)}


def _sound(row: Any) -> bool:
    return len(row) <= 16 and all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) and each >= 0
        for each in row
    )
