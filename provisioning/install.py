"""Install the running system on another disk: its boot files, its root and the root's verity tree.

The other slot and /var are not copied: the new disk makes its own at its first boot, as every disk does. Root and
verity keep their ids, which are the root hash by which the initrd finds them; the disk and its boot partition get new
ones, since two boot partitions of one id would confuse a boot loader that sees both.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ai_assistant.errors import NotSupported
from ai_assistant.provisioning import esp, gpt, verity
from ai_assistant.provisioning.disks import Disk, Machine
from ai_assistant.provisioning.errors import DiskFailed, DiskInUse, VerificationFailed
from ai_assistant.provisioning.writing import (
    HEAD,
    Piece,
    Progress,
    Target,
    copy,
    explained,
    silent,
    verify,
)

# The least that /var needs; image/base/usr/lib/ai-assistant/repart/plain/40-var.conf asks for the same.
VAR_BYTES = 512 << 20
_ATTRIBUTES = {0: "RequiredPartition", 1: "NoBlockIOProtocol", 2: "LegacyBIOSBootable"}


@dataclass(frozen=True, slots=True)
class Running:
    """What this system was started from. `nodes` are the device nodes of ESP, root and verity, in this order."""

    disk: Disk
    root_hash: str
    partitions: tuple[gpt.Partition, gpt.Partition, gpt.Partition]
    nodes: tuple[Path, Path, Path]

    @property
    def label(self) -> str:
        return self.partitions[1].label

    @property
    def least_bytes(self) -> int:
        """The smallest disk to install on: ESP, two slots, and the least /var, each aligned, between two tables."""
        boot, *slot = (each.size for each in self.partitions)
        return HEAD + boot + 2 * sum(slot) + VAR_BYTES + 6 * HEAD


def running(machine: Machine) -> Running:
    """Find the disk below /, a verity volume, and on it what belongs to it.

    Raises:
        NotSupported: this system does not run from a disk of ours.
        DiskFailed: the disk cannot be read.
    """
    volume = machine.mounted_at("/")
    parts = machine.slaves(volume) if volume else []
    command_line = (machine.proc / "cmdline").read_text(errors="replace")
    hashes = re.findall(r"(?:^|\s)roothash=([0-9a-f]{64})(?=\s|$)", command_line)
    if len({machine.disk_of(each) for each in parts}) != 1 or len(hashes) != 1:
        raise NotSupported(
            "this system does not run from a disk of AI Assistant OS",
            hint="start the computer from a flashed USB stick; image/flash writes one",
        )
    name = machine.disk_of(parts[0])
    disk = machine.disk(machine.node(name))
    try:
        source = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            table = gpt.read(lambda offset, size: os.pread(source, size, offset), (disk.sector_bytes,))
        finally:
            os.close(source)
    except (OSError, gpt.NoTable) as error:
        raise DiskFailed(f"{disk.path}, which this system runs from, cannot be read: {error}") from error
    halves = {gpt.ROOT: uuid.UUID(hashes[0][:32]), gpt.ROOT_VERITY: uuid.UUID(hashes[0][32:])}
    wanted = list(table.of_type(gpt.ESP)[:1])
    for kind, half in halves.items():
        wanted += [each for each in table.of_type(kind) if each.uuid == half][:1]
    nodes = machine.partitions(name)
    if len(wanted) != 3 or any(each.number not in nodes for each in wanted):
        raise NotSupported(f"{disk.path} does not hold the boot partition, root and verity tree of the running version")
    paths = [machine.node(nodes[each.number]) for each in wanted]
    return Running(disk, hashes[0], (wanted[0], wanted[1], wanted[2]), (paths[0], paths[1], paths[2]))


def refuse(source: Running, disk: Disk) -> None:
    """Everything that speaks against it.

    Raises:
        DiskInUse, DiskTooSmall, DiskFailed
    """
    if disk.path.resolve() == source.disk.path.resolve():
        raise DiskInUse(f"this system runs from {disk.path}", hint="ai-assistant install --list shows the other disks")
    disk.refuse(source.least_bytes, hint="unmount it first; ai-assistant install --list shows what is on each disk")


def install(
    source: Running, disk: Disk, *, progress: Progress = silent, target_class: type[Target] = Target
) -> tuple[gpt.Partition, ...]:
    """Erase the disk and install on it; its new partitions. The table comes last: until then nothing boots from it.

    Raises:
        DiskInUse, DiskFailed, NoSpace, VerificationFailed, NotSupported, NotAuthorized
        KeyboardInterrupt: what it leaves behind is its argument.
    """
    with tempfile.TemporaryDirectory(prefix="ai-assistant-install-") as folder, target_class(disk) as target:
        work = Path(folder)
        layout = _layout(source)
        boot = work / "esp.img"
        esp.make(
            source.nodes[0],
            boot,
            size=layout[0].size,
            sector_bytes=disk.sector_bytes,
            root_hash=source.root_hash,
            work=work,
        )
        pieces = [
            Piece(path, 0, each.start, each.size) for path, each in zip((boot, *source.nodes[1:]), layout, strict=True)
        ]
        with explained(disk, "installed or flashed"):
            target.begin()
            digests = copy(target, pieces, progress)
            verify(target, pieces, digests, progress)
            _check(source, target, layout, progress)
            _write_table(disk, layout)
            target.sync()
            _check_table(target, layout)
        target.reread_table()
    return tuple(layout)


def _layout(source: Running) -> list[gpt.Partition]:
    placed, start = [], HEAD
    for number, each in enumerate(source.partitions, 1):
        own = uuid.uuid4() if each.type == gpt.ESP else each.uuid
        placed.append(replace(each, number=number, uuid=own, start=start))
        start += -(-each.size // HEAD) * HEAD
    return placed


def _check(source: Running, target: Target, layout: list[gpt.Partition], progress: Progress) -> None:
    """The target's root, block by block, against the hash that this system was started with."""

    def inside(part: gpt.Partition) -> Callable[[int, int], bytes]:
        return lambda offset, size: target.read(part.start + offset, max(min(size, part.size - offset), 0))

    try:
        verity.check(
            inside(layout[1]),
            inside(layout[2]),
            bytes.fromhex(source.root_hash),
            lambda done, total: progress("checking", done, total),
        )
    except verity.Damaged as error:
        raise VerificationFailed(
            f"the system on {source.disk.path} {error}",
            hint="flash that disk or stick again, and install from it",
        ) from error


