"""Write an image to a disk."""

from __future__ import annotations

from ai_assistant.provisioning import images
from ai_assistant.provisioning.disks import Disk, Machine
from ai_assistant.provisioning.errors import DiskInUse, NotADisk
from ai_assistant.provisioning.writing import HEAD, Piece, Progress, Target, copy, explained, silent, verify


def refuse(image: images.Image, disk: Disk, machine: Machine, *, force: bool = False) -> None:
    """Everything that speaks against it; `force` overrides that the disk is in use or the system's.

    Raises:
        DiskInUse, DiskTooSmall, DiskFailed, NotADisk
    """
    path = image.path.resolve()
    if path == disk.path.resolve():
        raise DiskInUse(f"{disk.path} is the image itself", hint="give the disk second")
    disk.refuse(image.size_bytes, force=force, hint="unmount it first, or say --force if you are sure")
    holding = machine.holding(path)
    if holding and disk.name in machine.below(holding) and disk.transport != "file":
        raise DiskInUse(
            f"{image.path} lies on {disk.path}, which would be erased", hint="copy it to another disk first"
        )
    if disk.sector_bytes != image.table.sector_bytes:
        raise NotADisk(
            f"{disk.path} has sectors of {disk.sector_bytes} bytes, and the image is made for 512",
            hint="start the image from a USB stick and run: ai-assistant install",
        )


def flash(
    image: images.Image,
    disk: Disk,
    *,
    exclusive: bool = True,
    check: bool = True,
    progress: Progress = silent,
    target_class: type[Target] = Target,
) -> None:
    """Write, read back (`check`), and put the partition table last: until then nothing would boot from the disk.

    Raises:
        DiskInUse, DiskFailed, NoSpace, VerificationFailed, InvalidImage, NotAuthorized
        KeyboardInterrupt: what it leaves behind is its argument.
    """
    with target_class(disk, exclusive=exclusive) as target:
        with explained(disk, "flashed"):
            target.begin()
            for piece in (
                Piece(image.path, HEAD, HEAD, image.size_bytes - HEAD),
                Piece(image.path, 0, 0, HEAD),
            ):
                digests = copy(target, [piece], progress)
                if check:
                    verify(target, [piece], digests, progress)
        target.reread_table()
