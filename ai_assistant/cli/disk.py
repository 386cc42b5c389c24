"""What `install` and `image/flash` share: choosing a disk, agreeing to its end, and watching it be written.

Needs nothing but the standard library, because flashing runs on machines that have nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from ai_assistant.cli.output import Output, duration, size
from ai_assistant.provisioning.disks import Disk

_REDRAW_S = 0.2
_RATE_S = 5.0
_BAR = 24


def listed(out: Output, disks: Sequence[Disk], least_bytes: int) -> None:
    """Every disk, and why those that cannot be written to cannot."""
    reasons = {disk.path: disk.reasons(least_bytes) for disk in disks}
    if out.json:
        out.document(
            [{**as_json(disk), "usable": not reasons[disk.path], "reasons": reasons[disk.path]} for disk in disks]
        )
        return
    if not disks:
        out.note("there is no disk")
    out.table(
        ("device", "size", "bus", "model", "serial", "usable"),
        [
            (
                str(disk.path),
                size(disk.size_bytes),
                disk.transport or "-",
                disk.model or "-",
                disk.serial or "-",
                "no: " + "; ".join(reasons[disk.path]) if reasons[disk.path] else "yes",
            )
            for disk in disks
        ],
    )


def as_json(disk: Disk) -> dict[str, Any]:
    return {
        "device": str(disk.path),
        "size_bytes": disk.size_bytes,
        "sector_bytes": disk.sector_bytes,
        "model": disk.model,
        "serial": disk.serial,
        "transport": disk.transport,
        "removable": disk.removable,
        "system": list(disk.system),
    }


def can_ask(out: Output) -> bool:
    return not out.json and sys.stdin is not None and sys.stdin.isatty() and out.terminal(sys.stderr)


def agreed(out: Output, disk: Disk, what: str) -> bool:
    """Whether the person types the device's name; a "y" would come too easily."""
    out.note(f"{what} {disk.path}: {disk.description}")
    for use in disk.uses:
        out.note(f"  warning: {use}")
    out.note("Everything on it will be lost.")
    print(f"Type {disk.name} to go on: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip()
    if answer in (disk.name, str(disk.path)):
        return True
    out.note("nothing was changed: that is not the disk's name")
    return False


class Meter:
    """One line on a terminal: phase, bar, bytes, rate, time left. Silent elsewhere. A context manager."""

    def __init__(self, out: Output) -> None:
        self._shown = not out.json and sys.stderr is not None and sys.stderr.isatty()
        self._phase = ""
        self._drawn = 0.0
        self._samples: list[tuple[float, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if phase != self._phase or (self._samples and done < self._samples[-1][1]):
            self._phase, self._samples, self._drawn = phase, [], 0.0
        self._samples.append((now, done))
        # The rate of the last seconds: a stick slows down when its cache is full, and the time left should say so.
        while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_S:
            self._samples.pop(0)
        if now - self._drawn >= _REDRAW_S or done >= total:
            self._drawn = now
            print(f"\r\x1b[K{line(phase, done, total, self._rate())}", end="", file=sys.stderr, flush=True)

    def _rate(self) -> float:
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first) if last > first else 0.0


def line(phase: str, done: int, total: int, rate: float) -> str:
    """The text of the meter; `rate` in bytes per second, 0 while it is unknown."""
    part = done / total if total else 1.0
    bar = "█" * int(part * _BAR)
    text = f"{phase:9} {part:4.0%} {bar:░<{_BAR}} {size(done)} of {size(total)}"
    if rate:
        text += f", {size(rate)}/s, {duration((total - done) / rate)} left"
    return text
