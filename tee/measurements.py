"""measurements.json, format 1: what a boot of an image measures. Read only after its signature holds.

Pure functions on bytes, for whoever verifies a boot. `image/signing/measure.py` writes the file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ai_assistant.tee.errors import BadSignature, InvalidMeasurements
from ai_assistant.tee.eventlog import DIGEST_BYTES, ZERO, extend

FORMAT = 1
MAX_FILE_BYTES = 1024 * 1024
MAX_SIGNATURE_BYTES = 4096
_MAX_ROWS = 256
_MAX_TEXT = 16 * 1024


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the unified kernel image, measured as its name and its content."""

    name: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Program:
    """An EFI program that the firmware starts; ``digest`` is its Authenticode hash. ``secure_boot`` says that it is
    measured only with Secure Boot on, or only with it off; None in both cases."""

    what: str
    file: str
    digest: bytes
    secure_boot: bool | None


@dataclass(frozen=True, slots=True)
class PublishedVariable:
    """``digest`` is that of the event's UEFI_VARIABLE_DATA."""

    name: str
    guid: UUID
    digest: bytes


@dataclass(frozen=True, slots=True)
class Measurements:
    """One release's expected measurements. ``pcr11`` is by phase path, as in ``enter-initrd:leave-initrd``."""

    name: str
    profile: str
    version: str
    architecture: str
    uki: str
    root_hash: str
    command_line: str
    pcr11: Mapping[str, bytes]
    sections: tuple[Section, ...]
    programs: tuple[Program, ...]
    secure_boot: bool
    variables: tuple[PublishedVariable, ...]
    authority: tuple[bytes, ...]
    pcr12: bytes

    def pcr11_at(self, phases: Sequence[str]) -> bytes:
        """PCR 11 of this image after some phases, the empty sequence included."""
        return _phases(sections_value(self.sections), phases)


def sections_value(sections: Sequence[Section]) -> bytes:
    """PCR 11 as systemd-stub leaves it: each section's name with its NUL, then the section's content."""
    value = ZERO
    for section in sections:
        value = extend(value, hashlib.sha256(section.name.encode() + b"\0").digest())
        value = extend(value, section.digest)
    return value


def _phases(value: bytes, phases: Sequence[str]) -> bytes:
    for phase in phases:
        value = extend(value, hashlib.sha256(phase.encode()).digest())
    return value


