"""Garbage in sysfs: detection reports what it can, and never raises, hangs or says what cannot be sent on."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from ai_assistant.hal.detect import detect, sysfs
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, DriverState
from tests.hal.detect.fake import FakeMachine


def rich(machine: FakeMachine) -> None:
    """A bit of everything."""
    machine.write("proc/cpuinfo", "processor\t: 0\nflags\t\t: lm avx2\n\nprocessor\t: 1\nflags\t\t: lm avx2\n\n")
    machine.write("sys/devices/system/cpu/online", "0-1\n")
    for n in (0, 1):
        machine.write(f"sys/devices/system/cpu/cpu{n}/topology/physical_package_id", "0\n")
        machine.write(f"sys/devices/system/cpu/cpu{n}/topology/core_cpus_list", f"{n}\n")
        machine.write(f"sys/devices/system/cpu/cpu{n}/cpufreq/cpuinfo_max_freq", "3000000\n")
        for key, value in {"level": "1", "type": "Data", "size": "32K", "shared_cpu_list": str(n)}.items():
            machine.write(f"sys/devices/system/cpu/cpu{n}/cache/index0/{key}", value)
    machine.aliases("pci:v00008086d00007D1Dsv*sd*bc*sc*i* intel_vpu")
    npu = machine.pci("0000:00:0b.0", "8086:7d1d", "0x120000", driver="intel_vpu", uevent="DRIVER=intel_vpu")
    machine.node(npu, "accel", "accel0", "accel/accel0")
    gpu = machine.pci("0000:00:02.0", "1002:150e", "0x030000", driver="amdgpu", mem_info_vram_total="1", boot_vga="1")
    machine.node(gpu, "drm", "renderD128", "dri/renderD128")
    machine.pci("0000:01:00.0", "1e60:2864", "0x120000", modalias="pci:v00001E60d00002864sv0sd0bc12sc00i00")
    machine.device("usb2/2-1", "usb", idVendor="18d1", idProduct="9302", busnum="2", devnum="7", speed="480")
    machine.device("platform/fdab0000.npu", "platform", uevent="OF_COMPATIBLE_0=rockchip,rk3588-rknn-core")
    machine.device("x/tpm/tpm0", "tpm", bus=False, tpm_version_major="2", uevent="DEVNAME=tpm0")
    machine.device("x/hwmon/hwmon0", "hwmon", bus=False, temp1_input="1", temp1_label="CPU")
    machine.device("x/intel-rapl:0", "powercap", bus=False, energy_uj="1", constraint_0_power_limit_uw="1")
    machine.device("x/thermal_zone0", "thermal", bus=False, type="x86", trip_point_0_type="hot", trip_point_0_temp="9")


GARBAGE = [
    b"",
    b"\0" * 100,
    b"\xff\xfe\x80garbage\x00\x1b[31m\n",
    b"9" * 5000,
    b"-1\n",
    b"0x\n",
    b"0xffffffffffffffffffff\n",
    b"1e400\n",
    b"nan\n",
    b"0-99999999999\n",
    b"3-1,,-,5-\n",
    "²\n".encode(),
    b"../../../../etc/passwd\n",
    b"DEVNAME=../../etc/shadow\nDRIVER=\0\n",
    b"processor : 99999999999999999999\nflags :\n\n" * 50,
    b"A" * 300_000,
    "‮\udcff".encode("utf-8", "surrogatepass"),
]


def check(found: tuple[Device, ...]) -> None:
    """What anybody who gets the devices relies on."""
    text = json.dumps([device.to_dict() for device in found], ensure_ascii=False).encode()
    assert tuple(Device.from_dict(one) for one in json.loads(text)) == found
    assert len({device.id for device in found}) == len(found)
    kinds = [device.kind for device in found]
    assert DeviceKind.CPU in kinds
    assert DeviceKind.MEMORY in kinds
    for device in found:
        assert device.name
        assert b"\\u00" not in json.dumps(device.to_dict(), ensure_ascii=False).encode(), "control characters"
        assert all(node.startswith("/dev/") and ".." not in node for node in device.nodes)
        assert device.hint or device.state is DriverState.WORKING


def files(root: Path) -> list[Path]:
    return sorted(path for top in ("sys", "proc", "lib") for path in (root / top).rglob("*") if path.is_file())


def test_the_machine_that_is_spoiled_below_is_read_whole(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    rich(machine)
    found = detect(tmp_path)
    check(found)
    kinds = [device.kind.value for device in found]
    assert (kinds.count("npu"), kinds.count("gpu"), kinds.count("tpm"), kinds.count("sensor")) == (4, 1, 1, 3)


@pytest.mark.parametrize("seed", range(40))
def test_files_are_replaced_by_garbage(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    machine = FakeMachine(tmp_path)
    rich(machine)
    for path in files(tmp_path):
        if rng.random() < 0.5:
            path.write_bytes(rng.choice(GARBAGE) if rng.random() < 0.8 else rng.randbytes(rng.randrange(200)))
    check(detect(tmp_path))


@pytest.mark.parametrize("seed", range(20))
def test_entries_vanish_or_become_something_else(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    machine = FakeMachine(tmp_path)
    rich(machine)
    for path in files(tmp_path):
        if rng.random() < 0.3:
            path.unlink()
            match rng.randrange(6):
                case 0:
                    path.mkdir()
                case 1:
                    path.symlink_to(path.name)  # a loop
                case 2:
                    os.mkfifo(path)  # nobody will ever write to it
                case 3:
                    path.symlink_to("/dev/zero")  # never ends
                case 4:
                    path.symlink_to("/nonexistent")
    check(detect(tmp_path))


def test_links_of_devices_that_loop_or_leave_the_machine(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    rich(machine)
    devices = tmp_path / "sys/bus/pci/devices"
    (devices / "a").symlink_to("b")
    (devices / "b").symlink_to("a")
    (devices / "c").symlink_to("/etc")
    (devices / "d").symlink_to("../../../../../..")
    (devices / "e").write_text("no folder")
    # Looks like a device, but lies outside of sysfs.
    for key, value in {"class": "0x120000", "vendor": "0x8086", "device": "0x7d1d"}.items():
        machine.write(f"dev/f/{key}", value)
    (devices / "f").symlink_to(tmp_path / "dev/f")
    loop = tmp_path / "sys/devices/pci0000:00/0000:00:0b.0/accel/again"
    loop.symlink_to("..")
    before = {device.id for device in detect(tmp_path)}
    check(detect(tmp_path))
    assert not {name for name in before if name.endswith(("_a", "_b", "_c", "_d", "_e", "_f"))}


def test_a_device_that_vanishes_between_listing_and_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(tmp_path)
    rich(machine)
    really = Sysfs.devices

    def then_gone(self: Sysfs, subsystem: str) -> list[Path]:
        found = really(self, subsystem)
        for path in (path for path in found if path.name == "0000:00:0b.0"):
            for left in sorted(path.rglob("*"), reverse=True):
                left.unlink() if left.is_symlink() or left.is_file() else left.rmdir()
            path.rmdir()
        return found

    monkeypatch.setattr(Sysfs, "devices", then_gone)
    check(detect(tmp_path))


def test_thousands_of_devices_and_a_huge_name(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    for n in range(300):
        machine.device(f"virtual/thermal_zone{n}", "thermal", bus=False, type="x" * 250, temp="1")
    found = detect(tmp_path)
    check(found)
    assert sum(device.kind is DeviceKind.SENSOR for device in found) == 300


def test_no_file_is_read_to_its_end_where_it_has_none(tmp_path: Path) -> None:
    assert len(sysfs.raw(Path("/dev/zero"), 1000)) == 1000
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert sysfs.raw(fifo) == b""
    assert sysfs.raw(Path("bad\0name")) == b""


def test_numbers_and_lists() -> None:
    assert sysfs.integer("0x8086") == 0x8086
    assert sysfs.integer("-5") == -5
    for wrong in ("", " 1", "1 ", "+1", "1_000", "٣", "0b1", "1.0", "9" * 19, "0x" + "f" * 16):
        assert sysfs.integer(wrong) is None, wrong
    assert sysfs.cpus("0-3,8,x,6-5,-1") == [0, 1, 2, 3, 8]
    assert sysfs.cpus("0-99999999") == []
    assert sysfs.cpus("") == []
    assert sorted(["accel10", "accel2", "a", "٣", "²"], key=sysfs.natural)[:3] == ["a", "accel2", "accel10"]


def test_text_has_nothing_that_a_terminal_would_obey() -> None:
    assert sysfs.clean("\x1b[31mred\x07\0\n") == "[31mred"
    sysfs.clean("\udcff").encode()
