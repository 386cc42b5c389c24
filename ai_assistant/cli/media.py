"""Model files on removable media that are mounted, such as a USB stick."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILES = 1000
MAX_DEPTH = 6
_ESCAPE = re.compile(r"\\([0-7]{3})")
_SUFFIXES = (".gguf", ".onnx")


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A model file; `name` is relative to where its medium is mounted."""

    path: Path
    name: str
    size_bytes: int


def mounted(root: Path = Path("/")) -> list[Path]:
    """Where removable media are mounted."""
    try:
        lines = (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(" ")
        if len(fields) > 4 and _removable(root / "sys/dev/block" / fields[2]):
            found.append(root / _unescape(fields[4]).lstrip("/"))
    return list(dict.fromkeys(found))


def _removable(device: Path) -> bool:
    """Whether a block device, or the disk that it is a partition of, can be pulled out."""
    try:
        real = device.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    if any(re.fullmatch(r"usb\d+", part) for part in real.parts):
        return True
    for each in (real, real.parent):
        try:
            return (each / "removable").read_text().strip() == "1"
        except OSError:
            continue
    return False


def _unescape(text: str) -> str:
    """As in mountinfo, where a space is \\040."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)


def model_files(folders: list[Path]) -> list[MediaFile]:
    """Model files below these folders, sorted. Links are not followed: they would lead off the medium."""
    found = []
    for folder in folders:
        for path, size in _walk(folder, MAX_DEPTH):
            found.append(MediaFile(path, str(path.relative_to(folder)), size))
            if len(found) >= MAX_FILES:
                return sorted(found, key=lambda each: each.name)
    return sorted(found, key=lambda each: each.name)


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, int]]:
    try:
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError:
        return
    for entry in listed:
        try:
            if entry.is_dir(follow_symlinks=False):
                if depth and not entry.name.startswith("."):
                    yield from _walk(Path(entry.path), depth - 1)
            elif entry.is_file(follow_symlinks=False) and entry.name.lower().endswith(_SUFFIXES):
                yield Path(entry.path), entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
