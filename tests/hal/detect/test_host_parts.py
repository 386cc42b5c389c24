"""Processor, memory, TPM and sensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ai_assistant.hal.detect import cpu, detect, memory
from ai_assistant.hal.device import Device, DeviceKind, DriverState
from tests.hal.detect.fake import FakeMachine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def one(machine: FakeMachine, kind: DeviceKind) -> Device:
    (found,) = (device for device in detect(machine.root) if device.kind is kind)
    return found


def x86(machine: FakeMachine, count: int, flags: str = "lm avx2 fma avx512_vnni", socket: int = 0) -> None:
    blocks = [
        f"processor\t: {n}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 170\n"
        f"model name\t: Intel(R)  Core(TM) Ultra 7 155H\nflags\t\t: fpu {flags}\n"
        for n in range(count)
    ]
    machine.write("proc/cpuinfo", "\n".join(blocks) + "\n")
    machine.write("sys/devices/system/cpu/online", f"0-{count - 1}\n")
    for n in range(count):
        machine.write(f"sys/devices/system/cpu/cpu{n}/topology/physical_package_id", f"{socket}\n")


def core(machine: FakeMachine, n: int, **files: str) -> None:
    for key, value in files.items():
        machine.write(f"sys/devices/system/cpu/cpu{n}/{key.replace('__', '/')}", f"{value}\n")


def classes(device: Device) -> list[tuple[str, list[int]]]:
    found = device.attributes["core_classes"]
    assert isinstance(found, list)
    return [(row["name"], row["cpus"]) for row in found]


def test_an_intel_hybrid_by_the_kernels_own_lists(machine: FakeMachine) -> None:
    x86(machine, 6)
    machine.write("sys/devices/cpu_core/cpus", "0-3\n")
    machine.write("sys/devices/cpu_atom/cpus", "4-5\n")
    for n in range(4):
        core(machine, n, topology__core_cpus_list="0-1" if n < 2 else "2-3", cpufreq__cpuinfo_max_freq="4800000")
    for n in (4, 5):
        core(machine, n, topology__core_cpus_list=str(n), cpufreq__cpuinfo_max_freq="3800000")
    found = one(machine, DeviceKind.CPU)
    assert found.name == "Intel(R) Core(TM) Ultra 7 155H"
    assert found.vendor == "Intel"
    assert found.attributes["cores"] == 4
    assert found.attributes["threads"] == 6
    assert found.attributes["max_khz"] == 4_800_000
    assert found.attributes["isa"] == ["fma", "avx2", "avx512_vnni"]
    assert found.attributes["architecture"] == "x86_64"
    assert found.attributes["core_classes"] == [
        {"name": "performance", "cpus": [0, 1, 2, 3], "cores": 2, "max_khz": 4_800_000},
        {"name": "efficient", "cpus": [4, 5], "cores": 2, "max_khz": 3_800_000},
    ]


def test_only_what_every_core_can_is_named(machine: FakeMachine) -> None:
    x86(machine, 2)
    text = (machine.root / "proc/cpuinfo").read_text()
    first, second = text.split("\n\n")[:2]
    machine.write("proc/cpuinfo", f"{first}\n\n{second.replace('avx512_vnni', '')}\n\n")
    assert one(machine, DeviceKind.CPU).attributes["isa"] == ["fma", "avx2"]


def test_amd_compact_cores_by_their_clocks_and_a_favoured_core_is_no_class(machine: FakeMachine) -> None:
    x86(machine, 4)
    for n, khz in enumerate((5_157_000, 5_100_000, 3_300_000, 3_300_000)):
        core(machine, n, cpufreq__cpuinfo_max_freq=str(khz))
    assert classes(one(machine, DeviceKind.CPU)) == [("performance", [0, 1]), ("efficient", [2, 3])]


def test_arm_with_big_and_little_cores(machine: FakeMachine) -> None:
    parts = ["0xd05"] * 4 + ["0xd0b"] * 4
    machine.write(
        "proc/cpuinfo",
        "".join(
            f"processor\t: {n}\nFeatures\t: fp asimd aes asimdhp asimddp\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU part\t: {part}\n\n"
            for n, part in enumerate(parts)
        )
        + "Serial\t\t: 0000\n",
    )
    machine.write("sys/devices/system/cpu/online", "0-7\n")
    for n in range(8):
        core(machine, n, cpu_capacity="530" if n < 4 else "1024")
    found = one(machine, DeviceKind.CPU)
    assert found.name == "Cortex-A55 + Cortex-A76"
    assert found.vendor == "Arm"
    assert found.attributes["architecture"] == "aarch64"
    assert found.attributes["isa"] == ["asimd", "asimdhp", "asimddp", "aes"]
    assert classes(found) == [("performance", [4, 5, 6, 7]), ("efficient", [0, 1, 2, 3])]
    machine.write("proc/device-tree/compatible", b"radxa,rock-5b\0rockchip,rk3588\0")
    assert one(machine, DeviceKind.CPU).name == "Rockchip RK3588"


def test_three_classes() -> None:
    assert [name for name, _ in cpu._by_strength({0: 1024, 1: 700, 2: 300})] == ["performance", "middle", "efficient"]
    assert [name for name, _ in cpu._by_strength({0: 0, 1: 0})] == ["performance"]


def test_caches_are_counted_once_for_those_who_share_them(machine: FakeMachine) -> None:
    x86(machine, 4)
    for n in range(4):
        pair = "0-1" if n < 2 else "2-3"
        core(machine, n, cache__index0__level="1", cache__index0__type="Data", cache__index0__size="48K")
        core(machine, n, cache__index0__shared_cpu_list=pair)
        core(machine, n, cache__index3__level="3", cache__index3__type="Unified", cache__index3__size="24M")
        core(machine, n, cache__index3__shared_cpu_list="0-3")
    assert one(machine, DeviceKind.CPU).attributes["caches"] == [
        {"level": 1, "type": "data", "bytes": 48 << 10, "count": 2},
        {"level": 3, "type": "unified", "bytes": 24 << 20, "count": 1},
    ]


def test_sockets_are_devices_of_their_own(machine: FakeMachine) -> None:
    x86(machine, 4)
    for n in (2, 3):
        core(machine, n, topology__physical_package_id="1")
    found = [device for device in detect(machine.root) if device.kind is DeviceKind.CPU]
    assert [(device.id, device.attributes["threads"]) for device in found] == [("cpu_0", 2), ("cpu_1", 2)]


def test_a_machine_of_which_nothing_can_be_read_still_has_a_processor(tmp_path: Path) -> None:
    found = detect(tmp_path / "nowhere")
    assert [device.kind for device in found] == [DeviceKind.CPU, DeviceKind.MEMORY]


def test_memory_size_and_its_modules(machine: FakeMachine) -> None:
    assert one(machine, DeviceKind.MEMORY).attributes["bytes"] == 16_000_000 * 1024
    found = {
        f"MEMORY_DEVICE_{n}_{key}": value
        for n in (0, 1)
        for key, value in {"SIZE": "17179869184", "TYPE": "DDR5", "SPEED_MTS": "5600", "DATA_WIDTH": "64"}.items()
    }
    found |= {
        "MEMORY_DEVICE_0_CONFIGURED_SPEED_MTS": "4800",
        "MEMORY_DEVICE_2_PRESENT": "0",
        "MEMORY_DEVICE_3_SIZE": "x",
    }
    modules, (bandwidth,) = memory._modules(found)
    assert modules[0] == {"bytes": 1 << 34, "type": "DDR5", "mt_s": 4800, "bits": 64}
    assert len(modules) == 2
    assert bandwidth.value == pytest.approx((4800 + 5600) * 8 / 1000)
    assert bandwidth.reference == "SMBIOS: 1 × DDR5-4800, 64 bit + 1 × DDR5-5600, 64 bit"


def test_a_tpm_with_its_nodes_and_banks(machine: FakeMachine) -> None:
    machine.device("LNXSYSTM:00/MSFT0101:00", "acpi", driver="tpm_crb")
    machine.device(
        "LNXSYSTM:00/MSFT0101:00/tpm/tpm0", "tpm", bus=False, tpm_version_major="2", dev="10:224", uevent="DEVNAME=tpm0"
    )
    machine.link("sys/devices/LNXSYSTM:00/MSFT0101:00/tpm/tpm0/device", "sys/devices/LNXSYSTM:00/MSFT0101:00")
    machine.write("sys/devices/LNXSYSTM:00/MSFT0101:00/tpm/tpm0/pcr-sha256/0", "00")
    machine.device("LNXSYSTM:00/MSFT0101:00/tpmrm/tpmrm0", "tpmrm", bus=False, uevent="DEVNAME=tpmrm0")
    found = one(machine, DeviceKind.TPM)
    assert (found.id, found.name, found.driver) == ("tpm0", "TPM 2.0", "tpm_crb")
    assert found.nodes == ("/dev/tpmrm0", "/dev/tpm0")
    assert found.attributes == {"version": "2.0", "pcr_banks": ["sha256"]}
    assert found.state is DriverState.WORKING


def test_a_tpm_that_only_the_firmware_knows(machine: FakeMachine) -> None:
    machine.device("LNXSYSTM:00/MSFT0101:00", "acpi", status="0")
    assert not [device for device in detect(machine.root) if device.kind is DeviceKind.TPM]
    machine.write("sys/devices/LNXSYSTM:00/MSFT0101:00/status", "15\n")
    found = one(machine, DeviceKind.TPM)
    assert found.state is DriverState.NO_DRIVER
    assert "tpm_crb" in found.hint


def test_hwmon_chips_are_named_by_where_they_sit(machine: FakeMachine) -> None:
    chip = {"name": "k10temp", "temp1_input": "45000", "temp1_label": "Tctl", "power1_average": "9000000"}
    machine.pci("0000:00:18.3", "1022:12fb", "0x060000", driver="k10temp")
    for number in ("hwmon3", "hwmon7"):
        # The number is the driver's turn; another boot, another number.
        folder = machine.device(f"pci0000:00/0000:00:18.3/hwmon/{number}", "hwmon", bus=False, **chip)
        machine.link(
            f"sys/devices/pci0000:00/0000:00:18.3/hwmon/{number}/device", "sys/devices/pci0000:00/0000:00:18.3"
        )
        found = one(machine, DeviceKind.SENSOR)
        assert found.id == "sensor_hwmon_k10temp_0000_00_18_3"
        assert (found.bus, found.address, found.driver) == ("pci", "0000:00:18.3", "k10temp")
        assert found.attributes["channels"] == [
            {"file": "power1_average", "measures": "power", "unit": "µW"},
            {"file": "temp1_input", "measures": "temperature", "unit": "m°C", "label": "Tctl"},
        ]
        (machine.root / f"sys/class/hwmon/{number}").unlink()
        assert folder.is_dir()


def test_powercap_says_who_may_read_it(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = machine.device(
        "virtual/powercap/intel-rapl/intel-rapl:0",
        "powercap",
        bus=False,
        name="package-0",
        energy_uj="1",
        constraint_0_power_limit_uw="25000000",
    )
    inner = f"virtual/powercap/intel-rapl/{zone.name}/intel-rapl:0:0"
    machine.device(inner, "powercap", bus=False, name="core", energy_uj="1")
    found = one(machine, DeviceKind.SENSOR)
    assert (found.id, found.name, found.state) == ("sensor_powercap_intel_rapl_0", "package-0", DriverState.WORKING)
    assert found.attributes["limits"] == 1
    channels = found.attributes["channels"]
    assert isinstance(channels, list)
    assert [channel["file"] for channel in channels] == ["energy_uj", "intel-rapl:0:0/energy_uj"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = one(machine, DeviceKind.SENSOR)
    assert found.state is DriverState.NO_PERMISSION
    assert "root" in found.hint


def test_thermal_zones_with_one_name_have_ids_of_their_own(machine: FakeMachine) -> None:
    for n in (0, 1):
        machine.device(
            f"virtual/thermal/thermal_zone{n}",
            "thermal",
            bus=False,
            type="acpitz",
            temp="40000",
            trip_point_0_type="critical",
            trip_point_0_temp="105000",
        )
    found = [device for device in detect(machine.root) if device.kind is DeviceKind.SENSOR]
    assert [device.id for device in found] == ["sensor_thermal_acpitz", "sensor_thermal_acpitz_2"]
    assert found[0].attributes["trips"] == [{"type": "critical", "millidegrees": 105_000}]


def test_a_thermal_zones_shadow_in_hwmon_is_not_told_twice(machine: FakeMachine) -> None:
    machine.device("virtual/thermal/thermal_zone0", "thermal", bus=False, type="acpitz", temp="40000")
    machine.device("virtual/thermal/thermal_zone0/hwmon0", "hwmon", bus=False, name="acpitz", temp1_input="40000")
    machine.link("sys/devices/virtual/thermal/thermal_zone0/hwmon0/device", "sys/devices/virtual/thermal/thermal_zone0")
    assert one(machine, DeviceKind.SENSOR).id == "sensor_thermal_acpitz"
