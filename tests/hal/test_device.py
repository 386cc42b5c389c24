"""Devices as values: JSON there and back, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.device import Device, DeviceKind, DriverState, Source, Throughput, object_name

DEVICE = Device(
    id="npu_pci_0000_00_0b_0",
    kind=DeviceKind.NPU,
    name="Intel AI Boost",
    vendor="Intel",
    bus="pci",
    address="0000:00:0b.0",
    vendor_id="8086",
    product_id="7d1d",
    driver="intel_vpu",
    state=DriverState.FIRMWARE_MISSING,
    hint="install firmware-intel-misc",
    nodes=("/dev/accel/accel0",),
    attributes={"memory_bytes": 0, "classes": [{"cpus": [0, 1]}]},
    throughput=(Throughput(11.0, "TOPS", "int8", Source.DATASHEET, "a page"),),
)


def test_a_device_survives_json() -> None:
    assert Device.from_dict(json.loads(json.dumps(DEVICE.to_dict()))) == DEVICE
    assert not DEVICE.usable
    assert len({DEVICE, Device.from_dict(DEVICE.to_dict())}) == 1
    assert str(DEVICE.throughput[0]) == "11 TOPS int8, datasheet"


def test_what_a_newer_daemon_adds_is_let_pass() -> None:
    assert Device.from_dict({**DEVICE.to_dict(), "colour": "red"}) == DEVICE


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"id": "a/b"},
        {"id": "x" * 200},
        {"id": 5},
        {"kind": "toaster"},
        {"kind": None},
        {"kind": ["cpu"]},
        {"state": "sleepy"},
        {"name": 3},
        {"nodes": "/dev/null"},
        {"nodes": [1]},
        {"attributes": [1]},
        {"throughput": "fast"},
        {"throughput": ["fast"]},
        {"throughput": [{"value": float("nan"), "unit": "TOPS", "dtype": "int8", "source": "measured"}]},
        {"throughput": [{"value": -1, "unit": "TOPS", "dtype": "int8", "source": "measured"}]},
        {"throughput": [{"value": True, "unit": "TOPS", "dtype": "int8", "source": "measured"}]},
        {"throughput": [{"value": 1, "unit": "TOPS", "dtype": "int8", "source": "hearsay"}]},
    ],
)
def test_wrong_json_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Device.from_dict({**DEVICE.to_dict(), **change})


@pytest.mark.parametrize("data", [None, [], "x", 1])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(InvalidArgument):
        Device.from_dict(data)


def test_ids_fit_an_object_path() -> None:
    assert object_name("gpu", "pci", "0000:c5:00.0") == "gpu_pci_0000_c5_00_0"
    assert object_name("") == "_"
    assert object_name("ä/../\0" * 100).strip("_") == ""
    assert len(object_name("x" * 1000)) < 100
