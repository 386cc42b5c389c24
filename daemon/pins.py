"""Which models are pinned, kept over restarts in one small file of the state directory."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from ai_assistant.errors import InternalError

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20


class Pins:
    """Full names of pinned models. A file that cannot be read means no pins, and is replaced by the next change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = _read(path)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def set(self, name: str, pinned: bool) -> bool:
        """Add or take away a pin; whether that changed anything.

        Raises:
            InternalError: it cannot be written, and nothing has changed.
        """
        names = self._names | {name} if pinned else self._names - {name}
        if names == self._names:
            return False
        try:
            _write(self._path, names)
        except OSError as error:
            raise InternalError(
                f"the pin of {name} cannot be remembered: {error.strerror}",
                hint="`ai-assistant doctor` says whether the disk is full",
            ) from error
        self._names = names
        return True

    def discard(self, name: str) -> None:
        """The model is gone, and a later one of its name is another; a failure to write that is only logged."""
        try:
            self.set(name, False)
        except InternalError as error:
            self._names -= {name}
            log.warning("%s", error.message)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget pins of models that were removed while nobody looked."""
        for name in sorted(self._names - set(names)):
            log.warning("forgetting the pin of %s, which is no model any more", name)
            self.discard(name)


def _read(path: Path) -> frozenset[str]:
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, RecursionError) as error:
        log.error("cannot read which models are pinned: %s: %s", path, error)
        return frozenset()
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        log.error("cannot read which models are pinned: %s is no list of names", path)
        return frozenset()
    return frozenset(values)


def _write(path: Path, names: frozenset[str]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(json.dumps(sorted(names)).encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
