"""What can go wrong while signing, by name.

SigningError
├── KeySetError      keys missing, incomplete, not belonging together, or not usable
├── ImageError       the artefact is no image, or not one of ours: truncated, no ESP, no UKI, two UKIs
├── NoSpaceError     on the ESP, or on the disk that the result goes to
└── ToolError        a program failed; its own words are in the message
"""

from __future__ import annotations


class SigningError(Exception):
    """One sentence for a person, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{type(self).__name__}: {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class KeySetError(SigningError):
    pass


class ImageError(SigningError):
    pass


class NoSpaceError(SigningError):
    pass


class ToolError(SigningError):
    pass
