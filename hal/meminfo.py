"""How much memory the machine has, as the kernel says it."""

from __future__ import annotations

from pathlib import Path

_MAX_BYTES = 1 << 16


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """(total, available without swapping), in bytes; None where nobody says."""
    values: dict[str, int] = {}
    try:
        with (root / "proc/meminfo").open("rb") as file:
            lines = file.read(_MAX_BYTES).decode(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdecimal():
            values[key] = int(number[0]) * 1024
    return values.get("MemTotal"), values.get("MemAvailable")