def check_signature(raw: bytes, signature: bytes, public_key: bytes) -> None:
    """Check the signature file (base64 of DER, ECDSA with SHA-256) of some bytes with a PEM public key.

    Raises:
        BadSignature: also for a key or a signature that is none.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(public_key)
    except Exception as error:  # the library has many kinds of its own for a key that is none
        raise BadSignature(
            "the release key is no public key", hint="it should be a PEM file, BEGIN PUBLIC KEY"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadSignature("the release key is no elliptic-curve key", hint="releases are signed with ECDSA P-256")
    hint = "take the measurements again from the release that you trust; compare versions and release key"
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise BadSignature("the signature of the measurements is too long", hint=hint)
    try:
        der = base64.b64decode(b"".join(signature.split()), validate=True)
    except binascii.Error as error:
        raise BadSignature("the signature of the measurements is not base64", hint=hint) from error
    try:
        key.verify(der, raw, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise BadSignature("the measurements are not signed by the release key, or were changed", hint=hint) from error


def load(raw: bytes, signature: bytes, public_key: bytes) -> Measurements:
    """Check the signature, then read.

    Raises:
        BadSignature, InvalidMeasurements
    """
    check_signature(raw, signature, public_key)
    return parse(raw)


def parse(raw: bytes) -> Measurements:
    """Read measurements.json; unknown keys are left alone. The signature is `check_signature`'s business.

    Raises:
        InvalidMeasurements: another format, something missing or of the wrong kind, or PCR 11 not that of the sections.
    """
    if len(raw) > MAX_FILE_BYTES:
        raise _invalid(f"measurements.json is larger than {MAX_FILE_BYTES // 1024} KiB")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _invalid("measurements.json is not JSON") from error
    top = _object(found, "the whole")
    if type(top.get("format")) is not int or top["format"] != FORMAT:
        raise InvalidMeasurements(
            f"measurements.json is of format {str(top.get('format'))[:20]}, and this program reads format {FORMAT}",
            hint="it belongs to another version: verify it with that version's ai-assistant",
        )
    pcr11, pcr7, pcr12 = (_object(top.get(name), name) for name in ("pcr11", "pcr7", "pcr12"))
    root_hash = _text(top, "root_hash").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", root_hash):
        raise _invalid("root_hash in measurements.json is not 64 hex digits")
    secure_boot = pcr7.get("secure_boot")
    if not isinstance(secure_boot, bool):
        raise _invalid("pcr7.secure_boot in measurements.json is neither true nor false")
    made = Measurements(
        name=_text(top, "name"),
        profile=_text(top, "profile"),
        version=_text(top, "version"),
        architecture=_text(top, "architecture"),
        uki=_text(top, "uki"),
        root_hash=root_hash,
        command_line=_text(top, "command_line"),
        pcr11={
            _text({"a phase": path}, "a phase"): _digest(value, "pcr11")
            for path, value in _object(pcr11.get("sha256"), "pcr11.sha256").items()
        },
        sections=tuple(
            Section(_text(row, "name"), _digest(row.get("sha256"), "a section")) for row in _rows(pcr11, "sections")
        ),
        programs=tuple(_program(row) for row in _rows(top, "pcr4")),
        secure_boot=secure_boot,
        variables=tuple(
            PublishedVariable(_text(row, "name"), _guid(row.get("guid")), _digest(row.get("sha256"), "a variable"))
            for row in _rows(pcr7, "variables")
        ),
        authority=tuple(_digest(row.get("sha256"), "an authority") for row in _rows(pcr7, "authority")),
        pcr12=_digest(pcr12.get("sha256"), "pcr12"),
    )
    _consistent(made)
    return made


def _consistent(made: Measurements) -> None:
    # The sections explain a difference of PCR 11: they must be what its values were made of.
    if not made.pcr11:
        raise _invalid("measurements.json has no value for PCR 11")
    for path, value in made.pcr11.items():
        if made.pcr11_at(path.split(":")) != value:
            raise _invalid(
                f"measurements.json contradicts itself: its sections do not lead to its PCR 11 at {path[:80]}"
            )
    names = {each.name for each in made.variables}
    if missing := {"SecureBoot", "PK", "KEK", "db"} - names:
        raise _invalid(f"measurements.json has no pcr7 variable {', '.join(sorted(missing))}")


def _program(row: Mapping[str, Any]) -> Program:
    state = row.get("secure_boot")
    if state is not None and not isinstance(state, bool):
        raise _invalid("secure_boot of a program in measurements.json is neither true nor false")
    return Program(_text(row, "what"), _text(row, "file", ""), _digest(row.get("sha256"), "a program"), state)


def _invalid(message: str) -> InvalidMeasurements:
    return InvalidMeasurements(message, hint="take measurements.json again from the release; image/sign writes it")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MAX_ROWS:
        raise _invalid(f"{what} of measurements.json is no object")
    return value


def _rows(parent: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = parent.get(name)
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_ROWS:
        raise _invalid(f"{name} in measurements.json is no list of 1 to {_MAX_ROWS} rows")
    return [_object(row, f"a row of {name}") for row in value]


def _text(parent: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = parent.get(name, default)
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not value.isprintable():
        raise _invalid(f"{name} in measurements.json is no line of text")
    return value


def _digest(value: Any, what: str) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise _invalid(f"the hash of {what} in measurements.json is not 64 hex digits")
    digest = bytes.fromhex(value)
    assert len(digest) == DIGEST_BYTES
    return digest


def _guid(value: Any) -> UUID:
    try:
        return UUID(value) if isinstance(value, str) else UUID(str(None))
    except ValueError as error:
        raise _invalid("the guid of a variable in measurements.json is none") from error
