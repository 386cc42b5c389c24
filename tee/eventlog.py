"""The firmware's event log (TCG2, crypto-agile) and systemd's own, and their replay into PCR values.

Pure functions on bytes, for whoever verifies a boot: this machine, or another one that was sent a log with a quote.
A log is hostile until its replay leads to the values of the TPM, and even then it vouches for its digests and their
order only. The type and the data beside a digest are somebody's word: the data until they hash to the digest
(`Event.genuine`), and the type for ever, since no TPM gets to see it. A verdict rests on digests, or on genuine data
that can be nothing else than what the type says (`eventdata.harmless`, `eventdata.firmwares`).

Sources: TCG PC Client Platform Firmware Profile 1.06, chapter 10; systemd's TPM2_PCR_MEASUREMENTS.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from ai_assistant.tee.errors import InvalidEventLog, InvalidPCRs, NoTPM

MAX_LOG_BYTES = 16 * 1024 * 1024
# The largest real logs have some hundreds of events.
MAX_EVENTS = 20_000
PCRS = 24
DIGEST_BYTES = 32
ZERO = bytes(DIGEST_BYTES)
_SHA256 = 0x000B
# TPM_ALG_ID to digest size; a log that says otherwise of a known one is none.
_SIZES = {0x0004: 20, _SHA256: 32, 0x000C: 48, 0x000D: 64, 0x0012: 32, 0x0027: 32, 0x0028: 48, 0x0029: 64}
_MAX_ALGORITHMS = 16
_SPEC_ID = b"Spec ID Event03\0"
_STARTUP_LOCALITY = b"StartupLocality\0"


class EventType(IntEnum):
    """The event types that a verdict depends on; a log may hold any other number."""

    NO_ACTION = 0x03
    SEPARATOR = 0x04
    EVENT_TAG = 0x06
    IPL = 0x0D
    OMIT_BOOT_DEVICE_EVENTS = 0x12
    EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EFI_VARIABLE_BOOT = 0x80000002
    EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EFI_BOOT_SERVICES_DRIVER = 0x80000004
    EFI_RUNTIME_SERVICES_DRIVER = 0x80000005
    EFI_GPT_EVENT = 0x80000006
    EFI_ACTION = 0x80000007
    EFI_VARIABLE_AUTHORITY = 0x800000E0


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement: ``digest`` (SHA-256) was extended into ``pcr``; ``data`` is what the log says about it."""

    number: int
    pcr: int
    type: int
    digest: bytes
    data: bytes = field(repr=False)

    @property
    def genuine(self) -> bool:
        """Whether the data is what was measured, not only words beside it. The type is not measured."""
        return hashlib.sha256(self.data).digest() == self.digest


@dataclass(frozen=True, slots=True)
class EventLog:
    """The events that extended a PCR, in order, and the locality from which the TPM was started."""

    events: tuple[Event, ...]
    startup_locality: int = 0

    def of(self, pcr: int) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.pcr == pcr)


@dataclass(frozen=True, slots=True)
class Extension:
    """One measurement made by the running system, as systemd logs it. ``text`` is only its word for it."""

    pcr: int
    digest: bytes
    text: str
    kind: str


class _Reader:
    """Reads little-endian fields; asks before it looks, so that a size in the log costs nothing."""

    def __init__(self, raw: bytes, what: str) -> None:
        self._raw, self._at, self._what = raw, 0, what

    @property
    def left(self) -> int:
        return len(self._raw) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _invalid(f"{self._what} ends at byte {len(self._raw)}, {count - self.left} bytes too early")
        found = self._raw[self._at : self._at + count]
        self._at += count
        return found

    def number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def padding(self) -> bool:
        """Whether nothing follows but the unused end of the firmware's table."""
        # No event begins so, which keeps the look at all the rest for the end.
        head = self._raw[self._at : self._at + 16]
        unused = head[:1]
        return head == unused * len(head) and unused in (b"", b"\0", b"\xff") and not self._rest().strip(unused)

    def _rest(self) -> bytes:
        return self._raw[self._at :]


