"""TPMs: of the firmware or a chip of its own; a machine that has one without a driver says so in its ACPI tables."""

from __future__ import annotations

from pathlib import Path

from ai_assistant.hal.detect import sysfs
from ai_assistant.hal.detect.sysfs import Sysfs
from ai_assistant.hal.device import Device, DeviceKind, DriverState, Json, object_name

# The ACPI id of a TPM 2.0 (TCG ACPI specification).
ACPI_TPM2 = "MSFT0101"


def detect(machine: Sysfs) -> list[Device]:
    found = [_tpm(machine, device) for device in machine.devices("tpm")]
    return found or _without_driver(machine)


def _tpm(machine: Sysfs, device: Path) -> Device:
    """Whether this process may open it is not judged: nobody but the vault is meant to."""
    attributes: dict[str, Json] = {}
    version = sysfs.number(device / "tpm_version_major")
    if version in (1, 2):
        attributes["version"] = "2.0" if version == 2 else "1.2"
    banks: list[Json] = [
        sysfs.clean(name.removeprefix("pcr-")) for name in sysfs.names(device) if name.startswith("pcr-")
    ]
    if banks:
        attributes["pcr_banks"] = banks
    nodes = [machine.node(device)]
    # The resource manager's node: several programs at once.
    nodes += [machine.node(one) for one in machine.devices("tpmrm") if one.name == device.name.replace("tpm", "tpmrm")]
    return Device(
        id=object_name(device.name),
        kind=DeviceKind.TPM,
        name=f"TPM {attributes.get('version', '')}".strip(),
        bus=sysfs.link(device / "device/subsystem"),
        address=sysfs.link(device / "device"),
        driver=sysfs.driver(device / "device"),
        nodes=tuple(node for node in reversed(nodes) if node),
        attributes=attributes,
    )


def _without_driver(machine: Sysfs) -> list[Device]:
    acpi = [device for device in machine.devices("acpi") if device.name.startswith(ACPI_TPM2)]
    table = machine.path("sys/firmware/acpi/tables/TPM2").exists()
    if not table and not any(sysfs.number(device / "status") == 15 for device in acpi):
        return []
    return [
        Device(
            id="tpm0",
            kind=DeviceKind.TPM,
            name="TPM 2.0",
            bus="acpi",
            address=sysfs.clean(acpi[0].name) if acpi else "",
            state=DriverState.NO_DRIVER,
            hint="the firmware has a TPM, but no driver has taken it: modprobe tpm_crb; modprobe tpm_tis",
        )
    ]
