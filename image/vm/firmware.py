"""OVMF: its code with or without Secure Boot, and a machine's own variable store."""

from __future__ import annotations

import shutil
from pathlib import Path

from image.vm.process import tool

FIRMWARE = Path("/usr/share/OVMF")


class Firmware:
    """The variables outlive power cycles; without keys in them Secure Boot is in setup mode."""

    def __init__(self, folder: Path, *, secure_boot: bool) -> None:
        self.secure_boot = secure_boot
        self.variables = folder / "variables.qcow2"
        if not self.variables.exists():
            # qcow2, since a snapshot of the machine must hold them too.
            tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", FIRMWARE / "OVMF_VARS_4M.fd", self.variables)

    def forget(self) -> None:
        """Back to the factory: no boot entries, no keys, setup mode."""
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", FIRMWARE / "OVMF_VARS_4M.fd", self.variables)

    def copy_to(self, folder: Path) -> None:
        shutil.copy(self.variables, folder / self.variables.name)

    def arguments(self) -> list[str]:
        """For QEMU. With Secure Boot only code in system management mode may write the variables."""
        code = FIRMWARE / ("OVMF_CODE_4M.secboot.fd" if self.secure_boot else "OVMF_CODE_4M.fd")
        arguments = [
            *("-machine", "q35,smm=on" if self.secure_boot else "q35"),
            *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}"),
            *("-drive", f"if=pflash,format=qcow2,unit=1,file={self.variables}"),
        ]
        if self.secure_boot:
            arguments += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
            arguments += ["-global", "ICH9-LPC.disable_s3=1"]
        return arguments
