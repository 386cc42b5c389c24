"""Reading PE files, as far as signing and measuring go: sections, Authenticode hash, signatures.

Only the layout of 64-bit EFI programs is understood (PE32+); all offsets are checked against the file's length,
since a file may be cut short.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from image.signing.errors import ImageError

_PE32_PLUS = 0x20B
_SECURITY_DIRECTORY = 4


@dataclass(frozen=True)
class Section:
    """A named stretch of the file; ``size`` leaves out the padding."""

    name: str
    offset: int
    size: int


class PE:
    """One EFI program, in memory.

    Raises:
        ImageError: not a PE32+ file, or one that is cut short.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name
        try:
            self._parse()
        except struct.error:
            raise self._error("is cut short") from None

    @classmethod
    def read(cls, path: Path) -> PE:
        try:
            return cls(path.read_bytes(), path.name)
        except OSError as error:
            raise ImageError(f"cannot read {path}: {error.strerror}", "make image builds it") from None

    def _error(self, what: str) -> ImageError:
        return ImageError(f"{self.name} {what}", "build it again: make image")

    def _parse(self) -> None:
        if self.data[:2] != b"MZ":
            raise self._error("is no EFI program")
        (header,) = struct.unpack_from("<I", self.data, 0x3C)
        signature, _, count, _, _, _, optional_size = struct.unpack_from("<4sHHIIIH", self.data, header)
        optional = header + 24
        if signature != b"PE\0\0" or struct.unpack_from("<H", self.data, optional) != (_PE32_PLUS,):
            raise self._error("is no 64-bit EFI program")
        self._checksum = optional + 64
        (self._headers_size,) = struct.unpack_from("<I", self.data, optional + 60)
        (directories,) = struct.unpack_from("<I", self.data, optional + 108)
        if directories <= _SECURITY_DIRECTORY:
            raise self._error("has no room for a signature")
        self._security = optional + 112 + 8 * _SECURITY_DIRECTORY
        where, size = struct.unpack_from("<II", self.data, self._security)
        self.signature_size = int(size)
        if size and where + size > len(self.data):
            raise self._error("is cut short: its signature lies behind its end")
        self.sections: list[Section] = []
        self._raw: list[tuple[int, int]] = []
        for index in range(count):
            raw_name, virtual, _, size, offset = struct.unpack_from(
                "<8sIIII", self.data, optional + optional_size + 40 * index
            )
            name = raw_name.rstrip(b"\0").decode("ascii", errors="replace")
            if size and offset + size > len(self.data):
                raise self._error(f"is cut short: section {name} lies behind its end")
            self.sections.append(Section(name, offset, min(virtual, size)))
            if size:
                self._raw.append((offset, size))

    @property
    def signed(self) -> bool:
        return self.signature_size > 0

    def names(self) -> list[str]:
        return [section.name for section in self.sections]

    def find(self, name: str) -> bytes | None:
        """A section's content; None where there is no such section."""
        for section in self.sections:
            if section.name == name:
                return self.data[section.offset : section.offset + section.size]
        return None

    def content(self, name: str) -> bytes:
        found = self.find(name)
        if found is None:
            raise self._error(f"has no section {name}")
        return found

    def authenticode(self) -> bytes:
        """The SHA-256 that Secure Boot checks and the firmware measures into PCR 4.

        Everything but the checksum, the directory entry of the signature, and the signature: what signing changes.
        """
        total = hashlib.sha256(self.data[: self._checksum])
        total.update(self.data[self._checksum + 4 : self._security])
        total.update(self.data[self._security + 8 : self._headers_size])
        hashed = self._headers_size
        for offset, size in sorted(self._raw):
            total.update(self.data[offset : offset + size])
            hashed += size
        end = len(self.data) - self.signature_size
        if end > hashed:
            # Signers pad the file to eight bytes before they hash it, so the padding is in the file already.
            total.update(self.data[hashed:end])
        if not self.signed:
            total.update(bytes(-len(self.data) % 8))
        return total.digest()