def _invalid(message: str, hint: str = "") -> InvalidEventLog:
    return InvalidEventLog(
        message, hint=hint or "is it a whole copy of /sys/kernel/security/tpm0/binary_bios_measurements?"
    )


def parse(raw: bytes) -> EventLog:
    """Read a TCG2 event log.

    Raises:
        InvalidEventLog: truncated, too big, contradicting itself, not crypto-agile, or not an event log.
        NoTPM: it is one, but has no SHA-256 digests.
    """
    if len(raw) > MAX_LOG_BYTES:
        raise _invalid(f"the event log is larger than {MAX_LOG_BYTES // 1024**2} MiB")
    reader = _Reader(raw, "the event log")
    sizes = _header(reader)
    events: list[Event] = []
    locality: int | None = None
    number = 0
    while not reader.padding():
        number += 1
        if number > MAX_EVENTS:
            raise _invalid(f"the event log has more than {MAX_EVENTS} events")
        pcr, kind = reader.number("I"), reader.number("I")
        digest = _sha256(reader, sizes, number)
        data = reader.take(reader.number("I"))
        if kind == EventType.NO_ACTION:
            if data.startswith(_STARTUP_LOCALITY):
                if locality is not None or any(event.pcr == 0 for event in events):
                    raise _invalid(f"event {number} sets the start of PCR 0 when it is too late for that")
                locality = _locality(data, number)
            continue
        if pcr >= PCRS:
            raise _invalid(f"event {number} is for PCR {pcr}, and there are {PCRS}")
        events.append(Event(number, pcr, kind, digest, data))
    return EventLog(tuple(events), locality or 0)


def _header(reader: _Reader) -> dict[int, int]:
    """The first event, which is in the old SHA-1 format and names the digests of all others."""
    pcr, kind = reader.number("I"), reader.number("I")
    reader.take(20)
    content = _Reader(reader.take(reader.number("I")), "the event log's first event")
    if (pcr, kind) != (0, EventType.NO_ACTION) or content.take(min(16, content.left)) != _SPEC_ID:
        raise _invalid(
            "this is no crypto-agile event log: it does not begin with a Spec ID Event03",
            "a TPM 1.2, or firmware that only logs SHA-1, cannot be verified",
        )
    content.take(4 + 4)  # platform class; specification version, errata, size of UINTN
    count = content.number("I")
    if not 0 < count <= _MAX_ALGORITHMS:
        raise _invalid(f"the event log announces {count} digest algorithms")
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, size = content.number("H"), content.number("H")
        if algorithm in sizes or not 0 < size <= 64 or _SIZES.get(algorithm, size) != size:
            raise _invalid(f"the event log announces digests of {size} bytes for algorithm {algorithm:#06x}")
        sizes[algorithm] = size
    content.take(content.number("B"))
    if _SHA256 not in sizes:
        raise NoTPM(
            "the event log has no SHA-256 digests",
            hint="switch on the TPM's SHA-256 bank in the firmware setup, and boot again",
        )
    return sizes


def _sha256(reader: _Reader, sizes: Mapping[int, int], number: int) -> bytes:
    count = reader.number("I")
    if count > len(sizes):
        raise _invalid(f"event {number} has {count} digests, but the log announces {len(sizes)} algorithms")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = reader.number("H")
        if algorithm not in sizes or algorithm in digests:
            raise _invalid(f"event {number} has an unannounced or second digest of algorithm {algorithm:#06x}")
        digests[algorithm] = reader.take(sizes[algorithm])
    if _SHA256 not in digests:
        raise _invalid(f"event {number} has no SHA-256 digest")
    return digests[_SHA256]


def _locality(data: bytes, number: int) -> int:
    if len(data) != len(_STARTUP_LOCALITY) + 1 or data[-1] not in (0, 3, 4):
        raise _invalid(f"event {number} gives no possible locality of the TPM's start")
    return data[-1]


