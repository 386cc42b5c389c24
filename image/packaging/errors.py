"""What can go wrong with packages, each with what to do about it."""

from __future__ import annotations


class PackagingError(Exception):
    """Something is wrong with the lock, the mirror folder or the archive; `hint` says what helps."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BadLock(PackagingError):
    """The lock cannot be read."""


class MirrorIncomplete(PackagingError):
    """The mirror folder lacks something that the lock names, or holds it damaged."""


class NoSpace(PackagingError):
    """The disk is full."""
