"""`ai-assistant status`: how the appliance is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from ai_assistant.cli.options import Debug, Json
from ai_assistant.cli.output import Output, duration, size
from ai_assistant.cli.storage import SHOW_KEY
from ai_assistant.tee import storage
from ai_assistant.tee.storage import Storage


def status(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Show how the appliance is.

    State, address, models, temperature, watts, disk and memory. What nothing measures is said so.

    \b
    Examples:
      ai-assistant status
      ai-assistant status --json | jq .watts
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        found = client.status()
    if out.json:
        out.document(found)
    else:
        out.fields(described(found))


def described(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The state as name and value, for people. What nothing measures is said to be unmeasured."""
    models = status["models"] or []
    waits = [("recovery key", f"waits to be written down: {SHOW_KEY}")] if status.get("recovery_key_pending") else []
    return [
        ("appliance", " · ".join(_known(status["hostname"], status["os"], status["profile"])) or "unknown"),
        ("version", str(status["version"] or "unknown")),
        ("state", str(status["state"] or "unknown")),
        ("address", ", ".join(status["addresses"] or ()) or "no network"),
        ("models", ", ".join(f"{each['name']} ({each['state']})" for each in models) or "none"),
        ("running", _generations(status["running"])),
        ("temperature", temperature(status)),
        ("power", watts(status)),
        ("memory", _free(status["memory_available_bytes"], status["memory_total_bytes"])),
        ("storage", protection(status).sentence()),
        ("disk", _free(status["disk_free_bytes"], status["disk_total_bytes"])),
        ("processor", _processor(status)),
        ("up", duration(status["uptime_s"])),
        *waits,
    ]


def watts(status: Mapping[str, Any]) -> str:
    value, source = status.get("watts"), status.get("watts_source") or "none"
    if not isinstance(value, int | float):
        # A meter of energy needs a second look before it knows a power.
        return "no sensor" if source == "none" else f"not measured yet ({source})"
    return f"{value:.1f} W" + (f" ({source})" if source != "none" else "")


def temperature(status: Mapping[str, Any]) -> str:
    value = status.get("temperature_c")
    return "no sensor" if value is None else f"{value:.1f} °C"


def protection(status: Mapping[str, Any]) -> Storage:
    """How the storage is protected; unknown where the daemon does not say."""
    keys = ("storage_encryption", "storage_reason", "storage_opened_by", "secure_boot")
    return storage.told(*(status.get(each) for each in keys))


def _known(*values: Any) -> list[str]:
    return [str(value) for value in values if value]


def _generations(running: int | None) -> str:
    if running is None:
        return "unknown"
    return "no generation" if not running else f"{running} generation{'s' if running > 1 else ''}"


def _free(free: int | None, total: int | None) -> str:
    return "unknown" if free is None or total is None else f"{size(free)} free of {size(total)}"


def _processor(status: Mapping[str, Any]) -> str:
    cores, load = status["cores"], status["load_1m"]
    parts = _known(status["cpu"], cores and f"{cores} core{'s' if cores > 1 else ''}")
    if load is not None:
        parts.append(f"load {load:.2f}")
    return ", ".join(parts) or "unknown"
