"""Hot-plug: which devices came, went or changed, by udev's events.

An event only says that something happened; what did is found by looking again and comparing. So a lost event costs
nothing but time, and an event about half of a device (its driver is still loading firmware) is followed by another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ai_assistant.errors import NotSupported
from ai_assistant.hal.detect import detect
from ai_assistant.hal.device import Device

SUBSYSTEMS = (
    "accel", "apex", "cpu", "drm", "hailo_chardev", "hwmon", "memory", "pci", "platform", "powercap", "thermal",
    "tpm", "usb",
)  # fmt: skip
# Loading one driver makes dozens of events within this many seconds.
SETTLE_S = 0.25
MAX_EVENTS = 10_000


class Action(StrEnum):
    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Change:
    """`device` is as it is now; of one that was removed, as it was last."""

    action: Action
    device: Device


def compare(before: Sequence[Device], after: Sequence[Device]) -> tuple[Change, ...]:
    """What was removed, then what was added, then what changed, by id."""
    old, new = ({device.id: device for device in devices} for devices in (before, after))
    changes = [Change(Action.REMOVED, device) for name, device in old.items() if name not in new]
    changes += [Change(Action.ADDED, device) for name, device in new.items() if name not in old]
    changes += [Change(Action.CHANGED, d) for name, d in new.items() if name in old and old[name] != d]
    return tuple(changes)


class Monitor:
    """Follows a machine's devices. `devices` is what is known now.

        with Monitor() as monitor:
            async for change in monitor.changes(): ...

    or, in a loop of one's own, wait until `fileno()` is readable and call `read()`.

    Args:
        look: finds the devices, as `detect` does; called at the start and after events.

    Raises:
        NotSupported: there is no udev here.
    """

    def __init__(self, look: Callable[[], Sequence[Device]] = detect) -> None:
        try:
            import pyudev

            self._monitor: Any = pyudev.Monitor.from_netlink(pyudev.Context(), source="udev")
            for subsystem in SUBSYSTEMS:
                self._monitor.filter_by(subsystem)
            self._monitor.start()
        except (ImportError, OSError) as error:
            raise NotSupported(
                "devices that come and go cannot be followed here", hint="install python3-pyudev and udev"
            ) from error
        self._look = look
        # After the monitor has started: what comes between is an event.
        self.devices = tuple(look())

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._monitor = None  # libudev closes its socket with the last reference

    def fileno(self) -> int:
        return int(self._monitor.fileno())

    def read(self) -> tuple[Change, ...]:
        """Takes the waiting events and looks what they were about; empty when it was nothing of ours. Never waits."""
        if not self._drain():
            return ()
        now = tuple(self._look())
        changes = compare(self.devices, now)
        self.devices = now
        return changes

    def _drain(self) -> bool:
        """Whether anything happened. A full buffer (ENOBUFS) counts as an event: some were lost."""
        for n in range(MAX_EVENTS):
            try:
                if self._monitor.poll(timeout=0) is None:
                    return n > 0
            except OSError:
                return True
        return True

    async def changes(self) -> AsyncGenerator[Change, None]:
        """Endless; ends by being cancelled, or left."""
        while True:
            await self._readable()
            # The rest of a burst, so that one look answers it.
            await asyncio.sleep(SETTLE_S)
            # Looking reads a few hundred small files: not on the loop.
            for change in await asyncio.to_thread(self.read):
                yield change

    async def _readable(self) -> None:
        """Until an event waits. The loop watches only as long: an event that nobody takes would keep it spinning."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        number = self.fileno()
        loop.add_reader(number, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(number)
