"""The file on disk that a worker keeps states of idle conversations in: without a name, gone with the worker."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def open_spill(directory: Path, size_bytes: int, kept_bytes: int) -> int | None:
    """A file of that size that nobody else can find, its space taken from the disk at once; None where it has no room.

    Args:
        kept_bytes: what stays free on the disk.
    """
    try:
        status = os.statvfs(directory)
        free = status.f_bavail * status.f_frsize
        if free - size_bytes < kept_bytes:
            log.warning(
                "no space to keep conversations on disk: %d bytes are free, of which %d stay free", free, kept_bytes
            )
            return None
        # Takes the name away at once, or never gives one where the file system can do that.
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            return os.dup(file.fileno())
    except OSError as error:
        log.warning("conversations are not kept on disk: %s: %s", directory, error.strerror)
        return None
