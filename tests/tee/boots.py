"""Boots to verify: a firmware, a TPM and systemd in miniature, which measure as the real ones do and write their logs.

`Boot` is a good boot of a release; a tampered one is `replace(boot, …)`. PCRs are extended here while the log is
written, as a TPM does it, so that nothing of the code under test has a hand in them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

GLOBAL = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
DATABASE = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
OWNER = UUID("b1f6a0f4-7c5d-4f0e-9d53-0b8a4f4e6a21")
X509 = UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
PARTITION = UUID("1a6e4ed3-da1f-4c59-a8b7-771fe51a208a")
VENDORS = {"SecureBoot": GLOBAL, "PK": GLOBAL, "KEK": GLOBAL, "db": DATABASE, "dbx": DATABASE}
PHASES = ("enter-initrd", "leave-initrd", "sysinit", "ready")
ROOT_HASH = "ab" * 32
COMMAND_LINE = f"console=ttyS0 lockdown=integrity roothash={ROOT_HASH}"
UKI = "ai-assistant_0.1.0.efi"
NO_ACTION, SEPARATOR, TAG, IPL = 0x03, 0x04, 0x06, 0x0D
CONFIG, BOOT, APPLICATION, DRIVER, GPT, ACTION, AUTHORITY = (0x80000000 + each for each in (1, 2, 3, 4, 6, 7, 0xE0))


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


@cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public(name: str) -> bytes:
    return (
        key(name).public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def sign(raw: bytes, name: str = "release") -> bytes:
    return base64.b64encode(key(name).sign(raw, ec.ECDSA(hashes.SHA256()))) + b"\n"


@cache
def certificate(name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(
        subject, subject, key(name).public_key(), 1, datetime(2026, 1, 1, tzinfo=UTC), datetime(2046, 1, 1, tzinfo=UTC)
    )
    return made.sign(key(name), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def signature_list(*names: str) -> bytes:
    found = b""
    for name in names:
        der = certificate(name)
        found += X509.bytes_le + struct.pack("<III", 28 + 16 + len(der), 0, 16 + len(der)) + OWNER.bytes_le + der
    return found


def variable_data(name: str, content: bytes, vendor: UUID | None = None) -> bytes:
    guid = vendor or VENDORS[name]
    return guid.bytes_le + struct.pack("<QQ", len(name), len(content)) + name.encode("utf-16-le") + content


def admission(signer: str) -> bytes:
    return variable_data("db", OWNER.bytes_le + certificate(signer))


def device_path(file: str | None, *, firmware: bool = False) -> bytes:
    """Of a file on the boot partition or in the firmware; None for a program in memory."""
    path = b""
    if firmware:
        for subtype in (7, 6):
            path += struct.pack("<BBH", 4, subtype, 20) + GLOBAL.bytes_le
    elif file is not None:
        disk = struct.pack("<IQQ", 1, 2048, 1 << 20) + PARTITION.bytes_le + b"\2\2"
        name = file.encode("utf-16-le") + b"\0\0"
        path += struct.pack("<BBH", 4, 1, 4 + len(disk)) + disk + struct.pack("<BBH", 4, 4, 4 + len(name)) + name
    return path + struct.pack("<BBH", 0x7F, 0xFF, 4)


def image_event(file: str | None, *, firmware: bool = False) -> bytes:
    path = device_path(file, firmware=firmware)
    return struct.pack("<QQQQ", 0x1000, 0x2000, 0, len(path)) + path


@dataclass
class Tpm:
    """PCRs and the firmware's log, written at the same time."""

    banks: Mapping[int, int] = field(default_factory=lambda: {0x04: 20, 0x0B: 32})
    locality: int = 0

    def __post_init__(self) -> None:
        self.pcrs = dict.fromkeys(range(17), bytes(32)) | dict.fromkeys(range(17, 23), b"\xff" * 32) | {23: bytes(32)}
        self.pcrs[0] = bytes(31) + bytes([self.locality])
        self.log = header(self.banks)
        if self.locality:
            self.log += self.record(0, NO_ACTION, bytes(32), b"StartupLocality\0" + bytes([self.locality]))

    def record(self, pcr: int, kind: int, digest: bytes, data: bytes) -> bytes:
        digests = b"".join(
            struct.pack("<H", bank) + (digest if bank == 0x0B else bytes(size)) for bank, size in self.banks.items()
        )
        return struct.pack("<III", pcr, kind, len(self.banks)) + digests + struct.pack("<I", len(data)) + data

    def extend(self, pcr: int, digest: bytes) -> None:
        self.pcrs[pcr] = sha256(self.pcrs[pcr], digest)

    def measure(self, pcr: int, kind: int, data: bytes, digest: bytes | None = None) -> None:
        """Without a digest, the data themselves are measured."""
        digest = sha256(data) if digest is None else digest
        self.extend(pcr, digest)
        self.log += self.record(pcr, kind, digest, data)


