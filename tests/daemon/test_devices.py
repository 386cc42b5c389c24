"""The table of devices: what comes, goes and changes is announced once, and a failure loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest
from dbus_fast import Variant

from ai_assistant.daemon import bus
from ai_assistant.daemon.bus.device import INTERFACE, DeviceObject
from ai_assistant.daemon.devices import MAX_DEVICES, DeviceTable
from ai_assistant.daemon.jobs import Job
from ai_assistant.errors import InvalidArgument, NotSupported
from ai_assistant.hal.detect.monitor import Action, Change
from ai_assistant.hal.device import Device, DeviceKind, DriverState, Source, Throughput
from ai_assistant.services.connection import Connection

_NPU = Device("pci_1", DeviceKind.NPU, "NPU", driver="amdxdna", nodes=("/dev/accel/accel0",))
_STICK = Device("usb_1", DeviceKind.NPU, "Stick", bus="usb")


class _Monitor:
    """A monitor that a test feeds."""

    def __init__(self, *devices: Device) -> None:
        self.devices = devices
        self.queue: asyncio.Queue[Change | Exception] = asyncio.Queue()
        self.closed = asyncio.Event()

    async def changes(self) -> AsyncIterator[Change]:
        while True:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            # Only now has it been dealt with.
            self.queue.task_done()

    def close(self) -> None:
        self.closed.set()


class _World:
    def __init__(self) -> None:
        self.monitor = _Monitor(_NPU)
        self.look: tuple[Device, ...] = ()
        self.measured: list[Sequence[Device]] = []
        self.events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.table = _listened(DeviceTable(lambda: self.look, lambda: self.monitor, self.measured.append), self.events)

    async def next(self) -> tuple[str, str]:
        return await asyncio.wait_for(self.events.get(), 20)


def _listened(table: DeviceTable, events: asyncio.Queue[tuple[str, str]]) -> DeviceTable:
    table.added = lambda each: events.put_nowait(("added", each.id))
    table.removed = lambda each: events.put_nowait(("removed", each.id))
    table.changed = lambda each: events.put_nowait(("changed", each.id))
    return table


@pytest.fixture
async def world() -> AsyncIterator[_World]:
    world = _World()
    world.table.start()
    assert await world.next() == ("added", "pci_1")
    yield world
    await world.table.close()
    await world.table.close()
    assert world.monitor.closed.is_set()


async def test_what_is_plugged_in_and_out_is_announced(world: _World) -> None:
    world.monitor.queue.put_nowait(Change(Action.ADDED, _STICK))
    assert await world.next() == ("added", "usb_1")
    broken = replace(_NPU, state=DriverState.NO_DRIVER)
    world.monitor.queue.put_nowait(Change(Action.CHANGED, broken))
    assert await world.next() == ("changed", "pci_1")
    assert world.table.get("pci_1") is broken
    for _ in range(2):
        world.monitor.queue.put_nowait(Change(Action.REMOVED, _STICK))
    assert await world.next() == ("removed", "usb_1")
    await world.monitor.queue.join()
    assert world.events.empty()
    with pytest.raises(InvalidArgument):
        world.table.get("usb_1")


async def test_a_failing_monitor_keeps_what_was_known(world: _World, caplog: pytest.LogCaptureFixture) -> None:
    world.monitor.queue.put_nowait(RuntimeError("a reader has a defect"))
    await asyncio.wait_for(world.monitor.closed.wait(), 20)
    await asyncio.sleep(0)
    assert world.table.all() == [_NPU]
    assert "not followed any more" in caplog.text


async def test_without_udev_there_is_one_look() -> None:
    def refuse() -> _Monitor:
        raise NotSupported("no udev here")

    events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    table = _listened(DeviceTable(lambda: (_NPU, _STICK), refuse, list), events)
    table.start()
    assert [await asyncio.wait_for(events.get(), 20) for _ in range(2)] == [("added", "pci_1"), ("added", "usb_1")]
    await table.close()


async def test_what_was_measured_is_announced(world: _World) -> None:
    job = Mock(spec=Job)
    fast = replace(_NPU, throughput=(Throughput(1.5, "TFLOP/s", "fp32", Source.MEASURED),))
    world.look = (fast,)
    assert await world.table.measure(job) == {"devices": 1}
    assert world.measured == [[_NPU]]
    assert await world.next() == ("changed", "pci_1")
    assert world.table.get("pci_1") is fast
    await world.table.measure(job)
    assert world.events.empty()


async def test_hostile_numbers_of_devices_end_somewhere(world: _World) -> None:
    for number in range(MAX_DEVICES + 50):
        world.monitor.queue.put_nowait(Change(Action.ADDED, replace(_NPU, id=f"d{number}")))
    await asyncio.wait_for(world.monitor.queue.join(), 20)
    assert len(world.table.all()) == MAX_DEVICES


async def test_properties_fit_the_bus_whatever_a_driver_wrote() -> None:
    odd = replace(
        _NPU,
        attributes={"none": None, "list": [1, None, "x"], "huge": 1 << 80, "deep": {"a": [None], "b": True}},
        throughput=(Throughput(50, "TOPS", "int8", Source.DATASHEET),),
    )
    table = DeviceTable(tuple, lambda: _Monitor(odd), list)
    added = asyncio.Event()
    table.added = lambda each: added.set()
    table.start()
    await asyncio.wait_for(added.wait(), 20)
    connection = Connection(map(bus.load, bus.NAMES), root=bus.ROOT)
    connection.export(f"{bus.ROOT}/devices/pci_1", {INTERFACE: DeviceObject(table, "pci_1")})
    found = DeviceObject(table, "pci_1").properties()
    assert found["Attributes"]["huge"] == Variant("d", float(1 << 80))
    assert "none" not in found["Attributes"]
    assert found["Throughput"][0]["value"] == Variant("d", 50.0)
    await table.close()
