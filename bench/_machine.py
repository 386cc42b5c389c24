"""A machine in a folder: unpacked packages of one architecture, entered with or without an emulator.

The folder becomes the root of what runs in it, with this machine's /proc, /dev and /sys and without any network, so
nothing of this machine's own libraries can take part. Another architecture's programs run in QEMU's user mode, named in
each command: nothing is registered with the kernel (binfmt_misc), which a container may not do.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import NotSupported
from bench import _children
from bench._debian import CHECKOUT, Packages

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""What an architecture of Debian calls itself to programs."""
_EMULATOR = ".emulator"
_ENTER = """\
set -eu
root=$1; shift
for each in proc dev sys; do mount --rbind "/$each" "$root/$each"; done
exec chroot "$root" "$@"
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def native() -> str:
    """This machine's architecture.

    Raises:
        NotSupported: none that Debian's packages are looked for.
    """
    for architecture, machine in MACHINES.items():
        if machine == platform.machine():
            return architecture
    raise NotSupported(f"this bench knows {', '.join(MACHINES.values())}, not {platform.machine()}")


@dataclass(frozen=True, slots=True)
class Machine:
    """A folder that is a root.

    Args:
        emulated: its programs need the emulator, which `add_emulator` has put there.
    """

    architecture: str
    root: Path
    emulated: bool = False

    def command(self, *command: str, emulator: Sequence[str] = ()) -> list[str]:
        """What this machine runs so that the other runs `command`.

        Args:
            emulator: options of the emulator, where there is one.
        """
        # Without root, a user namespace lets the mounts be made.
        rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        emulation = [f"/{_EMULATOR}", *emulator] if self.emulated else []
        spaces = ["unshare", *rights, "--mount", "--net", "--propagation", "private"]
        return [*spaces, "sh", "-c", _ENTER, "enter", str(self.root), *emulation, *command]

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        emulator: Sequence[str] = (),
        timeout_s: float = 1800.0,
    ) -> _children.Done:
        """Run a program, given by its whole path, in an environment with nothing of ours but what is given.

        Raises:
            NotSupported: the folder cannot be entered.
            Timeout
        """
        clean = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", **(environment or {})}
        done = _children.run(self.command(*command, emulator=emulator), environment=clean, timeout_s=timeout_s)
        if done.status and done.error.startswith(("unshare:", "mount:")):
            raise NotSupported(
                f"another root cannot be entered here: {done.error.strip()[:200]}",
                hint="run this as root, in a container that may mount, or allow user namespaces",
            )
        return done

    def add_emulator(self, packages: Packages) -> None:
        """Put the emulator in. It is one statically linked file.

        Raises:
            NotSupported: the package has none for this architecture.
        """
        name = f"usr/bin/qemu-{MACHINES[self.architecture]}"
        packages.extract("qemu-user", name, self.root / _EMULATOR)

    def put(self, source: Path, place: str) -> Path:
        """Copy a file or a folder to a place (a whole path there), replacing what is there."""
        target = self.root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target


def snapshot(target: Path) -> Path:
    """The project's package as an installation has it, without links and compiled files."""
    return Path(
        shutil.copytree(CHECKOUT / "ai_assistant", target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    )


def digests(root: Path, places: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file, and of a folder's files with their names, except what Python compiles when it runs."""
    found = {}
    for place in places:
        path = root / place.lstrip("/")
        if path.is_dir():
            lines = [
                f"{each.relative_to(path)} {hashlib.sha256(each.read_bytes()).hexdigest()}"
                for each in sorted(path.rglob("*"))
                if each.is_file() and "__pycache__" not in each.parts
            ]
            found[place] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        else:
            found[place] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