def header(banks: Mapping[int, int]) -> bytes:
    content = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks))
    content += b"".join(struct.pack("<HH", *bank) for bank in banks.items()) + b"\0"
    return struct.pack("<II20sI", 0, NO_ACTION, bytes(20), len(content)) + content


@dataclass(frozen=True)
class Program:
    """``digest`` stands for an Authenticode hash; ``signer`` for the entry of db that admitted it."""

    file: str | None
    digest: bytes
    signer: str = "release"
    firmware: bool = False


LOADER = Program("\\EFI\\BOOT\\BOOTX64.EFI", sha256(b"loader"))
IMAGE = Program(f"\\EFI\\Linux\\{UKI}", sha256(b"uki"))
KERNEL = Program(None, sha256(b"kernel"))
SHELL = Program("\\EFI\\tools\\shell.efi", sha256(b"shell"), "Someone else")
SECTIONS = {
    ".linux": b"linux",
    ".osrel": b"ID=ai-assistant",
    ".cmdline": COMMAND_LINE.encode() + b"\0",
    ".initrd": b"initrd",
    ".uname": b"6.12",
    ".sbat": b"sbat",
    ".pcrpkey": b"pem",
}


@dataclass(frozen=True)
class Boot:
    secure_boot: bool = True
    setup_mode: bool = False
    keys: tuple[str, ...] = ("release",)
    firmware_programs: tuple[Program, ...] = ()
    actions: tuple[bytes, ...] = ()
    separator: bytes = bytes(4)
    programs: tuple[Program, ...] = (LOADER, IMAGE)
    kernel: Program = KERNEL
    late_drivers: tuple[Program, ...] = ()
    sections: Mapping[str, bytes] = field(default_factory=lambda: SECTIONS)
    added: tuple[tuple[int, str], ...] = ()
    command_line_added: tuple[str, ...] = ()
    phases: tuple[str, ...] = PHASES
    locality: int = 0
    exits_logged: bool = True

    def run(self) -> Tpm:
        """The firmware's part."""
        tpm = Tpm(locality=self.locality)
        tpm.measure(0, 0x08, "1.0".encode("utf-16-le") + b"\0\0")
        keys = b"" if self.setup_mode else signature_list(*self.keys)
        variables = {"SecureBoot": bytes([self.secure_boot]), "PK": keys, "KEK": keys, "db": keys, "dbx": b""}
        for name, content in variables.items():
            tpm.measure(7, CONFIG, variable_data(name, content))
        for said in self.actions:
            tpm.measure(7, ACTION, said)
        tpm.measure(7, SEPARATOR, self.separator)
        tpm.measure(2, DRIVER, image_event(None), sha256(b"option ROM"))
        tpm.measure(1, BOOT, variable_data("BootOrder", b"\0\0", GLOBAL))
        for program in self.firmware_programs:
            self._start(tpm, program)
        tpm.measure(4, ACTION, b"Calling EFI Application from Boot Option")
        for pcr in range(7):
            tpm.measure(pcr, SEPARATOR, bytes(4))
        tpm.measure(5, GPT, b"EFI PART")
        admitted: set[str] = set()
        for number, program in enumerate(self.programs):
            if self.secure_boot and program.signer not in admitted:
                admitted.add(program.signer)
                tpm.measure(7, AUTHORITY, admission(program.signer))
            self._start(tpm, program)
            if number == 0:
                tpm.measure(5, TAG, struct.pack("<II", 0xF5BC582A, 24) + "loader.conf".encode("utf-16-le") + b"\0\0",
                            sha256(b"timeout 0"))  # fmt: skip
                for driver in self.late_drivers:
                    tpm.measure(2, DRIVER, image_event(driver.file), driver.digest)
        for name, content in self.sections.items():
            title = name.encode("utf-16-le") + b"\0\0"
            tpm.measure(11, IPL, title, sha256(name.encode() + b"\0"))
            tpm.measure(11, IPL, title, sha256(content))
        for words in self.command_line_added:
            tpm.measure(12, IPL, words.encode("utf-16-le") + b"\0\0", sha256(words.encode("utf-16-le")))
        for pcr, words in self.added:
            tpm.measure(pcr, IPL, words.encode("utf-16-le") + b"\0\0", sha256(b"an archive"))
        if not self.secure_boot:  # with it on, the stub answers for the kernel, and the firmware does not see it
            self._start(tpm, self.kernel)
        tpm.measure(9, TAG, struct.pack("<II", 0x8F3B22EC, 13) + b"Linux initrd\0", sha256(b"initrd"))
        for exit_words in (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success"):
            if self.exits_logged:
                tpm.measure(5, ACTION, exit_words)
            else:
                tpm.extend(5, sha256(exit_words))
        return tpm

    def _start(self, tpm: Tpm, program: Program) -> None:
        tpm.measure(4, APPLICATION, image_event(program.file, firmware=program.firmware), program.digest)


@dataclass(frozen=True)
class Measured:
    """What a verifier gets."""

    log: bytes
    system_log: bytes
    pcrs: dict[int, bytes]


def system_record(pcr: int, words: bytes, kind: str = "phase", **more: Any) -> bytes:
    digests = [{"hashAlg": "sha1", "digest": "00" * 20}, {"hashAlg": "sha256", "digest": sha256(words).hex()}]
    content = {"string": words.decode(), "bootId": "0" * 32, "timestamp": 1, "eventType": kind}
    record = {"pcr": pcr, "digests": digests, "content_type": "systemd", "content": content, **more}
    return b"\x1e" + json.dumps(record).encode() + b"\n"


def measure(boot: Boot) -> Measured:
    """Boot it, up to its last phase."""
    tpm = boot.run()
    said = b""
    for pcr, words, kind in [
        *((11, phase, "phase") for phase in boot.phases),
        (15, "machine-id:0123456789abcdef0123456789abcdef", "machine-id"),
    ]:
        tpm.extend(pcr, sha256(words.encode()))
        said += system_record(pcr, words.encode(), kind)
    return Measured(tpm.log, said, dict(tpm.pcrs))


def pcr11(sections: Mapping[str, bytes], phases: Sequence[str]) -> str:
    value = bytes(32)
    for name, content in sections.items():
        for part in (name.encode() + b"\0", content):
            value = sha256(value, sha256(part))
    for phase in phases:
        value = sha256(value, sha256(phase.encode()))
    return value.hex()


def measurements(boot: Boot | None = None) -> dict[str, Any]:
    """measurements.json of a release, as image/sign writes it."""
    boot = boot or Boot()
    keys = signature_list(*boot.keys)
    variables = {"SecureBoot": b"\1", "PK": keys, "KEK": keys, "db": keys}
    loader, image = boot.programs
    return {
        "format": 1,
        "name": "ai-assistant",
        "profile": "production",
        "version": "0.1.0",
        "architecture": "x86-64",
        "uki": UKI,
        "root_hash": ROOT_HASH,
        "command_line": COMMAND_LINE,
        "pcr11": {
            "sha256": {":".join(PHASES[:n]): pcr11(boot.sections, PHASES[:n]) for n in range(1, 5)},
            "sections": [{"name": name, "sha256": sha256(data).hex()} for name, data in boot.sections.items()],
        },
        "pcr4": [
            {"what": "boot loader", "file": "EFI/BOOT/BOOTX64.EFI", "sha256": loader.digest.hex()},
            {"what": "unified kernel image", "file": f"EFI/Linux/{UKI}", "sha256": image.digest.hex()},
            {"what": "kernel inside it", "sha256": boot.kernel.digest.hex(), "secure_boot": False},
        ],
        "pcr7": {
            "secure_boot": True,
            "variables": [
                {"name": name, "guid": str(VENDORS[name]), "sha256": sha256(variable_data(name, content)).hex()}
                for name, content in variables.items()
            ],
            "authority": [{"name": "db", "guid": str(DATABASE), "sha256": sha256(admission(boot.keys[0])).hex()}],
        },
        "pcr12": {"sha256": "0" * 64},
    }


def published(**changes: Any) -> bytes:
    return json.dumps(measurements() | changes, indent=1).encode() + b"\n"
