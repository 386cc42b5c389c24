"""The EFI system partition inside a disk image, read and changed in place with mtools: no mount, no loop device."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from image.signing.errors import ImageError, NoSpaceError, ToolError
from image.signing.tools import epoch, run

ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
# The image's own configuration of mtools, not the user's.
_MTOOLS = {"MTOOLSRC": "/dev/null", "MTOOLS_SKIP_CHECK": "1"}


@dataclass(frozen=True)
class Partition:
    """Offset and size in bytes; identifiers in lower case without dashes."""

    type: str
    uuid: str
    offset: int
    size: int


def partitions(image: Path) -> list[Partition]:
    """The partitions of a disk image.

    Raises:
        ImageError: no partition table, or an image that is shorter than its table says.
    """
    try:
        length = image.stat().st_size
        table = json.loads(run(["sfdisk", "--json", image]))["partitiontable"]
    except FileNotFoundError:
        raise ImageError(f"{image} is not there", "make image") from None
    except (ToolError, ValueError, KeyError) as error:
        raise ImageError(f"{image} is no disk image: {error}") from None
    return parse(table, length, image.name)


def parse(table: dict[str, Any], length: int, name: str) -> list[Partition]:
    """Partitions from sfdisk's JSON, checked against the image's length in bytes."""
    if table.get("label") != "gpt":
        raise ImageError(f"{name} has no whole GPT: it is cut short, or no disk image", "build it again: make image")
    sector = int(table.get("sectorsize", 512))
    found = [
        Partition(
            str(each["type"]).lower().replace("-", ""),
            str(each.get("uuid", "")).lower().replace("-", ""),
            int(each["start"]) * sector,
            int(each["size"]) * sector,
        )
        for each in table.get("partitions", [])
    ]
    end = max((each.offset + each.size for each in found), default=0)
    if end > length:
        raise ImageError(f"{name} is cut short: {length} bytes, and its partitions end at {end}", "build it again")
    return found


class ESP:
    """The one ESP of a disk image. Paths are absolute, with slashes."""

    def __init__(self, image: Path) -> None:
        wanted = ESP_TYPE.lower().replace("-", "")
        found = [each for each in partitions(image) if each.type == wanted]
        if len(found) != 1:
            raise ImageError(f"{image.name} has {len(found) or 'no'} EFI system partitions, not one")
        self.image = image
        self.size = found[0].size
        self._drive = f"{image}@@{found[0].offset}"

    def _run(self, program: str, *arguments: str | Path) -> str:
        try:
            return run([program, "-i", self._drive, *arguments], environment=_MTOOLS).decode(errors="replace")
        except ToolError as error:
            raise ImageError(
                f"the EFI system partition of {self.image.name} is not readable: {error.message}"
            ) from None

    def files(self) -> list[str]:
        """Every file and folder (these end with a slash)."""
        return [line.removeprefix("::") for line in self._run("mdir", "-/", "-b", "::").splitlines() if line]

    def has(self, path: str) -> bool:
        return path.lower() in (each.lower().rstrip("/") for each in self.files())

    def read(self, path: str, target: Path) -> None:
        self._run("mcopy", "-n", f"::{path}", target)

    def write(self, source: Path, path: str) -> None:
        """Put a file there, over an older one, with the image's time.

        Raises:
            NoSpaceError: it does not fit.
        """
        missing = [str(each) for each in PurePosixPath(path).parents if str(each) != "/" and not self.has(str(each))]
        os.utime(source, (epoch(), epoch()))
        try:
            for folder in reversed(missing):
                self._run("mmd", f"::{folder}")
            self._run("mcopy", "-o", "-m", source, f"::{path}")
        except NoSpaceError:
            raise NoSpaceError(
                f"{source.name} ({source.stat().st_size / 1e6:.1f} MB) does not fit on the EFI system partition"
                f" of {self.size / 1e6:.0f} MB",
                "make the initrd smaller (KernelModulesInitrdInclude= in mkosi.conf) or the partition larger",
            ) from None
