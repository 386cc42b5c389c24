"""What the firmware offers: Secure Boot and a TPM."""

from __future__ import annotations

import struct
from pathlib import Path

VARIABLES = Path("/sys/firmware/efi/efivars")
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
# EFI_SIGNATURE_LIST: type, size of the list, of its header, of each signature; each begins with its owner's GUID.
_LIST = struct.Struct("<16sIII")
TPM = Path("/dev/tpmrm0")


def _flag(name: str, variables: Path) -> bool | None:
    try:
        value = (variables / f"{name}-{_GLOBAL}").read_bytes()
    except OSError:
        return None
    # Four bytes of attributes, one of value.
    return value[4:5] == b"\1"


def secure_boot(variables: Path = VARIABLES) -> str:
    """ "on", "off", "setup" (no keys enrolled yet) or "unsupported" (no UEFI variables)."""
    on = _flag("SecureBoot", variables)
    if on is None:
        return "unsupported"
    if on:
        return "on"
    return "setup" if _flag("SetupMode", variables) else "off"


def tpm_works(device: Path = TPM) -> bool:
    """Whether there is a TPM 2.0 that the kernel's resource manager serves."""
    return device.is_char_device()


def only_our_keys(certificate: Path, variables: Path = VARIABLES) -> bool:
    """Whether Secure Boot is on, and `certificate` (PEM) is the one entry of each of PK, KEK and db."""
    if secure_boot(variables) != "on":
        return False
    # Loads OpenSSL, which no ordinary boot needs.
    import ssl

    try:
        der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
        for name, guid in (("PK", _GLOBAL), ("KEK", _GLOBAL), ("db", _SECURITY)):
            value = (variables / f"{name}-{guid}").read_bytes()[4:]
            _, size, header, each = _LIST.unpack_from(value)
            if size != len(value) or value[_LIST.size + header + 16 :] != der or each != 16 + len(der):
                return False
    except (OSError, ValueError, struct.error):
        return False
    return True
