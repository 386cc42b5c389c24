"""What has come of a download so far: a folder that outlives failures, cancellations and restarts.

``<models>/.pulls/<key>/`` holds ``pull.json``, which says what the parts belong to, and ``part-0``, ``part-1`` …
No name of a hub or URL becomes the name of a file here.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ai_assistant.daemon.fetch.client import RemoteFile
from ai_assistant.errors import DownloadFailed

log = logging.getLogger(__name__)

FOLDER = ".pulls"
_ABOUT = "pull.json"
_ABOUT_BYTES = 1 << 20
_LET_GO_S = 10.0


class Parts:
    """The parts of one download."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._validators: dict[str, str] = {}
        self._files: list[dict[str, Any]] = []

    def prepare(self, files: Sequence[RemoteFile]) -> None:
        """Keep what has come if it belongs to these files; otherwise begin with nothing.

        Raises:
            OSError
        """
        # An address may change from one answer to the next; the content must not.
        self._files = [{key: value for key, value in asdict(each).items() if key != "url"} for each in files]
        about = self._read()
        if about.get("files") == self._files:
            validators = about.get("validators")
            if isinstance(validators, dict) and all(isinstance(each, str) for each in validators.values()):
                self._validators = validators
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write()

    def path(self, index: int) -> Path:
        return self.folder / f"part-{index}"

    def size(self, index: int) -> int:
        """Bytes that have come of a file."""
        try:
            return self.path(index).lstat().st_size
        except FileNotFoundError:
            return 0

    def open(self, index: int) -> int:
        """A descriptor to fill the file with; the caller closes it.

        Raises:
            OSError
        """
        return os.open(self.path(index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def validator(self, index: int) -> str:
        return self._validators.get(str(index), "")

    def remember_validator(self, index: int, value: str) -> None:
        self._validators[str(index)] = value
        self._write()

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        try:
            with (self.folder / _ABOUT).open("rb") as file:
                values = json.loads(file.read(_ABOUT_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write(self) -> None:
        new = self.folder / f"{_ABOUT}.new"
        new.write_text(json.dumps({"files": self._files, "validators": self._validators}))
        new.replace(self.folder / _ABOUT)


def unfinished(folder: Path, running: Collection[str]) -> list[Path]:
    """Downloads that nobody continues now, the longest untouched first."""
    try:
        found = [each for each in folder.iterdir() if each.name not in running]
    except OSError:
        return []
    return sorted(found, key=_touched)


def sweep(folder: Path, running: Collection[str], older_s: float) -> None:
    """Delete downloads that nobody has continued for so long; 0: none."""
    for each in unfinished(folder, running):
        if older_s and time.time() - _touched(each) > older_s:
            log.info("removing an unfinished download that nobody continued")
            shutil.rmtree(each, ignore_errors=True)


def _touched(folder: Path) -> float:
    try:
        return max(each.lstat().st_mtime for each in (folder, *folder.iterdir()))
    except OSError:
        return 0.0


async def wait_until_alone(path: Path) -> None:
    """Until no process can write to the file any more: the one that filled it must have gone.

    Raises:
        DownloadFailed: it has not, after ten seconds.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    deadline = time.monotonic() + _LET_GO_S
    try:
        while True:
            try:
                # The kernel grants it only while nobody has the file open for writing.
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DownloadFailed("the downloading process does not end") from None
                await asyncio.sleep(0.05)
                continue
            except OSError:
                return  # A file system without leases.
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return
    finally:
        os.close(fd)
