"""Write to a disk so that progress is honest, nothing stale stays, and what was written is read back.

A disk that is not written to the end must not look bootable, so `Target.begin` takes its partition tables away
first, and whoever writes puts the first `HEAD` bytes last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import AIAssistantError, NoSpace, NotAuthorized
from ai_assistant.provisioning.disks import Disk
from ai_assistant.provisioning.errors import DiskFailed, DiskInUse, InvalidImage, VerificationFailed

HEAD = 1 << 20  # the table's place: partitions start behind it
CHUNK = 4 << 20
# So much may wait in the page cache: what is reported as written is on the disk, within this.
SYNC = 32 << 20
# linux/fs.h
_BLKRRPART, _BLKZEROOUT = 0x125F, 0x127F
_ALIGNMENT = 4096
_ZEROS = bytes(CHUNK)
_GONE = (errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM)

Progress = Callable[[str, int, int], None]
"""(phase, bytes done, bytes in all)"""


def silent(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a source file and where it goes. Offsets and sizes are bytes."""

    source: Path
    source_offset: int
    offset: int
    size: int


class Target:
    """A disk, or a file that serves as one, open for writing and nobody else's while it is. A context manager.

    Raises:
        DiskInUse: the kernel says so, whatever /proc and /sys say.
        DiskFailed, NotAuthorized
    """

    def __init__(self, disk: Disk, *, exclusive: bool = True) -> None:
        self.disk = disk
        self.size = disk.size_bytes
        # On a block device this fails when anything is mounted from it, or a volume stands on it.
        flags = os.O_RDWR | os.O_CLOEXEC
        self._direct = -1
        try:
            self._fd = os.open(disk.path, flags | (os.O_EXCL if exclusive else 0))
        except PermissionError as error:
            raise NotAuthorized(f"{disk.path} may not be written to", hint="run it as root: sudo …") from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DiskInUse(f"{disk.path} is in use, says the kernel", hint="lsblk shows by what") from error
            raise DiskFailed(f"{disk.path} cannot be opened: {error.strerror}") from error
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        # udev looks at a disk whenever a writer closes it, but not while one holds this lock.
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._fd, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._fd = self._direct = -1

    def begin(self) -> None:
        """Take away both partition tables, the old file systems' first blocks with them."""
        if self._regular:
            # Everything becomes a hole: nothing old is left, and a sparse file stays one.
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self.size)
        for offset in (0, max(self.size - HEAD, 0)):
            self.write(_ZEROS[: min(HEAD, self.size)], offset)
        self.sync()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        left = memoryview(data)
        while left:
            done = os.pwrite(self._fd, left, offset)
            left, offset = left[done:], offset + done

    def zero(self, offset: int, size: int) -> None:
        """Make it read as zeros, by the device's own means where it has some. A discard would promise nothing."""
        if self._regular and self._is_hole(offset, size):
            return
        if not self._regular:
            try:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, size))
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise
        self.write(_ZEROS[:size], offset)

    def _is_hole(self, offset: int, size: int) -> bool:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + size
        except OSError as error:
            return error.errno == errno.ENXIO  # nothing but a hole to the end

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """From the disk itself, not from what the kernel remembers of the writing. `offset` is a multiple of 4096."""
        if self._direct < 0:
            # Some file systems cannot; there the cache is dropped instead.
            with contextlib.suppress(OSError):
                self._direct = os.open(self.disk.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        aligned = -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._direct >= 0 and offset % _ALIGNMENT == 0:
            # Such a read needs memory that starts at a page.
            with mmap.mmap(-1, aligned) as buffer, memoryview(buffer) as view:
                done = 0
                while done < size:
                    count = os.preadv(self._direct, [view[done:]], offset + done)
                    done += count
                    if not count or count % _ALIGNMENT:
                        break
                return bytes(view[: min(done, size)])
        os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        return os.pread(self._fd, size, offset)

    def reread_table(self) -> None:
        """Let the kernel see the new partitions; it does not where the old ones are in use."""
        if not self._regular:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._fd, _BLKRRPART)


