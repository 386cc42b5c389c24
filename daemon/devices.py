"""The hardware that was found, kept in step with what is plugged in and out.

Detection runs in a thread when everything else answers: it reads a few hundred small files, and nobody's first answer
waits for that. What it needs is imported then, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ai_assistant.daemon.jobs import Job
from ai_assistant.errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from ai_assistant.hal.detect.monitor import Change
    from ai_assistant.hal.device import Device

log = logging.getLogger(__name__)

MAX_DEVICES = 512


class Monitor(Protocol):
    """`hal.detect.monitor.Monitor`, or what a test puts in its place."""

    devices: tuple[Device, ...]

    def changes(self) -> AsyncIterator[Change]: ...

    def close(self) -> None: ...


def _nobody(device: Device) -> None:
    pass


class DeviceTable:
    """The devices by id.

    Args:
        detect: finds them; runs in a thread.
        monitor: finds them and follows what comes and goes; raises NotSupported where there is no udev.
        measure: how fast processor and memory are; what it keeps, `detect` adds. Runs in a thread.
    """

    def __init__(
        self,
        detect: Callable[[], Sequence[Device]],
        monitor: Callable[[], Monitor],
        measure: Callable[[Sequence[Device]], object],
    ) -> None:
        self._detect = detect
        self._make_monitor = monitor
        self._measure = measure
        self._devices: dict[str, Device] = {}
        self._task: asyncio.Task[None] | None = None
        self.added: Callable[[Device], None] = _nobody
        self.removed: Callable[[Device], None] = _nobody
        self.changed: Callable[[Device], None] = _nobody

    def all(self) -> list[Device]:
        return list(self._devices.values())

    def get(self, name: str) -> Device:
        """Raises InvalidArgument."""
        try:
            return self._devices[name]
        except KeyError:
            raise InvalidArgument(f"there is no device {name[:100]!r}", param="device") from None

    def start(self) -> None:
        """Begin to look, and to follow."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def measure(self, job: Job) -> Mapping[str, Any]:
        """Measure what is not kept yet: the work of a job.

        Raises:
            InvalidConfig: nothing can be kept.
        """
        job.report(0.0, "measuring processor and memory")
        await asyncio.to_thread(self._measure, self.all())
        for device in await asyncio.to_thread(self._detect):
            if self._devices.get(device.id) != device:
                self._put(device)
        return {"devices": len(self._devices)}

    async def _run(self) -> None:
        try:
            await self._follow()
        except Exception:
            # A defect in one reader must not cost the appliance; what is known stays.
            log.exception("devices are not followed any more")

    async def _follow(self) -> None:
        try:
            monitor = await asyncio.to_thread(self._make_monitor)
        except NotSupported as error:
            log.info("%s", error)
            for device in await asyncio.to_thread(self._detect):
                self._put(device)
            return
        # Only now: it takes a while, and the thread above has done it.
        from ai_assistant.hal.detect.monitor import Action

        try:
            for device in monitor.devices:
                self._put(device)
            async for change in monitor.changes():
                if change.action is Action.REMOVED:
                    self._remove(change.device)
                else:
                    self._put(change.device)
        finally:
            monitor.close()

    def _remove(self, device: Device) -> None:
        if self._devices.pop(device.id, None) is not None:
            self.removed(device)

    def _put(self, device: Device) -> None:
        known = device.id in self._devices
        if known or len(self._devices) < MAX_DEVICES:
            self._devices[device.id] = device
            (self.changed if known else self.added)(device)
        else:
            log.warning("more than %d devices: %s is left out", MAX_DEVICES, device.id)