def parse_userspace(raw: bytes) -> tuple[Extension, ...]:
    """Read systemd's log, a sequence of JSON texts. A record cut off at the end is left out, as RFC 7464 asks.

    Raises:
        InvalidEventLog: too big, too many records, or something else than JSON.
    """
    if len(raw) > MAX_LOG_BYTES:
        raise _invalid(f"the system's measurement log is larger than {MAX_LOG_BYTES // 1024**2} MiB", _USERSPACE)
    records = raw.split(b"\x1e", MAX_EVENTS + 1)
    if len(records) > MAX_EVENTS + 1:
        raise _invalid(f"the system's measurement log has more than {MAX_EVENTS} records", _USERSPACE)
    if records[0].strip():
        raise _invalid("the system's measurement log does not begin with a record separator", _USERSPACE)
    whole = [record for record in records[1:] if record.endswith(b"\n")]
    return tuple(found for number, each in enumerate(whole, 1) if (found := _extension(each, number)) is not None)


_USERSPACE = "is it a whole copy of /run/log/systemd/tpm2-measure.log?"


def _extension(record: bytes, number: int) -> Extension | None:
    try:
        found = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"record {number} of the system's measurement log is not JSON", _USERSPACE) from error
    pcr = found.get("pcr") if isinstance(found, dict) else None
    if pcr is None:
        return None  # an NV index: newer versions of systemd measure into those too
    content = found.get("content")
    words: dict[str, object] = content if isinstance(content, dict) else {}
    text, kind = words.get("string"), words.get("eventType")
    digests = found.get("digests")
    values = [
        each.get("digest")
        for each in (digests if isinstance(digests, list) else [])
        if isinstance(each, dict) and each.get("hashAlg") == "sha256"
    ]
    try:
        (value,) = values
        digest = bytes.fromhex(str(value))
        if type(pcr) is not int or not 0 <= pcr < PCRS or len(digest) != DIGEST_BYTES:
            raise ValueError(value)
    except (TypeError, ValueError) as error:
        raise _invalid(
            f"record {number} of the system's measurement log has no PCR, or no one SHA-256 digest", _USERSPACE
        ) from error
    return Extension(pcr, digest, text if isinstance(text, str) else "", kind if isinstance(kind, str) else "")


def extend(value: bytes, digest: bytes) -> bytes:
    """What the TPM does with a measurement."""
    return hashlib.sha256(value + digest).digest()


def replay(log: EventLog, extensions: Iterable[Extension] = ()) -> dict[int, bytes]:
    """The values of PCR 0 to 15 that the logs lead to. The running system's log counts from PCR 8 on only: those
    below are the firmware's, and what anybody else adds to them is for the verdict to find."""
    values = dict.fromkeys(range(16), ZERO)
    values[0] = bytes(DIGEST_BYTES - 1) + bytes([log.startup_locality])
    for event in log.events:
        if event.pcr in values:
            values[event.pcr] = extend(values[event.pcr], event.digest)
    for each in extensions:
        if 8 <= each.pcr < 16:
            values[each.pcr] = extend(values[each.pcr], each.digest)
    return values


def parse_pcrs(raw: bytes) -> dict[int, bytes]:
    """Read PCR values from JSON, ``{"0": "<64 hex digits>", ...}``; PCR 0 to 15 must be there.

    Raises:
        InvalidPCRs
    """
    hint = 'it should read {"0": "<64 hex digits>", ...}, of the SHA-256 bank; --save writes such a file'
    try:
        found = json.loads(raw)
        values = {int(name): bytes.fromhex(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidPCRs("the PCR values are not JSON of hex digits by PCR number", hint=hint) from error
    if not set(range(16)) <= set(values) or any(len(value) != DIGEST_BYTES for value in values.values()):
        raise InvalidPCRs("PCR 0 to 15 with 32 bytes each are not all there", hint=hint)
    return {pcr: value for pcr, value in values.items() if 0 <= pcr < PCRS}
