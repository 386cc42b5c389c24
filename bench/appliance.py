"""What the booted appliance costs: time to an answer, idle memory and wake-ups of the daemon, size of the root.

Runs in the tools tree (`make bench BENCH=appliance`), on the built developer and production images.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

from bench import harness
from image.container import CHECKOUT, Container, image_path, partition_offset

EROFS_MAGIC = 0xE0F5E1E2
IDLE_S = 30.0
MEGABYTE = 1e6


def erofs_bytes(image: Path) -> int:
    """Bytes that the compressed root file system takes, from its superblock (the partition is larger)."""
    with image.open("rb") as disk:
        disk.seek(partition_offset(image, "root_") + 1024)
        block = disk.read(128)
    (magic,) = struct.unpack_from("<I", block, 0)
    if magic != EROFS_MAGIC:
        raise ValueError(f"{image} has no erofs root")
    (blocks,) = struct.unpack_from("<I", block, 36)
    return int(blocks) << block[12]


def warm_run_s() -> float:
    """Seconds of `make run` when everything is built: the check that it is, the boot, the answer, the shutdown."""
    started = time.monotonic()
    for command in (["image/build", "developer"], [sys.executable, "-m", "image.container", "run"]):
        subprocess.run(command, cwd=CHECKOUT, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def switches(box: Container, pid: str) -> int:
    """Context switches of all threads of a process so far: an upper bound of its wake-ups."""
    shown = box.run("sh", "-c", f"cat /proc/{pid}/task/*/status").stdout
    return sum(int(line.split()[1]) for line in shown.splitlines() if "ctxt_switches" in line)


def idle(image: Path) -> tuple[float, float]:
    """Resident bytes and wake-ups a second of the daemon that was asked once and then left alone."""
    with Container(image) as box:
        box.run("ai-assistant", "status")
        pid = box.run("systemctl", "show", "--property=MainPID", "--value", "ai-assistantd").stdout.strip()
        time.sleep(5)
        before, started = switches(box, pid), time.monotonic()
        time.sleep(IDLE_S)
        rate = (switches(box, pid) - before) / (time.monotonic() - started)
        resident = int(box.run("awk", "/^VmRSS:/ {print $2}", f"/proc/{pid}/status").stdout) * 1024
    return float(resident), rate


def measure() -> list[harness.Row]:
    developer, production = image_path(), image_path("production")
    resident, rate = idle(developer)
    return [
        harness.limit("make run, warm, to the end", warm_run_s(), 20, "s"),
        harness.limit("daemon idle, resident", resident / MEGABYTE, 45, "MB"),
        harness.limit("daemon idle, wake-ups a second", rate, 1, "/s"),
        harness.limit("compressed root, developer", erofs_bytes(developer) / MEGABYTE, 900, "MB"),
        harness.limit("compressed root, production", erofs_bytes(production) / MEGABYTE, 450, "MB"),
    ]


def main() -> int:
    options = harness.arguments((__doc__ or "").splitlines()[0]).parse_args()
    return harness.report(measure(), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
