"""`ai-assistant devices` on this machine: a table, a tree, JSON, and hints where something is missing."""

from __future__ import annotations

import json

import pytest

import ai_assistant.hal.detect
from ai_assistant.hal.device import Device, DeviceKind, DriverState, Source, Throughput
from tests.cli.conftest import Cli

_DEVICES = (
    Device("cpu_0", DeviceKind.CPU, "AMD Ryzen", vendor="AMD", attributes={"cores": 8, "caches": [{"level": 1}]}),
    Device(
        "pci_0000_c5_00_1",
        DeviceKind.NPU,
        "NPU (Strix Point)",
        vendor="AMD",
        bus="pci",
        address="0000:c5:00.1",
        vendor_id="1022",
        product_id="17f0",
        state=DriverState.NO_DRIVER,
        hint="modprobe amdxdna",
        throughput=(Throughput(50, "TOPS", "int8", Source.DATASHEET, "a page"),),
    ),
    Device("evil", DeviceKind.GPU, "evil\x1b[31m name", attributes={"memory_bytes": 1 << 30}),
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ai_assistant.hal.detect, "detect", lambda: _DEVICES)


def test_a_table_with_what_helps_beside_it(cli: Cli) -> None:
    result = cli("devices", "--local")
    assert result.status == 0
    rows = result.out.splitlines()
    assert rows[0].split() == ["cpu", "AMD", "Ryzen", "–", "working"]
    assert rows[1].endswith("no-driver  50 TOPS int8, datasheet")
    assert "AMD NPU (Strix Point): modprobe amdxdna" in result.err
    assert "\x1b" not in result.out


def test_one_kind_as_a_tree(cli: Cli) -> None:
    result = cli("devices", "--local", "--tree", "--kind", "npu")
    assert result.out.splitlines()[0] == "AMD NPU (Strix Point) (npu)"
    facts = {line.split()[1]: line.split(maxsplit=2)[2] for line in result.out.splitlines()[1:]}
    assert facts["ids"] == "1022:17f0"
    assert facts["hint"] == "modprobe amdxdna"
    assert "Ryzen" not in result.out
    assert "1.0 GiB" in cli("devices", "--local", "--tree", "-k", "gpu").out


def test_json_is_what_the_library_gives(cli: Cli) -> None:
    result = cli("devices", "--local", "--json")
    assert tuple(Device.from_dict(each) for each in json.loads(result.out)) == _DEVICES
    assert result.err == ""


def test_wrong_use_is_named(cli: Cli) -> None:
    result = cli("devices", "--local", "--kind", "toaster", "--json")
    assert result.status == 1
    assert "cpu, gpu, npu" in result.error["hint"]
    assert cli("devices", "--local", "--measure").status == 1
    nothing = cli("devices", "--local", "--kind", "tpm")
    assert (nothing.status, nothing.out) == (0, "")
    assert "no device was found of that kind" in nothing.err
