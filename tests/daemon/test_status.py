from __future__ import annotations

import time
from pathlib import Path

import pytest

from ai_assistant.daemon import sensors
from ai_assistant.daemon.status import Machine
from tests.support.recovery import ENCRYPTED, describe, flag, key_waits

MEMINFO = "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:   8000 kB\n"
FIB = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
     |-- 192.0.2.7
        /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
     |-- 169.254.3.4
        /32 host LOCAL
"""
INET6 = (
    "20010db8000000000000000000000005 02 40 00 80     eth0\n"
    "fe800000000000000000000000000001 02 40 20 80     eth0\n"
    "00000000000000000000000000000001 01 80 10 80       lo\n"
)


def put(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "proc/meminfo", MEMINFO)
    put(tmp_path, "proc/loadavg", "0.52 0.58 0.59 1/389 12345\n")
    put(tmp_path, "proc/uptime", "350.25 1234.5\n")
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Mini CPU\n\nprocessor\t: 1\nmodel name\t: Mini CPU\n")
    put(tmp_path, "proc/sys/kernel/hostname", "box\n")
    put(tmp_path, "proc/sys/kernel/osrelease", "6.12.0\n")
    put(tmp_path, "proc/net/fib_trie", FIB)
    put(tmp_path, "proc/net/if_inet6", INET6)
    put(tmp_path, "etc/os-release", 'NAME="X"\nPRETTY_NAME="AI Assistant OS 1"\n')
    put(tmp_path, "usr/lib/ai-assistant/profile", "developer\n")
    return tmp_path


def test_status_of_a_described_machine(root: Path) -> None:
    put(root, "sys/class/hwmon/hwmon0/name", "coretemp")
    put(root, "sys/class/hwmon/hwmon0/temp1_input", "51000")
    put(root, "sys/class/hwmon/hwmon0/temp1_label", "Package id 0")
    put(root, "sys/class/hwmon/hwmon0/temp2_input", "48000")
    put(root, "sys/class/hwmon/hwmon1/name", "nvme")
    put(root, "sys/class/hwmon/hwmon1/temp1_input", "70000")
    put(root, "sys/class/thermal/thermal_zone0/type", "acpitz")
    put(root, "sys/class/thermal/thermal_zone0/temp", "27800")
    status = Machine(root, root).status()
    assert status["hostname"] == "box"
    assert status["os"] == "AI Assistant OS 1"
    assert status["kernel"] == "6.12.0"
    assert (status["uptime_s"], status["load_1m"]) == (350.25, 0.52)
    assert (status["memory_total_bytes"], status["memory_available_bytes"]) == (16_384_000, 8_192_000)
    assert (status["cpu"], status["cores"]) == ("Mini CPU", 2)
    assert status["temperature_c"] == 51.0
    assert {"name": "nvme", "celsius": 70.0} in status["temperatures"]
    assert {"name": "acpitz", "celsius": 27.8} in status["temperatures"]
    assert status["addresses"] == ["192.0.2.7", "2001:db8::5"]
    assert status["profile"] == "developer"
    assert 0 < status["disk_free_bytes"] <= status["disk_total_bytes"]


def test_what_is_not_measured_is_none(tmp_path: Path) -> None:
    status = Machine(tmp_path, tmp_path / "missing").status()
    for key in (
        "temperature_c",
        "watts",
        "memory_available_bytes",
        "disk_free_bytes",
        "cpu",
        "cores",
        "uptime_s",
        "os",
    ):
        assert status[key] is None, key
    assert (status["watts_source"], status["temperatures"], status["addresses"]) == ("none", [], [])
    assert status["profile"] == "unknown"


def test_the_storage_is_reported_as_what_it_is(root: Path) -> None:
    status = Machine(root, root).status()
    assert (status["storage_encryption"], status["recovery_key_pending"]) == ("unknown", False)
    assert "container" in status["storage_reason"]
    describe(root, ENCRYPTED)
    key_waits(root)
    machine = Machine(root, root)
    status = machine.status()
    assert (status["storage_encryption"], status["storage_reason"]) == ("tpm2", "")
    assert (status["storage_opened_by"], status["secure_boot"], status["recovery_key_pending"]) == ("tpm2", "on", True)
    # It is acknowledged, and the record turns out to be damaged: both are seen without a restart.
    flag(root).unlink()
    describe(root, b"{")
    assert not machine.recovery_key_pending()
    assert machine.status()["storage_encryption"] == "unknown"


@pytest.mark.parametrize("text", ["0", "-128000", "200000", "", "nan", "x"])
def test_implausible_temperatures_are_left_out(root: Path, text: str) -> None:
    put(root, "sys/class/hwmon/hwmon0/name", "k10temp")
    put(root, "sys/class/hwmon/hwmon0/temp1_input", text)
    assert sensors.temperatures(root) == []


def test_watts_from_energy_and_its_overflow(root: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0/"
    put(root, zone + "energy_uj", "900000")
    put(root, zone + "max_energy_range_uj", "1000000")
    put(root, "sys/class/powercap/intel-rapl:0:0/energy_uj", "5")
    watts = sensors.Watts(root)
    assert watts.read() == (None, "rapl")
    time.sleep(0.05)
    put(root, zone + "energy_uj", "400000")
    value, source = watts.read()
    assert source == "rapl"
    assert value is not None
    # 0.5 J in at least 0.05 s.
    assert 0 < value <= 10.0


def test_watts_from_a_meter(root: Path) -> None:
    put(root, "sys/class/hwmon/hwmon0/name", "power_meter")
    put(root, "sys/class/hwmon/hwmon0/device/power1_average", "23500000")
    assert sensors.Watts(root).read() == (23.5, "hwmon")