def _write_table(disk: Disk, layout: list[gpt.Partition]) -> None:
    sector = disk.sector_bytes
    lines = ["label: gpt", f"label-id: {uuid.uuid4()}", "unit: sectors", f"first-lba: {HEAD // sector}"]
    for each in layout:
        bits = [bit for bit in range(64) if each.attributes >> bit & 1]
        attributes = ",".join(_ATTRIBUTES.get(bit, f"GUID:{bit}") for bit in bits)
        label = "".join(c for c in each.label if c.isprintable() and c not in '"\\')
        lines.append(
            f"start={each.start // sector}, size={each.size // sector}, type={each.type}, uuid={each.uuid}"
            f', name="{label}"' + (f', attrs="{attributes}"' if attributes else "")
        )
    # We hold the disk ourselves, so sfdisk would call it busy, and the kernel is told afterwards.
    command = [
        "sfdisk",
        "--quiet",
        "--force",
        "--no-reread",
        "--no-tell-kernel",
        "--wipe=never",
        "--wipe-partitions=never",
    ]
    if sector != 512:
        command.append(f"--sector-size={sector}")
    try:
        subprocess.run(
            [*command, str(disk.path)],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError as error:
        raise NotSupported("sfdisk is missing here", hint="run it on the appliance") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or f"status {error.returncode}").splitlines()[-1]
        raise DiskFailed(f"the partition table of {disk.path} cannot be written: {said}") from error


def _check_table(target: Target, layout: list[gpt.Partition]) -> None:
    try:
        table = gpt.read(target.read, (target.disk.sector_bytes,))
    except gpt.NoTable as error:
        raise VerificationFailed(f"{target.disk.path} {error}", hint="use another disk") from error
    if list(table.partitions) != layout:
        raise VerificationFailed(
            f"{target.disk.path} has another partition table than was written", hint="use another disk"
        )
