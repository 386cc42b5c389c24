"""The state of the machine, JSON-ready, for the bus, the socket and the console. Keys: daemon/README.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ai_assistant.daemon import sensors
from ai_assistant.daemon.sensors import read_text
from ai_assistant.hal.meminfo import memory
from ai_assistant.tee import storage
from ai_assistant.tee.storage import Storage

_PROFILES = frozenset({"developer", "production", "test"})


class Machine:
    """Reads the machine below `root`; what does not change is read once."""

    def __init__(self, root: Path, state_directory: Path) -> None:
        self._root = root
        self._state_directory = state_directory
        self._watts = sensors.Watts(root)
        self._cpu, self._cores = sensors.cpu(root)
        self._os = _os_name(root)
        self.profile = _profile(root)

    def memory_available(self) -> int | None:
        """Bytes that programs can still have without swapping."""
        return memory(self._root)[1]

    def memory_total(self) -> int | None:
        """Bytes of the machine's memory."""
        return memory(self._root)[0]

    def disk_free(self) -> int | None:
        """Bytes free for us where models are kept."""
        return sensors.disk(self._state_directory)[1]

    def storage(self) -> Storage:
        """How the storage is protected, as it was written down at boot."""
        return storage.read(self._root)

    def recovery_key_pending(self) -> bool:
        """Whether a recovery key waits to be acknowledged."""
        return storage.pending(self._root)

    def status(self) -> dict[str, Any]:
        """Everything that this machine can tell; None where nothing measures it."""
        root = self._root
        total, available = memory(root)
        disk_total, disk_free = sensors.disk(self._state_directory)
        found = sensors.temperatures(root)
        watts, source = self._watts.read()
        protected = self.storage()
        return {
            "hostname": read_text(root / "proc/sys/kernel/hostname") or os.uname().nodename,
            "os": self._os,
            "kernel": read_text(root / "proc/sys/kernel/osrelease"),
            "uptime_s": _first_number(root / "proc/uptime"),
            "load_1m": _first_number(root / "proc/loadavg"),
            "memory_total_bytes": total,
            "memory_available_bytes": available,
            "disk_total_bytes": disk_total,
            "disk_free_bytes": disk_free,
            "temperature_c": sensors.cpu_temperature(found),
            "temperatures": [{"name": each.name, "celsius": each.celsius} for each in found],
            "watts": watts,
            "watts_source": source,
            "cpu": self._cpu,
            "cores": self._cores,
            "addresses": sensors.addresses(root),
            "profile": self.profile,
            "storage_encryption": str(protected.encryption),
            "storage_reason": protected.reason,
            "storage_opened_by": protected.opened_by,
            "secure_boot": str(protected.secure_boot),
            "recovery_key_pending": self.recovery_key_pending(),
        }


def _first_number(path: Path) -> float | None:
    text = read_text(path)
    try:
        return float(text.split()[0]) if text else None
    except ValueError:
        return None


def _os_name(root: Path) -> str | None:
    for path in (root / "etc/os-release", root / "usr/lib/os-release"):
        for line in (read_text(path) or "").splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip("\"'")
    return None


def _profile(root: Path) -> str:
    text = read_text(root / "usr/lib/ai-assistant/profile")
    return text if text in _PROFILES else "unknown"
