"""A machine's files in a folder: TPM, logs, EFI variables, boot partition."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ai_assistant.tee.evidence import KEY, Machine
from tests.tee import boots
from tests.tee.boots import COMMAND_LINE, ROOT_HASH, UKI, Boot

GUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
PART = str(boots.PARTITION)
TABLE = f"0 1024 verity 1 254:1 254:2 4096 4096 128 1 sha256 {ROOT_HASH} 00ff 1 panic_on_corruption\n"
MOUNTS = (
    "22 1 254:0 / / ro,relatime - erofs /dev/mapper/root ro\n",
    "30 22 0:30 / /efi rw - autofs systemd-1 rw\n",
    "31 22 259:1 / /efi ro - vfat /dev/nvme0n1p1 ro\n",
)


class World:
    """Files below a folder, and the commands that were run."""

    def __init__(self, root: Path, boot: Boot | None = None, *, mounts: Sequence[str] = MOUNTS) -> None:
        self.root = root
        self.ran: list[list[str]] = []
        self.mount: Callable[[Path], object] | None = None
        self.umount: Callable[[Sequence[str]], object] | None = None
        found = boots.measure(boot or Boot())
        for pcr, value in found.pcrs.items():
            self.write(f"sys/class/tpm/tpm0/pcr-sha256/{pcr}", value.hex().upper().encode() + b"\n")
        self.write("sys/kernel/security/tpm0/binary_bios_measurements", found.log)
        self.write("run/log/systemd/tpm2-measure.log", found.system_log)
        self.write("proc/cmdline", COMMAND_LINE.encode() + b"\n")
        self.write("proc/self/mountinfo", "".join(mounts).encode())
        self.write("sys/dev/block/254:0/dm/uuid", b"CRYPT-VERITY-0123-root\n")
        self.variable("LoaderDevicePartUUID", PART.upper())
        self.variable("StubImageIdentifier", f"\\EFI\\Linux\\{UKI.removesuffix('.efi')}+3-1.efi")
        self.write("dev/nvme0n1p1", b"")
        self.write("sys/class/block/nvme0n1p1/dev", b"259:1\n")
        (root / "dev/disk/by-partuuid").mkdir(parents=True)
        (root / "dev/disk/by-partuuid" / PART).symlink_to("../../nvme0n1p1")
        self.write(KEY, boots.public("release"))
        self.publish(root / "efi")

    def write(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def variable(self, name: str, text: str) -> None:
        raw = b"\6\0\0\0" + text.encode("utf-16-le") + b"\0\0"
        self.write(f"sys/firmware/efi/efivars/{name}-{GUID}", raw)

    def publish(self, esp: Path, raw: bytes | None = None, version: str = "0.1.0", signer: str = "release") -> None:
        raw = boots.published() if raw is None else raw
        folder = esp / "loader/ai-assistant"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"measurements-{version}.json").write_bytes(raw)
        (folder / f"measurements-{version}.json.sig").write_bytes(boots.sign(raw, signer))

    def remove(self, name: str) -> None:
        (self.root / name).unlink()

    def run(self, command: Sequence[str]) -> str:
        self.ran.append([*command])
        if command[0] == "dmsetup":
            return TABLE
        if command[0] == "mount" and self.mount is not None:
            self.mount(Path(command[-1]))
        if command[0] == "umount":
            if self.umount is not None:
                self.umount(command)
            for path in Path(command[-1]).iterdir():
                shutil.rmtree(path)
        return ""

    def machine(self, *, superuser: bool = True) -> Machine:
        return Machine(self.root, self.run, superuser=superuser)
