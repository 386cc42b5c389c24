"""What the firmware offers: Secure Boot and a TPM."""

from __future__ import annotations

from pathlib import Path

VARIABLES = Path("/sys/firmware/efi/efivars")
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
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
