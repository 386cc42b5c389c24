"""What the data of firmware events say: variables, images, tagged events, texts. Pure functions on hostile bytes.

Nothing here fails: data that are not what their event's type promises read as None, or as hexadecimal digits.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

from ai_assistant.tee.eventlog import Event, EventType

GLOBAL_VARIABLE = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY_DATABASE = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
_X509 = UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
_SHA256_LIST = UUID("c1c41626-504c-4092-aca9-41f936934328")
_MAX_TEXT = 300
_MAX_SIGNATURES = 100

# What systemd's loader and stub name with EV_EVENT_TAG.
TAGS = {
    0xF5BC582A: "loader.conf",
    0x6C46F751: "device tree add-on",
    0x49DFFE0F: "initrd add-on",
    0xDAC08E1A: "microcode add-on",
    0x13AED6DB: "profile of the unified kernel image",
}


# The PC Client profile allows both; a third says that the firmware failed.
SEPARATORS = (b"\0\0\0\0", b"\xff\xff\xff\xff")
_ENDS = {hashlib.sha256(data).digest() for data in (*SEPARATORS, b"\1\0\0\0")}
# What firmware says of itself in PCR 2 and 4; everything else there may be a program.
_KNOWN: dict[int, tuple[bytes, ...]] = {
    EventType.SEPARATOR: SEPARATORS,
    EventType.EFI_ACTION: (
        b"Calling EFI Application from Boot Option",
        b"Returning from EFI Application from Boot Option",
    ),
    EventType.OMIT_BOOT_DEVICE_EVENTS: (b"BOOT ATTEMPTS OMITTED",),
}


@dataclass(frozen=True, slots=True)
class Variable:
    """UEFI_VARIABLE_DATA."""

    guid: UUID
    name: str
    content: bytes


def variable(data: bytes) -> Variable | None:
    if len(data) < 32:
        return None
    characters, size = struct.unpack_from("<QQ", data, 16)
    if characters > _MAX_TEXT or 32 + 2 * characters + size != len(data):
        return None
    try:
        name = data[32 : 32 + 2 * characters].decode("utf-16-le")
    except UnicodeDecodeError:
        return None
    return Variable(UUID(bytes_le=data[:16]), name, data[32 + 2 * characters :]) if name.isprintable() else None


def image_path(data: bytes) -> str | None:
    """The device path of UEFI_IMAGE_LOAD_EVENT in words; empty for a program that was loaded from memory."""
    if len(data) < 32:
        return None
    size = struct.unpack_from("<Q", data, 24)[0]
    if size > len(data) - 32:
        return None
    return "/".join(part for part in _nodes(data[32 : 32 + size]) if part)


def from_firmware(data: bytes) -> bool:
    """Whether the device path says that the image lay in the firmware itself."""
    return (image_path(data) or "").startswith("firmware ")


def _nodes(path: bytes) -> Iterator[str]:
    at = 0
    while at + 4 <= len(path):
        kind, subtype, size = struct.unpack_from("<BBH", path, at)
        if size < 4 or at + size > len(path) or kind == 0x7F:
            return
        content = path[at + 4 : at + size]
        match kind, subtype:
            case 4, 4:
                yield _utf16(content) or "?"
            case 4, (6 | 7) if len(content) == 16:
                yield f"firmware {UUID(bytes_le=content)}"
            case 4, 1 if len(content) == 38:
                yield f"partition {UUID(bytes_le=content[20:36])}"
            case 3, 12 | 24 | 11:
                yield {12: "IP network", 24: "HTTP", 11: "network"}[subtype]
            case 3, 5:
                yield "USB"
            case 3, 23:
                yield "NVMe"
            case 3, 18:
                yield "SATA"
        at += size


def ends_firmware(event: Event) -> bool:
    """Whether the digest is a separator's. What the log calls the event does not matter: who calls it something else
    wants what follows to look like the firmware's."""
    return event.digest in _ENDS


def firmwares(events: Sequence[Event]) -> int:
    """How many of a PCR's events come before its separator: the firmware's own, made before it started anything else.
    Without a separator, none are known to be."""
    return next((place for place, event in enumerate(events) if ends_firmware(event)), 0)


