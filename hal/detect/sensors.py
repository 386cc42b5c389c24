"""Sensors of power and temperature: hwmon chips, powercap zones and thermal zones.

Only what is there is told, never a reading: that would differ each time, and could wake a sleeping device.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ai_assistant.hal.detect import sysfs
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, DriverState, Json, object_name

# What a channel's name begins with, what it measures, and in which unit the file counts.
CHANNELS = {
    "temp": ("temperature", "m°C"),
    "power": ("power", "µW"),
    "energy": ("energy", "µJ"),
    "in": ("voltage", "mV"),
    "curr": ("current", "mA"),
    "fan": ("fan", "rpm"),
    "freq": ("clock", "Hz"),
}
MAX_CHANNELS = 128


def detect(machine: Sysfs) -> list[Device]:
    return [*_hwmon(machine), *_powercap(machine), *_thermal(machine)]


def _hwmon(machine: Sysfs) -> list[Device]:
    found = []
    for chip in machine.devices("hwmon"):
        parent = machine.real(chip / "device")
        # A thermal zone's shadow: the zone itself is found below.
        if parent is not None and sysfs.link(parent / "subsystem") == "thermal":
            continue
        name = sysfs.text(chip / "name") or sysfs.text(chip / "device/name") or "hwmon"
        channels = _channels(machine, chip) or _channels(machine, chip / "device")
        if not channels:
            continue
        # Numbers of hwmon chips change with the order of drivers; where the chip sits does not.
        place = parent.name if parent is not None else ""
        if place == name:
            place = ""
        found.append(
            Device(
                id=object_name("sensor_hwmon", name, place),
                kind=DeviceKind.SENSOR,
                name=name,
                bus=sysfs.link(parent / "subsystem") if parent is not None else "",
                address=sysfs.clean(place),
                driver=sysfs.driver(parent) if parent is not None else "",
                attributes={"interface": "hwmon", "channels": channels},
            )
        )
    return found


def _channels(machine: Sysfs, folder: Path) -> list[Json]:
    found: list[Json] = []
    for name in sysfs.names(folder):
        match = re.fullmatch(r"([a-z]{2,6})(\d{1,3})_(input|average)", name)
        if not match or match[1] not in CHANNELS or len(found) >= MAX_CHANNELS:
            continue
        if match[3] == "average" and (folder / f"{match[1]}{match[2]}_input").exists():
            continue
        measures, unit = CHANNELS[match[1]]
        one: dict[str, Json] = {"file": name, "measures": measures, "unit": unit}
        if label := sysfs.text(folder / f"{match[1]}{match[2]}_label"):
            one["label"] = label
        found.append(one)
    return found


def _powercap(machine: Sysfs) -> list[Device]:
    found = []
    for zone in machine.devices("powercap"):
        # Zones, and zones in zones ("intel-rapl:0:1"), which are channels of the outer one.
        if not re.fullmatch(r"[\w-]{1,32}:\d{1,3}", zone.name):
            continue
        inner = [zone, *(zone / name for name in sysfs.names(zone) if name.startswith(f"{zone.name}:"))][:16]
        channels: list[Json] = []
        readable = True
        for one in inner:
            if (one / "energy_uj").exists():
                prefix = "" if one == zone else f"{one.name}/"
                label = sysfs.text(one / "name")
                channels.append(
                    {"file": f"{sysfs.clean(prefix)}energy_uj", "measures": "energy", "unit": "µJ", "label": label}
                )
                readable = readable and os.access(one / "energy_uj", os.R_OK)
        limits = sum(name.endswith("_power_limit_uw") for name in sysfs.names(zone))
        if not channels and not limits:
            continue
        hint = (
            "since Linux 5.10 only root reads energy counters; the power service does, and tells the watts on the bus"
        )
        found.append(
            Device(
                id=object_name("sensor_powercap", zone.name),
                kind=DeviceKind.SENSOR,
                name=sysfs.text(zone / "name") or sysfs.clean(zone.name),
                bus="powercap",
                address=sysfs.clean(zone.name),
                state=DriverState.WORKING if readable else DriverState.NO_PERMISSION,
                hint="" if readable else hint,
                attributes={"interface": "powercap", "channels": channels, "limits": limits},
            )
        )
    return found


def _thermal(machine: Sysfs) -> list[Device]:
    found = []
    for zone in machine.devices("thermal"):
        if not re.fullmatch(r"thermal_zone\d{1,4}", zone.name):
            continue
        kind = sysfs.text(zone / "type") or "thermal"
        trips: list[Json] = []
        for name in sysfs.names(zone):
            if match := re.fullmatch(r"trip_point_(\d{1,3})_type", name):
                at = sysfs.number(zone / f"trip_point_{match[1]}_temp")
                if at is not None and 0 < at < 1_000_000:
                    trips.append({"type": sysfs.text(zone / name), "millidegrees": at})
        found.append(
            Device(
                id=object_name("sensor_thermal", kind),
                kind=DeviceKind.SENSOR,
                name=kind,
                bus="thermal",
                address=zone.name,
                attributes={
                    "interface": "thermal",
                    "channels": [{"file": "temp", "measures": "temperature", "unit": "m°C"}],
                    "trips": trips,
                },
            )
        )
    return found
