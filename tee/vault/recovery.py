"""The recovery key between its making and its acknowledgement: two files in a folder of root's.

`key` is one line as systemd-cryptenroll prints it. `acknowledged` is the SHA-256 of the key that its owner has
written down (the key has 256 random bits, so its hash opens nothing); a later key is another one, and waits again.
Acknowledging is one rename, so a cut leaves it either done or not; what is left of `key` then goes at the next look.
The key is in no log, no error and no argument of a process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ai_assistant.errors import AIAssistantError, InternalError, InvalidRecoveryKey, NoRecoveryKey, NoSpace
from ai_assistant.tee import storage

log = logging.getLogger(__name__)

FOLDER = Path("var/lib/ai-assistant-recovery")
_KEY, _ACKNOWLEDGED, _PARTIAL = Path("key"), Path("acknowledged"), Path("acknowledged.partial")
_MAX_BYTES = 256
_LETTERS = "[cbdefghijklnrtuv]{8}(?:-[cbdefghijklnrtuv]{8}){7}"
"""256 bits in letters that lie in the same place on most keyboards."""
_FORM = re.compile(_LETTERS.encode() + b"\n?")
_ANYWHERE = re.compile(_LETTERS)


class Recovery:
    """The key below `root`. Needs the rights of the folder's owner; methods are neither concurrent nor long."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def pending(self) -> bool:
        """Whether something waits to be acknowledged, even if it turns out to be unusable."""
        try:
            self.key()
        except NoRecoveryKey:
            return False
        except AIAssistantError:
            return True
        return True

    def key(self) -> str:
        """The key that waits to be acknowledged.

        Raises:
            NoRecoveryKey: none does.
            InvalidRecoveryKey: damaged, or others could have read it.
            InternalError: the folder cannot be read.
        """
        with self._folder() as folder:
            return self._waiting(folder).decode()

    def acknowledge(self) -> None:
        """The owner has it: remember that, and remove the key.

        Raises:
            NoRecoveryKey, InvalidRecoveryKey
            NoSpace: the disk is full; the key waits as before.
            InternalError: the disk fails; the key waits as before.
        """
        with self._folder() as folder:
            digest = hashlib.sha256(self._waiting(folder)).hexdigest()
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(_PARTIAL, flags, 0o600, dir_fd=folder), "wb") as file:  # noqa: PTH123 - a descriptor
                    file.write(digest.encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(_PARTIAL, _ACKNOWLEDGED, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(_PARTIAL, dir_fd=folder)
                raise _failed(error) from None
            self._forget(folder)

    def tidy(self) -> None:
        """Finish what a power cut interrupted, and make the public flag say what is true."""
        if not self.pending():
            with contextlib.suppress(OSError):
                (self._root / storage.PENDING).unlink()

    def _waiting(self, folder: int) -> bytes:
        """The key's bytes, unless they are acknowledged."""
        try:
            content = storage.read_small(_KEY, _MAX_BYTES, folder=folder)
            found = os.stat(_KEY, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            raise NoRecoveryKey(
                "no recovery key waits to be acknowledged",
                hint="it is shown until somebody acknowledges it; how the storage is protected: ai-assistant storage",
            ) from None
        except ValueError as error:
            raise _invalid(str(error)) from None
        except OSError as error:
            raise _failed(error) from None
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise _invalid("others could have read it")
        if not _FORM.fullmatch(content):
            raise _invalid("it does not look like one")
        key = content.rstrip()
        if self._acknowledged(folder) == hashlib.sha256(key).hexdigest():
            self._forget(folder)
            raise NoRecoveryKey("the recovery key is acknowledged already")
        return key

    def _acknowledged(self, folder: int) -> str:
        try:
            return storage.read_small(_ACKNOWLEDGED, _MAX_BYTES, folder=folder).decode("ascii", "replace").strip()
        except (OSError, ValueError):
            return ""

    def _forget(self, folder: int) -> None:
        """Remove an acknowledged key. It is safe to fail: it is not shown any more, and the next look tries again."""
        try:
            os.unlink(_KEY, dir_fd=folder)
            os.fsync(folder)
            (self._root / storage.PENDING).unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove the acknowledged recovery key yet: %s", error.strerror)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[int]:
        try:
            fd = os.open(self._root / FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoRecoveryKey("no recovery key waits: this machine has made none") from None
        except OSError as error:
            raise _failed(error) from None
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
                raise _invalid("others could have changed it")
            yield fd
        finally:
            os.close(fd)


def redacted(text: str) -> str:
    """Somebody else's text without anything that could be a recovery key."""
    return _ANYWHERE.sub("(a recovery key)", text)


def _invalid(why: str) -> InvalidRecoveryKey:
    return InvalidRecoveryKey(
        f"the recovery key in /{FOLDER} cannot be used: {why}",
        hint="make another with systemd-cryptenroll --wipe-slot=recovery --recovery-key DEVICE, write it down, "
        "and remove this file",
    )


def _failed(error: OSError) -> AIAssistantError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace("the disk is full, so nothing has changed", hint="free some space and acknowledge again")
    why = error.strerror or "it cannot be used"
    return InternalError(f"/{FOLDER}: {why}", hint="is the disk failing, or mounted read-only? See the journal")
