"""What can go wrong with a rebuild, each with what to do about it."""

from __future__ import annotations


class RebuildError(Exception):
    """The comparison could not be made; `hint` says what helps. A difference is a result, not an error."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
