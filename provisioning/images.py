"""Look at an image file before it is written to anything: is it ours, and all of it?"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import NotAuthorized
from ai_assistant.provisioning import gpt, verity
from ai_assistant.provisioning.errors import InvalidImage
from ai_assistant.provisioning.writing import CHUNK, HEAD, Progress, silent

_MAKE = "make image builds one"
_COMPRESSED = {
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\xfd7zXZ\0": "xz -d",
    b"\x1f\x8b": "gunzip",
    b"PK\x03\x04": "unzip",
}
# Where a file system of each kind says what it is.
_MAGIC = {gpt.ESP: (510, b"\x55\xaa"), gpt.ROOT: (1024, b"\xe2\xe1\xf5\xe0"), gpt.ROOT_VERITY: (0, b"verity\0\0")}


@dataclass(frozen=True, slots=True)
class Image:
    """`root_hash` is what the boot loader's file names as its root; `label` names root and version."""

    path: Path
    size_bytes: int
    root_hash: str
    label: str
    table: gpt.Table


def inspect(path: Path) -> Image:
    """Look at tables, sizes and file systems, in no time.

    Raises:
        InvalidImage, NotAuthorized
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImage(f"{path} is no file", hint=_MAKE)
        with path.open("rb", buffering=0) as file:
            return _inspect(path, file.fileno(), status.st_size)
    except PermissionError as error:
        raise NotAuthorized(f"{path} may not be read", hint="run it as root, or change the file's owner") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidImage(f"{path} cannot be read: {reason}", hint=_MAKE) from error


def _inspect(path: Path, file: int, size: int) -> Image:
    def read(offset: int, count: int) -> bytes:
        return os.pread(file, count, offset)

    start = read(0, 8)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            raise InvalidImage(f"{path} is compressed", hint=f"unpack it first: {command} {path}")
    try:
        table = gpt.read(read, (512,))
    except gpt.NoTable as error:
        raise InvalidImage(f"{path} is no image of AI Assistant OS: it {error}", hint=_MAKE) from error
    if size < table.end:
        hint = "is it still being downloaded or built?"
        raise InvalidImage(f"{path} is truncated: {size:,} bytes of {table.end:,} are there", hint=hint)
    if size > table.end:
        hint = "is it a disk that was in use, or one image written over another?"
        raise InvalidImage(f"{path} has {size - table.end:,} bytes more than its partition table says", hint=hint)
    if not gpt.has_backup(read, table):
        raise InvalidImage(f"{path} is damaged: its second partition table is missing", hint=_MAKE)
    found = {}
    for kind, (offset, magic) in _MAGIC.items():
        parts = table.of_type(kind)
        if not parts:
            raise InvalidImage(
                f"{path} is no image of AI Assistant OS: it has no {gpt.NAMES[kind]} partition", hint=_MAKE
            )
        part = found[kind] = parts[0]
        if part.start < HEAD or part.end > size:
            raise InvalidImage(f"{path} is damaged: its {gpt.NAMES[kind]} partition is not inside it", hint=_MAKE)
        if read(part.start + offset, len(magic)) != magic:
            raise InvalidImage(
                f"{path} is damaged: its {gpt.NAMES[kind]} partition is empty or overwritten", hint=_MAKE
            )
    # The discoverable partitions specification: the two ids are the two halves of the root hash.
    root_hash = found[gpt.ROOT].uuid.hex + found[gpt.ROOT_VERITY].uuid.hex
    return Image(path, size, root_hash, found[gpt.ROOT].label, table)


def check(image: Image, progress: Progress = silent) -> None:
    """Check every block of the root against the root hash: a damaged download is found before a disk is erased.

    Raises:
        InvalidImage
    """
    parts = [image.table.of_type(kind)[0] for kind in (gpt.ROOT, gpt.ROOT_VERITY)]
    with image.path.open("rb", buffering=0) as file:
        data, tree = (reader(file.fileno(), each) for each in parts)
        try:
            verity.check(
                data, tree, bytes.fromhex(image.root_hash), lambda done, total: progress("checking", done, total)
            )
        except verity.Damaged as error:
            raise InvalidImage(f"{image.path}: its root {error}", hint=f"download it again, or {_MAKE}") from error
        except OSError as error:
            raise InvalidImage(f"{image.path} cannot be read: {error.strerror}") from error


def check_sum(image: Image, expected: str, progress: Progress = silent) -> None:
    """Compare the whole file's SHA-256 with what somebody published.

    Raises:
        InvalidImage
    """
    digest, done = hashlib.sha256(), 0
    with image.path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK):
            digest.update(data)
            done += len(data)
            progress("checking", done, image.size_bytes)
    if digest.hexdigest() != expected.strip().lower():
        hint = "download it again; was it perhaps signed or changed since?"
        raise InvalidImage(f"{image.path} has the SHA-256 {digest.hexdigest()}, not {expected}", hint=hint)


def reader(file: int, part: gpt.Partition) -> gpt.Read:
    """Reads inside a partition of an open file, and never behind it."""
    return lambda offset, count: os.pread(file, max(min(count, part.size - offset), 0), part.start + offset)
