"""Reads what the kernel says about the machine. Every path is below a root, so tests bring their own.

None means that nothing here measures it; no value is ever made up.
"""

from __future__ import annotations

import ipaddress
import os
import time
from dataclasses import dataclass
from pathlib import Path

_MAX_BYTES = 1 << 20


def read_text(path: Path) -> str | None:
    """The stripped content of a small file, or None."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode(errors="replace").strip()
    except (OSError, ValueError):
        return None


def read_int(path: Path) -> int | None:
    """The integer in a small file, or None."""
    text = read_text(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None


def cpu(root: Path) -> tuple[str | None, int | None]:
    """(model name, logical processors)."""
    name, count = None, 0
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor":
            count += 1
        elif key in ("model name", "Model") and name is None:
            name = value
    return name, count or None


@dataclass(frozen=True, slots=True)
class Temperature:
    name: str
    celsius: float
    is_cpu: bool = False


_CPU_CHIPS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal"})
_CPU_ZONES = ("x86_pkg_temp", "cpu", "soc", "TCPU")


def temperatures(root: Path) -> list[Temperature]:
    """Every sensor with a plausible reading: hwmon chips, and thermal zones that are no hwmon chip as well."""
    found: list[Temperature] = []
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = read_text(chip / "name") or chip.name
        for file in sorted(chip.glob("temp*_input")):
            value = _celsius(file)
            if value is not None:
                label = read_text(file.with_name(file.name.replace("_input", "_label")))
                found.append(Temperature(f"{name} {label}" if label else name, value, name in _CPU_CHIPS))
    chips = {each.name.partition(" ")[0] for each in found}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name = read_text(zone / "type") or zone.name
        value = _celsius(zone / "temp")
        if value is not None and name not in chips:
            found.append(Temperature(name, value, name.startswith(_CPU_ZONES)))
    return found


def _celsius(path: Path) -> float | None:
    value = read_int(path)
    # Unconnected inputs read as 0 or as far below freezing; nothing that computes is hotter than 150.
    if value is None or not -40_000 < value < 150_000 or value == 0:
        return None
    return value / 1000


def cpu_temperature(found: list[Temperature]) -> float | None:
    """The hottest sensor of processor or package, in degrees Celsius."""
    return max((each.celsius for each in found if each.is_cpu), default=None)


class Watts:
    """Electrical power: RAPL energy between two readings, or a meter in hwmon.

    RAPL counters are usually readable by root only; then a meter is used, and if there is none nothing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last: tuple[float, dict[str, int]] | None = None

    def read(self) -> tuple[float | None, str]:
        """(watts, "rapl" | "hwmon" | "none"); the first RAPL reading has no interval yet and gives None."""
        packages = self._energy()
        if packages:
            now = time.monotonic()
            last, self._last = self._last, (now, packages)
            # The mean over a long silence says nothing about now, and the counter may have wrapped twice.
            if last is None or not 0.01 < now - last[0] < 60:
                return None, "rapl"
            used = 0
            for path, energy in packages.items():
                before = last[1].get(path, energy)
                step = energy - before
                if step < 0:
                    step += read_int(Path(path).with_name("max_energy_range_uj")) or 0
                used += max(0, step)
            return used / 1e6 / (now - last[0]), "rapl"
        for chip in sorted((self._root / "sys/class/hwmon").glob("hwmon*")):
            for folder in (chip, chip / "device"):
                for name in ("power1_average", "power1_input"):
                    value = read_int(folder / name)
                    if value is not None:
                        return value / 1e6, "hwmon"
        return None, "none"

    def _energy(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for package in sorted((self._root / "sys/class/powercap").glob("intel-rapl:[0-9]*")):
            # Sub-zones have two colons and are contained in their package.
            if package.name.count(":") == 1:
                value = read_int(package / "energy_uj")
                if value is not None:
                    found[str(package / "energy_uj")] = value
        return found


def addresses(root: Path) -> list[str]:
    """IPv4, then IPv6 addresses of the machine, loopback and link-local ones left out.

    From /proc, because the daemon has no right to open a network socket of any kind.
    """
    found: list[str] = []
    previous = ""
    for line in (read_text(root / "proc/net/fib_trie") or "").splitlines():
        if line.strip().endswith("host LOCAL") and "|-- " in previous:
            address = previous.rpartition("|-- ")[2].strip()
            if not address.startswith(("127.", "169.254.")) and address not in found:
                found.append(address)
        previous = line
    for line in (read_text(root / "proc/net/if_inet6") or "").splitlines():
        parts = line.split()
        if len(parts) == 6 and parts[3] == "00" and parts[5] != "lo":
            found.append(str(ipaddress.IPv6Address(int(parts[0], 16))))
    return found


def disk(path: Path) -> tuple[int | None, int | None]:
    """(total, free for us) in bytes of the file system that holds `path`."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None, None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
