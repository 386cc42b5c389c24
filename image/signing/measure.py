"""What a machine that boots a signed image will measure: measurements.json, format 1 (tee/ reads it).

PCR 11 is computed exactly. PCR 4 and 7 also hold what the firmware measures about itself, so their expected *events*
are listed. PCR 12 stays zero, because nothing may be added to the command line.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from image.signing import variables
from image.signing.errors import ImageError
from image.signing.keys import Key
from image.signing.pe import PE
from image.signing.tools import MEASURE, run, usable

FORMAT = 1
PHASES = (
    "enter-initrd",
    "enter-initrd:leave-initrd",
    "enter-initrd:leave-initrd:sysinit",
    "enter-initrd:leave-initrd:sysinit:ready",
)
# The stub's order, which is not the order in the file. It leaves out .pcrsig, which could not hold its own hash.
MEASURED = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".profile",
    ".dtbauto", ".hwids",
)  # fmt: skip
# In the file for others to read; the stub neither measures nor uses them.
UNMEASURED = (".pcrsig", ".sbom")
BOOT_LOADER = "EFI/BOOT/BOOTX64.EFI"


def measured(uki: PE) -> list[str]:
    """The measured sections of a UKI in the stub's order.

    Raises:
        ImageError: a section twice (profiles, device trees), whose PCR 11 would depend on the machine.
    """
    names = uki.names()
    for name in MEASURED:
        if names.count(name) > 1:
            raise ImageError(f"{uki.name} has {names.count(name)} sections {name}: its PCR 11 is not one value")
    return [name for name in MEASURED if name in names]


def _section_arguments(uki: PE, scratch: Path) -> list[str]:
    arguments = []
    for name in measured(uki):
        path = scratch / f"section{name}"
        path.write_bytes(uki.content(name))
        arguments.append(f"--{name[1:]}={path}")
    return arguments


def _options() -> list[str]:
    return ["--bank=sha256", "--json=short", *(f"--phase={phase}" for phase in PHASES)]


def pcr_signature(uki: PE, key: Key, scratch: Path) -> bytes:
    """The .pcrsig section: a signature for PCR 11 at each phase of a boot."""
    with usable(key) as used:
        command = [MEASURE, "sign", *_section_arguments(uki, scratch), *_options(), *used.systemd()]
        # Of a key in a token it wants a certificate rather than the public key: keys.load saw to it that they agree.
        command.append(f"--certificate={key.certificate}" if used.token else f"--public-key={key.public}")
        return run(command, environment=used.environment, pass_fds=used.descriptors).strip()


def pcr11(uki: PE, scratch: Path) -> dict[str, str]:
    """PCR 11 (SHA-256 bank) at each phase."""
    printed = json.loads(run([MEASURE, "calculate", *_section_arguments(uki, scratch), *_options()]))
    values = {str(each["phase"]): str(each["hash"]) for each in printed["sha256"]}
    return {phase: values[phase] for phase in PHASES}


def root_hash(uki: PE) -> str:
    """The verity root hash on a UKI's command line."""
    words = command_line(uki).split()
    found = [word.removeprefix("roothash=") for word in words if word.startswith("roothash=")]
    if len(found) != 1 or len(found[0]) != 64:
        raise ImageError(f"{uki.name} has no root hash on its command line", "Verity= in mkosi.conf")
    return found[0].lower()


def command_line(uki: PE) -> str:
    return uki.content(".cmdline").rstrip(b"\0").decode(errors="replace").strip()


def document(
    *, profile: str, version: str, architecture: str, uki_file: str, uki: PE, loader: PE, key: Key, scratch: Path
) -> bytes:
    """measurements.json for a signed UKI and boot loader."""
    kernel = PE(uki.content(".linux"), "the kernel in " + uki.name)
    programs = (("boot loader", BOOT_LOADER, loader), ("unified kernel image", f"EFI/Linux/{uki_file}", uki))
    content = {
        "format": FORMAT,
        "name": "ai-assistant",
        "profile": profile,
        "version": version,
        "architecture": architecture,
        "uki": uki_file,
        "root_hash": root_hash(uki),
        "command_line": command_line(uki),
        "pcr11": {
            "sha256": pcr11(uki, scratch),
            "sections": [
                {"name": name, "sha256": sha256(uki.content(name)).hexdigest()} for name in measured(uki)
            ],
        },
        "pcr4": [
            *({"what": what, "file": file, "sha256": pe.authenticode().hex()} for what, file, pe in programs),
            # With Secure Boot on, the stub answers for the kernel itself, and the firmware does not get to measure it.
            {
                "what": "kernel inside it",
                "sha256": kernel.authenticode().hex(),
                "secure_boot": False,
            },
        ],
        "pcr7": variables.expected_events(key, variables.signature_list(key, scratch)),
        "pcr12": {"sha256": "0" * 64},
    }  # fmt: skip
    return (json.dumps(content, indent=1) + "\n").encode()