def copy(target: Target, pieces: Sequence[Piece], progress: Progress = silent) -> list[bytes]:
    """Write the pieces; the digests of what was written, chunk by chunk, for `verify`.

    Raises:
        InvalidImage: a source is shorter than it should be, or cannot be read.
        OSError: the target's, for `explained`.
    """
    total = sum(piece.size for piece in pieces)
    digests, done, waiting = [], 0, 0
    progress("writing", 0, total)
    for offset, data in _chunks(pieces):
        if data == _ZEROS[: len(data)]:
            target.zero(offset, len(data))
        else:
            target.write(data, offset)
        digests.append(_digest(data))
        done, waiting = done + len(data), waiting + len(data)
        if waiting >= SYNC or done == total:
            target.sync()
            waiting = 0
            progress("writing", done, total)
    return digests


def verify(target: Target, pieces: Sequence[Piece], digests: Sequence[bytes], progress: Progress = silent) -> None:
    """Read back what `copy` wrote.

    Raises:
        VerificationFailed: with the first byte that differs.
    """
    total = sum(piece.size for piece in pieces)
    done = 0
    progress("verifying", 0, total)
    for (piece, inside, size), wanted in zip(_ranges(pieces), digests, strict=True):
        found = target.read(piece.offset + inside, size)
        if len(found) != size or _digest(found) != wanted:
            with piece.source.open("rb", buffering=0) as source:
                meant = os.pread(source.fileno(), size, piece.source_offset + inside)
            at = next(
                (i for i, (a, b) in enumerate(zip(found, meant, strict=False)) if a != b), min(len(found), len(meant))
            )
            if found == meant:
                raise VerificationFailed(
                    f"{piece.source} changed while it was written, or reads differently each time",
                    hint="is its own disk failing, or is it still being built or downloaded?",
                )
            raise VerificationFailed(
                f"{target.disk.path} does not hold what was written to it: "
                f"the first difference is at byte {piece.offset + inside + at:,}",
                hint="the disk is failing, or smaller than it claims: use another one",
            )
        done += size
        progress("verifying", done, total)


def _digest(data: bytes) -> bytes:
    return b"" if data == _ZEROS[: len(data)] else hashlib.sha256(data).digest()


def _ranges(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int, int]]:
    for piece in pieces:
        for inside in range(0, piece.size, CHUNK):
            yield piece, inside, min(CHUNK, piece.size - inside)


def _chunks(pieces: Sequence[Piece]) -> Iterator[tuple[int, bytes]]:
    for piece in pieces:
        try:
            source = os.open(piece.source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidImage(f"{piece.source} cannot be read: {error.strerror}") from error
        try:
            for _, inside, size in _ranges([piece]):
                try:
                    data = os.pread(source, size, piece.source_offset + inside)
                except OSError as error:
                    at = piece.source_offset + inside
                    raise InvalidImage(f"{piece.source} cannot be read at byte {at:,}: {error.strerror}") from error
                if len(data) != size:
                    raise InvalidImage(
                        f"{piece.source} became shorter while it was read", hint="is it still being made?"
                    )
                yield piece.offset + inside, data
        finally:
            os.close(source)


@contextlib.contextmanager
def explained(disk: Disk, again: str) -> Iterator[None]:
    """Around everything from the first write on: each failure says that the disk is unusable until `again`.

    Raises:
        NoSpace, DiskFailed, or the error that it was, with that said.
        KeyboardInterrupt: with the sentence as its argument.
    """
    unusable = f"{disk.path} is now unusable until it is {again} again"
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted: {unusable}") from error
    except AIAssistantError as error:
        raise type(error)(f"{error.message}; {unusable}", hint=error.hint) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpace(
                f"the file system of {disk.path} is full; {unusable}", hint="free some space there and try again"
            ) from error
        # A stick that was pulled out answers with all kinds of errors, but its node is gone.
        if error.errno in _GONE or not disk.path.exists():
            raise DiskFailed(f"{disk.path} was removed; {unusable}", hint="plug it in and try again") from error
        raise DiskFailed(
            f"{disk.path} failed: {error.strerror}; {unusable}", hint="dmesg may say more; use another disk or port"
        ) from error
