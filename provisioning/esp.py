"""Make the boot partition of another disk: a fresh file system with what the running version boots from.

Not a copy of its blocks: what was deleted there would be copied too, and the random seed, credentials and the other
slot's files belong to this disk alone. mkfs.vfat and mtools work on files, so nothing is mounted.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ai_assistant.errors import NotSupported
from ai_assistant.provisioning.errors import DiskFailed

LOADER = Path("EFI/BOOT/BOOTX64.EFI")
KERNELS = Path("EFI/Linux")
# What systemd keeps for one machine: the seed of its random numbers, and secrets for its units.
_OF_THIS_DISK = re.compile(r"loader/random-seed|loader/(credentials|entries-token)(/.*)?|.*\.cred", re.IGNORECASE)
# systemd-boot's count of the tries that a new version has left, as in name+2-1.efi.
_TRIES = re.compile(r"\+\d+(-\d+)?(?=\.efi(\.extra\.d)?$)")
_ROOT_HASH = re.compile(rb"roothash=([0-9a-f]{64})")
_ENVIRONMENT = {"MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}


def make(source: Path, target: Path, *, size: int, sector_bytes: int, root_hash: str, work: Path) -> list[str]:
    """Write a file system image to `target` with the files of the boot partition `source`; returns their names.

    Only what boots the root of `root_hash` is taken. `work` is an empty folder with room for the files.

    Raises:
        NotSupported: there is nothing to boot from on the source, or a tool is missing.
        DiskFailed: the source cannot be read.
    """
    os.sync()  # the running system may have it mounted
    tree = work / "esp"
    tree.mkdir()
    _run("mcopy", "-s", "-Q", "-n", "-m", "-i", str(source), "::/", str(tree), what=f"reading {source}")
    for unwanted in list(_unwanted(tree, root_hash)):
        shutil.rmtree(unwanted) if unwanted.is_dir() else unwanted.unlink(missing_ok=True)
    for kernel in sorted((tree / KERNELS).glob("*.efi*")):
        # It runs, so it is good: on the other disk it is no new version on trial. The same for its folder of drop-ins.
        kernel.rename(kernel.with_name(_TRIES.sub("", kernel.name)))
    if not (tree / LOADER).is_file() or not any(_boots(each, root_hash) for each in (tree / KERNELS).glob("*.efi")):
        raise NotSupported(
            f"{source} does not hold what this system was started with",
            hint="start the computer from the disk or stick whose system is to be installed",
        )
    with target.open("wb") as file:
        file.truncate(size)
    label = ["-F", "32", "-n", "ESP", "-S", str(sector_bytes), "-i", secrets.token_hex(4)]
    _run("mkfs.vfat", *label, str(target), what="making the boot file system")
    contents = [str(each) for each in sorted(tree.iterdir())]
    _run("mcopy", "-s", "-Q", "-m", "-i", str(target), *contents, "::/", what="filling the boot file system")
    names = sorted(str(each.relative_to(tree)) for each in tree.rglob("*") if each.is_file())
    shutil.rmtree(tree)
    return names


def _unwanted(tree: Path, root_hash: str) -> Iterator[Path]:
    for each in sorted(tree.rglob("*"), key=lambda path: -len(path.parts)):
        name = each.relative_to(tree)
        if _OF_THIS_DISK.fullmatch(str(name)):
            yield each
        elif name.parent == KERNELS and each.suffix == ".efi" and _root_hash(each) not in (root_hash, ""):
            # Drop-ins of a kernel stand in a folder of its name.
            yield from (other for other in (each, each.with_name(each.name + ".extra.d")) if other.exists())
        elif name.parent == Path("loader/ai-assistant") and each.suffix == ".json" and _published(each) != root_hash:
            yield from (other for other in (each, each.with_name(each.name + ".sig")) if other.exists())


def _boots(kernel: Path, root_hash: str) -> bool:
    return _root_hash(kernel) == root_hash


def _root_hash(kernel: Path) -> str:
    """The one that a unified kernel image's command line names; empty when it brings its own root."""
    found = _ROOT_HASH.search(kernel.read_bytes())
    return found[1].decode() if found else ""


def _published(measurements: Path) -> str:
    try:
        found = json.loads(measurements.read_bytes())
        return str(found.get("root_hash", "")) if isinstance(found, dict) else ""
    except ValueError:
        return ""


def _run(*command: str, what: str) -> None:
    try:
        subprocess.run(
            command,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        )
    except FileNotFoundError as error:
        raise NotSupported(f"{command[0]} is missing here", hint="run it on the appliance") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip() or f"status {error.returncode}").splitlines()[-1]
        raise DiskFailed(f"{what} failed: {said}", hint="dmesg may say more") from error