def harmless(event: Event) -> bool:
    """Whether a measurement in PCR 2 or 4 is certainly no program: the hash of words that firmware is known to say."""
    return event.genuine and is_text(event, *_KNOWN.get(event.type, ()))


def is_text(event: Event, *texts: bytes) -> bool:
    """Whether the data are one of these texts; some firmware ends them with a NUL."""
    return any(event.data in (each, each + b"\0") for each in texts)


def is_words(event: Event) -> bool:
    """Whether what was measured is a text, whichever: no program can be one."""
    return event.genuine and 0 < len(event.data) <= _MAX_TEXT and bool(_ascii(event.data))


def text(event: Event) -> str:
    """An event's data for a person: at most a line, never control characters."""
    data = event.data
    if event.type == EventType.EVENT_TAG and len(data) >= 8:
        tag, size = struct.unpack_from("<II", data)
        content = data[8 : 8 + size]
        return ": ".join(part for part in (TAGS.get(tag, ""), _words(content)) if part)
    found = variable(data) if event.type in _VARIABLES else None
    if found is not None:
        return found.name
    if event.type in _IMAGES:
        path = image_path(data)
        return clean("loaded from memory" if path == "" else path or _hex(data))
    return _words(data)


_VARIABLES = (
    EventType.EFI_VARIABLE_DRIVER_CONFIG,
    EventType.EFI_VARIABLE_BOOT,
    EventType.EFI_VARIABLE_AUTHORITY,
)
_IMAGES = (
    EventType.EFI_BOOT_SERVICES_APPLICATION,
    EventType.EFI_BOOT_SERVICES_DRIVER,
    EventType.EFI_RUNTIME_SERVICES_DRIVER,
)


def _words(data: bytes) -> str:
    for decoded in (_utf16(data) if b"\0" in data[:2] else "", _ascii(data)):
        if decoded:
            return decoded
    return _hex(data)


def _utf16(data: bytes) -> str:
    try:
        found = data.decode("utf-16-le").rstrip("\0")
    except UnicodeDecodeError:
        return ""
    return clean(found) if found.isprintable() else ""


def _ascii(data: bytes) -> str:
    try:
        found = data.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        return ""
    return clean(found) if found.isprintable() else ""


def clean(words: str) -> str:
    """Somebody's words on one line, without control characters, and not too many."""
    shown = "".join(c if c.isprintable() else "�" for c in words[:_MAX_TEXT])
    return shown if len(words) <= _MAX_TEXT else shown + "…"


def _hex(data: bytes) -> str:
    return data[:24].hex() + ("…" if len(data) > 24 else "")


def signatures(content: bytes) -> list[str]:
    """The entries of PK, KEK, db or dbx in words: certificates by their subject, hashes by their digits."""
    found: list[str] = []
    at = 0
    while at + 28 <= len(content) and len(found) < _MAX_SIGNATURES:
        kind = UUID(bytes_le=content[at : at + 16])
        size, header, each = struct.unpack_from("<III", content, at + 16)
        begin, end = at + 28 + header, at + size
        if size < 28 or end > len(content) or each <= 16 or begin > end:
            break
        for start in range(begin, min(end, begin + _MAX_SIGNATURES * each) - each + 1, each):
            found.append(_signature(kind, content[start + 16 : start + each]))
        at = end
    return found


def _signature(kind: UUID, data: bytes) -> str:
    if kind == _X509:
        return subject(data) or f"a certificate that cannot be read ({_hex(data)})"
    if kind == _SHA256_LIST:
        return f"hash {data.hex()}"
    return f"{kind}: {_hex(data)}"


def subject(der: bytes) -> str:
    """A certificate's subject and the beginning of its fingerprint; empty where it is none."""
    # Where nothing is to be explained, nothing of this is loaded.
    from cryptography import x509

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is an odd certificate is no news here
        try:
            name = clean(x509.load_der_x509_certificate(der).subject.rfc4514_string())
        except Exception:  # whatever a hostile certificate can make of a parser that is not ours
            return ""
    # Anybody can give a key any name.
    return f"{name} (SHA-256 {hashlib.sha256(der).hexdigest()[:16]}…)"
