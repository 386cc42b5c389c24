"""How this machine's storage is protected, as the storage service wrote it down at this boot.

Everybody may read that record, and everybody says the same sentence of it: the daemon, the vault, `ai-assistant status`
and the console. A record that is missing or broken is no error but a state of its own: unknown, and why.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path("run/ai-assistant-storage")
STATE = FOLDER / "state.json"
PENDING = FOLDER / "recovery-pending"
"""There while a recovery key waits to be acknowledged; for those who may not see the key's own folder."""
MAX_BYTES = 64 << 10
_MAX_REASON = 300
Word = TypeVar("Word", bound=StrEnum)


class Encryption(StrEnum):
    TPM2 = "tpm2"
    NONE = "none"
    VOLATILE = "volatile"
    """In memory only: live from a stick, or a disk that is too small."""
    UNKNOWN = "unknown"


class SecureBoot(StrEnum):
    ON = "on"
    OFF = "off"
    SETUP = "setup"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"


_SECURE_BOOT = {
    SecureBoot.ON: "on",
    SecureBoot.OFF: "off",
    SecureBoot.SETUP: "off: the firmware has no keys yet (setup mode)",
    SecureBoot.UNSUPPORTED: "this firmware does not have it",
    SecureBoot.UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    encryption: Encryption
    reason: str = ""
    """Why it is not `tpm2`; empty when it is."""
    opened_by: str = ""
    """tpm2 or recovery-key, at this boot; empty where nothing had to be opened."""
    device: str = ""
    secure_boot: SecureBoot = SecureBoot.UNKNOWN
    tpm: bool = False

    def sentence(self) -> str:
        """The protection in one line, for people; begins with a small letter and has no full stop."""
        because = f": {self.reason}" if self.reason else ""
        match self.encryption:
            case Encryption.NONE:
                return f"not encrypted{because}"
            case Encryption.VOLATILE:
                return f"in memory only, and lost at power-off{because}"
            case Encryption.UNKNOWN:
                return f"unknown{because}"
        if self.opened_by == "recovery-key":
            return f"encrypted, opened by the recovery key because the TPM did not{because}"
        opened = "encrypted, opened by the TPM" if self.opened_by == "tpm2" else "encrypted, bound to the TPM"
        # Without Secure Boot, a program started instead of ours can make the TPM believe anything.
        return opened + because + ("" if self.secure_boot is SecureBoot.ON else "; weak, since Secure Boot is not on")

    def secure_boot_sentence(self) -> str:
        return _SECURE_BOOT[self.secure_boot]


def read(root: Path = Path("/")) -> Storage:
    """The record below `root`; never fails."""
    try:
        return parse(read_small(root / STATE, MAX_BYTES))
    except FileNotFoundError:
        return _unknown("nothing here looks after the storage, as in a container")
    except OSError as error:
        return _unknown(f"/{STATE}: {error.strerror or error}")
    except ValueError as error:
        return _unknown(f"/{STATE}: {error}")


def pending(root: Path = Path("/")) -> bool:
    """Whether a recovery key waits to be acknowledged, as far as everybody may know."""
    return os.path.lexists(root / PENDING)


def parse(data: bytes) -> Storage:
    """
    Raises:
        ValueError: that is no such record.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    encryption = _text(record, "encryption")
    if encryption not in set(Encryption) - {Encryption.UNKNOWN}:
        raise ValueError(f"unknown encryption {encryption!r}")
    secure_boot = _text(record, "secure_boot")
    tpm = record.get("tpm", False)
    if not isinstance(tpm, bool):
        raise ValueError("tpm is neither true nor false")
    return Storage(
        encryption=Encryption(encryption),
        reason=_text(record, "reason"),
        opened_by=_text(record, "opened_by"),
        device=_text(record, "device"),
        secure_boot=_word(secure_boot, SecureBoot.UNKNOWN),
        tpm=tpm,
    )


def told(encryption: object, reason: object, opened_by: object, secure_boot: object) -> Storage:
    """From what a service says; a word that only a later version knows, or none, is unknown."""
    return Storage(
        encryption=_word(encryption, Encryption.UNKNOWN),
        reason=reason if isinstance(reason, str) else "",
        opened_by=opened_by if isinstance(opened_by, str) else "",
        secure_boot=_word(secure_boot, SecureBoot.UNKNOWN),
    )


def read_small(path: Path, limit: int, *, folder: int | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes; a link is not followed, and nothing is waited for.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else, or larger.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("a symbolic link") from None
        raise
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("no regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return data


def _word(value: object, unknown: Word) -> Word:
    """A word as a member of the enumeration of `unknown`, or that."""
    kind = type(unknown)
    return kind(value) if isinstance(value, str) and value in set(kind) else unknown


def _text(record: dict[str, Any], key: str) -> str:
    """A short text on one line without control characters: it goes to consoles."""
    value = record.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    line = " ".join(value.split())
    return "".join(each if each.isprintable() else "\ufffd" for each in line)[:_MAX_REASON]


def _unknown(reason: str) -> Storage:
    return Storage(encryption=Encryption.UNKNOWN, reason=reason)
