"""The Secure Boot variables: enrolment files for systemd-boot, and what the firmware measures of them into PCR 7.

PK, KEK and db all hold the one secure-boot certificate. Everything here is deterministic: a machine enrolled today
and one enrolled by a release of next year measure the same, as long as the certificate is the same.
"""

from __future__ import annotations

import hashlib
import struct
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from image.signing.errors import ToolError
from image.signing.keys import Key, openssl
from image.signing.tools import epoch, run, sign_message

# Who put the certificate there. Measured with it, so it never changes.
OWNER = UUID("b1f6a0f4-7c5d-4f0e-9d53-0b8a4f4e6a21")
GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
VENDOR = {"SecureBoot": GLOBAL, "PK": GLOBAL, "KEK": GLOBAL, "db": IMAGE_SECURITY}
ENROLLED = ("PK", "KEK", "db")
_PKCS7 = UUID("4aafd29d-68df-49ee-8aa9-347d375665a7")
# Non-volatile, at boot and run time, written with a signature that carries a time.
_ATTRIBUTES = 0x27


def event_digest(name: str, data: bytes) -> str:
    """SHA-256 of UEFI_VARIABLE_DATA: what an event of PCR 7 about a variable holds."""
    text = name.encode("utf-16-le")
    head = VENDOR[name].bytes_le + struct.pack("<QQ", len(name), len(data))
    return hashlib.sha256(head + text + data).hexdigest()


def certificate(key: Key) -> bytes:
    return openssl("x509", "-in", key.public, "-outform", "DER")


def signature_list(key: Key, scratch: Path) -> bytes:
    """The EFI signature list with the certificate: the content of PK, KEK and db alike."""
    der = scratch / "secure-boot.der"
    der.write_bytes(certificate(key))
    target = scratch / "secure-boot.esl"
    run(["sbsiglist", "--owner", str(OWNER), "--type", "x509", "--output", target, der])
    return target.read_bytes()


def _time() -> bytes:
    at = datetime.fromtimestamp(epoch(), UTC)
    return struct.pack("<HBBBBBBIhBB", at.year, at.month, at.day, at.hour, at.minute, at.second, 0, 0, 0, 0, 0)


def _value(der: bytes) -> tuple[int, int]:
    """Where the value of the DER element at the start of some bytes begins and ends."""
    if len(der) < 2:
        raise ToolError("openssl cms gave no DER")
    length, begin = der[1], 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(der[2:begin], "big")
    if begin + length > len(der):
        raise ToolError("openssl cms gave no whole DER")
    return begin, begin + length


def _signed_data(content_info: bytes) -> bytes:
    """SignedData without its ContentInfo: the UEFI specification wants it bare, and old firmware insists."""
    begin, end = _value(content_info)
    inside = content_info[begin:end]
    explicit = inside[_value(inside)[1] :]
    begin, end = _value(explicit)
    return explicit[begin:end]


def enrolment(key: Key, name: str, content: bytes) -> bytes:
    """An .auth file: EFI_VARIABLE_AUTHENTICATION_2 followed by the variable's content."""
    time = _time()
    message = name.encode("utf-16-le") + VENDOR[name].bytes_le + struct.pack("<I", _ATTRIBUTES) + time + content
    signature = _signed_data(sign_message(key, message))
    head = struct.pack("<IHH", 24 + len(signature), 0x0200, 0x0EF1)
    return time + head + _PKCS7.bytes_le + signature + content


def expected_events(key: Key, content: bytes) -> dict[str, object]:
    """The part about PCR 7 of measurements.json; ``content`` is the signature list."""
    variables = {"SecureBoot": b"\x01"} | dict.fromkeys(ENROLLED, content)
    # Programs are admitted by an entry of db, without the list's header: owner, then certificate.
    authority = OWNER.bytes_le + certificate(key)
    return {
        "secure_boot": True,
        "variables": [
            {"name": name, "guid": str(VENDOR[name]), "sha256": event_digest(name, data)}
            for name, data in variables.items()
        ],
        "authority": [{"name": "db", "guid": str(VENDOR["db"]), "sha256": event_digest("db", authority)}],
    }
