"""ids.toml: whole, consistent, and every figure has its source."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.detect import ids
from ai_assistant.hal.device import DeviceKind


def test_every_row_is_usable() -> None:
    table = ids.table()
    assert len(table.devices) > 40
    for (bus, name), known in table.devices.items():
        assert known.driver in table.drivers, name
        assert bus in ("pci", "usb", "of")
        if bus != "of":
            assert re.fullmatch("[0-9a-f]{4}:[0-9a-f]{4}", name), name
            assert name.split(":")[0] in table.vendors, name
        if bus != "pci":
            assert known.kind is not None, "no class tells it"
        for figure in known.figures:
            assert re.match(r"https://[\w.-]+/\S+( \(.*\))?$", figure.reference), figure
            assert figure.value > 0


def test_drivers_that_need_firmware_say_where_it_is_from() -> None:
    for driver in ids.table().drivers.values():
        assert driver.since or driver.source, driver.name
        assert not driver.package or driver.firmware, driver.name
        assert not driver.since or re.fullmatch(r"\d+\.\d+(\.\d+)?", driver.since)


def test_npus_of_intel_and_amd_are_there() -> None:
    table = ids.table()
    for vendor, product in (("8086", "7d1d"), ("8086", "643e"), ("1022", "1502"), ("1022", "17f0"), ("1e60", "2864")):
        known = table.pci(vendor, product)
        assert known is not None
        assert known.kind is DeviceKind.NPU
    assert table.pci("ffff", "ffff") is None
    assert table.usb("8086", "7d1d") is None
    assert table.compatible(["vendor,board", "rockchip,rk3588-rknn-core"]) is not None
    assert table.compatible([]) is None


ROW: dict[str, Any] = {"bus": "pci", "ids": ["1:2"], "name": "x", "driver": "d"}


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "driver": "other"}],
        [ROW, ROW],
        [{**ROW, "kind": "toaster"}],
        [{**ROW, "colour": "red"}],
        [{**ROW, "figures": [{"value": -1, "unit": "TOPS"}]}],
    ],
)
def test_a_mistake_in_it_is_found(rows: list[dict[str, Any]]) -> None:
    data = {"driver": {"d": {}}, "device": rows, "vendor": {}, "core": {}, "chip": {}}
    with pytest.raises((ValueError, InvalidArgument)):
        ids.parse(data)
    assert ids.parse({**data, "device": [ROW]}).devices
