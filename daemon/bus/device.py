"""org.ai_assistant1.Device: one object for each piece of hardware that was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ai_assistant.daemon.devices import DeviceTable
from ai_assistant.services.values import variants

INTERFACE = "org.ai_assistant1.Device"


def _fit(value: Any) -> Any:
    """What a driver wrote into sysfs, as D-Bus can carry it: no null in lists, no integer beyond 64 bits."""
    if isinstance(value, Mapping):
        return {str(key): _fit(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_fit(each) for each in value if each is not None]
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return float(value)
    return value


class DeviceObject:
    def __init__(self, devices: DeviceTable, name: str) -> None:
        self._devices = devices
        self._name = name

    def properties(self) -> Mapping[str, Any]:
        device = self._devices.get(self._name)
        return {
            "Id": device.id,
            "Kind": str(device.kind),
            "Name": device.name,
            "Vendor": device.vendor,
            "Bus": device.bus,
            "Address": device.address,
            "VendorId": device.vendor_id,
            "ProductId": device.product_id,
            "Driver": device.driver,
            "State": str(device.state),
            "Hint": device.hint,
            "Nodes": list(device.nodes),
            "Attributes": variants(_fit(device.attributes)),
            "Throughput": [variants({**each.to_dict(), "value": float(each.value)}) for each in device.throughput],
        }
