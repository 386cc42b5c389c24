"""What the daemon can be asked over the bus, as coroutines. Both clients stand on this."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncGenerator
from typing import Any

from dbus_fast import Variant

from ai_assistant import _bus
from ai_assistant._results import STATUS_KEYS, JobStatus, Model, SelfTestResult, slug
from ai_assistant._transport import open_model_file
from ai_assistant.hal.device import Device, DeviceKind

_CHECK_TIMEOUT_S = 120.0
"""The daemon reads the header of a file before it answers, perhaps from a slow disk."""


class Manager:
    """Connects on first use, and anew after the connection broke."""

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._bus: _bus.Bus | None = None

    async def bus(self) -> _bus.Bus:
        if self._bus is None or not self._bus.connected:
            self._bus = await _bus.Bus.connect(self._address)
        return self._bus

    async def close(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._bus = None

    async def present(self) -> bool:
        return await (await self.bus()).daemon_present()

    async def status(self) -> dict[str, Any]:
        known: dict[str, Any] = (await (await self.bus()).call("GetStatus"))[0]
        return dict.fromkeys(STATUS_KEYS) | known

    async def statistics(self) -> dict[str, Any]:
        found: dict[str, Any] = (await (await self.bus()).call("GetStatistics"))[0]
        return found

    async def _objects(self, interface: str) -> list[dict[str, Any]]:
        bus = await self.bus()
        objects = (await bus.call("GetManagedObjects", interface="org.freedesktop.DBus.ObjectManager"))[0]
        return [each[interface] for each in objects.values() if interface in each]

    async def models(self) -> list[Model]:
        found = [Model.from_properties(each) for each in await self._objects(_bus.MODEL)]
        return sorted(found, key=lambda model: (model.transient, model.name))

    async def devices(self) -> list[Device]:
        kinds = list(DeviceKind)
        found = [Device.from_dict(_snake(each)) for each in await self._objects(_bus.DEVICE)]
        return sorted(found, key=lambda device: (kinds.index(device.kind), device.id))

    async def measure_devices(self) -> str:
        job: str = (await (await self.bus()).call("MeasureDevices"))[0]
        return job

    async def _find(self, name: str) -> str:
        path: str = (await (await self.bus()).call("FindModel", "s", name))[0]
        return path

    async def model(self, name: str) -> Model:
        path = await self._find(name)
        return Model.from_properties(await (await self.bus()).properties(path, _bus.MODEL))

    async def import_model(self, path: str | os.PathLike[str], name: str) -> str:
        fd = open_model_file(path)
        try:
            bus = await self.bus()
            job: str = (await bus.call("ImportModel", "hsa{sv}", 0, name, {}, fds=[fd], timeout_s=_CHECK_TIMEOUT_S))[0]
            return job
        finally:
            os.close(fd)

    async def pull_model(self, source: str, name: str, options: dict[str, str]) -> str:
        values = {key: Variant("s", value) for key, value in options.items() if value}
        job: str = (await (await self.bus()).call("PullModel", "ssa{sv}", source, name, values))[0]
        return job

    async def open_model(self, fd: int, name: str, context_length: int, hetero_compute: str | None = None) -> str:
        """The name of a transient model; it lives as long as this connection."""
        options = {"name": Variant("s", slug(name))} if name else {}
        if context_length:
            options["context_length"] = Variant("u", context_length)
        if hetero_compute is not None:
            options["hetero_compute"] = Variant("s", hetero_compute)
        bus = await self.bus()
        _, given = await bus.call("OpenModel", "ha{sv}", 0, options, fds=[fd], timeout_s=_CHECK_TIMEOUT_S)
        return str(given)

    async def load(self, name: str) -> str:
        path = await self._find(name)
        job: str = (await (await self.bus()).call("Load", "a{sv}", {}, path=path, interface=_bus.MODEL))[0]
        return job

    async def unload(self, name: str) -> None:
        path = await self._find(name)
        await (await self.bus()).call("Unload", path=path, interface=_bus.MODEL)

    async def pin(self, name: str, pinned: bool) -> None:
        path = await self._find(name)
        await (await self.bus()).call("Pin" if pinned else "Unpin", path=path, interface=_bus.MODEL)

    async def drain(self, name: str) -> str:
        path = await self._find(name)
        job: str = (await (await self.bus()).call("Drain", path=path, interface=_bus.MODEL))[0]
        return job

    async def estimate(self, name: str, context_length: int, sequences: int) -> dict[str, int]:
        path = await self._find(name)
        asked = {"context_length": context_length, "sequences": sequences}
        options = {key: Variant("u", value) for key, value in asked.items() if value}
        found: dict[str, int] = (
            await (await self.bus()).call("Estimate", "a{sv}", options, path=path, interface=_bus.MODEL)
        )[0]
        return found

    async def remove(self, name: str) -> None:
        path = await self._find(name)
        await (await self.bus()).call("Remove", path=path, interface=_bus.MODEL)

    async def self_test(self) -> list[SelfTestResult]:
        rows = (await (await self.bus()).call("SelfTest"))[0]
        return [SelfTestResult(name, ok, detail) for name, ok, detail in rows]

    async def log(self, lines: int, priority: str) -> list[str]:
        found: list[str] = (await (await self.bus()).call("GetLog", "us", lines, priority))[0]
        return found

    async def job(self, path: str) -> JobStatus:
        return JobStatus.from_properties(await (await self.bus()).properties(path, _bus.JOB))

    async def watch_job(self, path: str) -> AsyncGenerator[JobStatus]:
        """Its state now and after each change; the last one has ended."""
        bus = await self.bus()
        async with contextlib.aclosing(bus.watch(path, _bus.JOB)) as changes:
            async for properties in changes:
                status = JobStatus.from_properties(properties)
                yield status
                if status.ended:
                    return

    async def cancel_job(self, path: str) -> None:
        await (await self.bus()).call("Cancel", path=path, interface=_bus.JOB)


def _snake(properties: dict[str, Any]) -> dict[str, Any]:
    """VendorId → vendor_id: the bus has names of its own style."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): value for name, value in properties.items()}
