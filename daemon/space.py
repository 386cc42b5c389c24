"""How much of the disk models may take.

The **reserve** (`models.disk_reserve_bytes`) is never for models: updates, logs and the daemon's own state need it.
Beside it, what running downloads still have to write is promised to them, so that two of them, or a download and an
import, do not count on the same bytes.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import NoSpace


@dataclass(eq=False, slots=True)
class Promise:
    """Bytes that somebody will still write; lower `left` as they are written."""

    left: int


class DiskSpace:
    """The file system that keeps the models.

    Args:
        directory: made when it is missing.
        reserve_bytes: what models leave free.
    """

    def __init__(self, directory: Path, reserve_bytes: int) -> None:
        self._directory = directory
        self.reserve_bytes = reserve_bytes
        self._promises: list[Promise] = []

    @property
    def kept_bytes(self) -> int:
        """What nobody else may count on: the reserve, and what was promised."""
        return self.reserve_bytes + sum(max(0, each.left) for each in self._promises)

    def room(self) -> int:
        """Bytes that somebody may begin to write now; never negative."""
        return max(0, self._free() - self.kept_bytes)

    def check_reserve(self) -> None:
        """Raises NoSpace when something has eaten into the reserve."""
        free = self._free()
        if free < self.reserve_bytes:
            raise NoSpace(
                f"{free} bytes are free, but {self.reserve_bytes} stay free for updates",
                hint="remove a model; what was downloaded is kept, and the next pull goes on",
            )

    @contextlib.contextmanager
    def promise(self, needed: int) -> Iterator[Promise]:
        """Count on `needed` bytes until the block ends.

        Raises:
            NoSpace: with the numbers.
        """
        room = self.room()
        if needed > room:
            raise NoSpace(
                f"{needed} bytes are needed; {self._free()} are free, of which {self.kept_bytes} stay free"
                " for updates and other downloads",
                hint="remove a model",
            )
        made = Promise(needed)
        self._promises.append(made)
        try:
            yield made
        finally:
            self._promises.remove(made)

    def _free(self) -> int:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return shutil.disk_usage(self._directory).free
