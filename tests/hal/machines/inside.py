"""python3 -m tests.hal.machines.inside FILE VARIANT, under umockdev-run: completes the machine, then runs detection.

What umockdev's own format has no words for is written into its folder here: files of /proc and /dev, who may open a
node, firmware, the kernel's log. Detection then runs as a user without rights, in the groups that the machine's user
is in.
"""

from __future__ import annotations

import grp
import os
import sys
from pathlib import Path

from tests.hal.machines import reconstruct
from tests.hal.machines.reconstruct import Machine

NOBODY = 65534


def main() -> None:
    file, variant = sys.argv[1:]
    machine = reconstruct.machines(Path(file))[variant]
    root = Path(os.environ["UMOCKDEV_DIR"])
    os.umask(0o022)
    root.chmod(0o755)
    # umockdev asks these about every file of /dev that is opened.
    for socket in (root / "ioctl").rglob("*"):
        socket.chmod(0o777)
    write(root, machine)
    os.setgroups([grp.getgrnam(name).gr_gid for name in machine.groups])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    command = ["-m", "ai_assistant.hal.detect", "--json", "--firmware", str(root / "firmware")]
    os.execv(sys.executable, [sys.executable, *command])


def write(root: Path, machine: Machine) -> None:
    log = "".join(f"4,{n},{n},-;{line}\n" for n, line in enumerate(machine.log))
    contents = {**machine.files, "/dev/kmsg": log}
    contents |= {f"/sys/module/{name}/initstate": "live\n" for name in machine.modules}
    contents |= {f"/firmware/{name}": "" for name in machine.firmware}
    (root / "firmware").mkdir()
    for path, text in contents.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    for node in machine.nodes:
        file = root / "dev" / node.name
        os.chown(file, 0, grp.getgrnam(node.group).gr_gid)
        file.chmod(node.mode)


if __name__ == "__main__":
    main()
