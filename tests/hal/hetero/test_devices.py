"""Devices by name: what is opened, closed again, and left out with a reason."""

from __future__ import annotations

from typing import ClassVar

import pytest

from ai_assistant.errors import BackendFailed, InvalidArgument, NotSupported
from ai_assistant.hal.contract import Backend, BackendDevice, Context, Probe
from ai_assistant.hal.hetero.devices import lane, open_devices
from tests.hal.hetero.fakes import FakeDevice


class Counted(FakeDevice):
    closed = 0

    def close(self) -> None:
        self.closed += 1


class Fake(Backend):
    name: ClassVar[str] = "fake"
    version = "7"

    def __init__(self, unavailable: str = "", broken: bool = False) -> None:
        self._unavailable = unavailable
        self._broken = broken
        self.opened: list[Counted] = []

    def probe(self) -> Probe:
        if self._unavailable:
            return Probe(unavailable=self._unavailable, hint="buy one")
        return Probe((BackendDevice("0", "first", "npu"),))

    def open(self, device: str = "") -> Context:
        if self._broken:
            raise BackendFailed("the driver is broken")
        self.opened.append(Counted(device or "0"))
        return self.opened[-1]


def test_every_backend_with_a_device_is_opened_and_closed() -> None:
    cpu, npu, null = Fake(), Fake(), Fake()
    every = {"cpu": cpu, "npu": npu, "null": null, "none": Fake("no such device"), "bad": Fake(broken=True)}
    with open_devices(backends=every) as found:
        assert list(found) == ["cpu", "npu"]
        assert found.versions == {"cpu": "cpu 7", "npu": "npu 7"}
        assert found.missing == {"none": "none has no device here: no such device", "bad": "the driver is broken"}
    assert [each.closed for each in (*cpu.opened, *npu.opened)] == [1, 1]
    assert not null.opened


def test_named_devices_and_the_fallback() -> None:
    cpu, npu = Fake(), Fake()
    with open_devices(("npu:x@1", "npu:x@0", "npu:x@1"), backends={"cpu": cpu, "npu": npu}) as found:
        assert list(found) == ["npu:x@1", "npu:x@0", "cpu"]
        assert [each.device.id for each in npu.opened] == ["x@1", "x@0"]
    with open_devices(("npu",), fallback="", backends={"cpu": cpu, "npu": npu}) as found:
        assert list(found) == ["npu"]


def test_what_was_named_and_is_not_there_is_an_error_and_nothing_stays_open() -> None:
    npu = Fake()
    with pytest.raises(InvalidArgument, match="'tpu'") as caught:
        open_devices(("npu", "tpu"), backends={"npu": npu})
    assert "npu" in caught.value.hint
    with pytest.raises(BackendFailed):
        open_devices(("npu", "bad"), backends={"npu": npu, "bad": Fake(broken=True)})
    with pytest.raises(NotSupported, match="no such device") as missing:
        open_devices(("npu", "none"), backends={"npu": npu, "none": Fake("no such device")})
    assert missing.value.hint == "buy one"
    assert [each.closed for each in npu.opened] == [1] * 3
    with pytest.raises(InvalidArgument):
        open_devices([f"npu:{each}" for each in range(17)], backends={"npu": npu})


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (BackendDevice("x@3", "", "cpu"), "core 3"),
        (BackendDevice("x@", "", "cpu"), "cpu"),
        (BackendDevice("x@y", "", "cpu"), "cpu"),
        (BackendDevice("3", "", "cpu"), "cpu"),
        (BackendDevice("0", "", "cpu", "cpu_0"), "cpu"),
        (BackendDevice("gpu0", "", "gpu", "pci:1"), "pci:1"),
        (BackendDevice("gpu0", "", "gpu"), "name"),
    ],
)
def test_lanes(device: BackendDevice, expected: str) -> None:
    context = FakeDevice("x")
    context.device = device
    assert lane("name", context) == expected
