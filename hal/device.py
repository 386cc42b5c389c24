"""What detection says about one piece of hardware: plain values, for the bus, the command line and backends.

`Device.to_dict` and `Device.from_dict` are its form as JSON; unknown keys are let pass, so that an older client reads
what a newer daemon sends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self, TypeAlias, TypeVar

from ai_assistant.errors import InvalidArgument

Json: TypeAlias = str | int | float | bool | Sequence["Json"] | Mapping[str, "Json"] | None

MAX_ID = 96


class DeviceKind(StrEnum):
    CPU = "cpu"
    GPU = "gpu"
    NPU = "npu"
    MEMORY = "memory"
    TPM = "tpm"
    SENSOR = "sensor"


class DriverState(StrEnum):
    WORKING = "working"
    NO_DRIVER = "no-driver"
    FIRMWARE_MISSING = "firmware-missing"
    NO_PERMISSION = "no-permission"
    HELD_BY_ANOTHER = "held-by-another"


class Source(StrEnum):
    DATASHEET = "datasheet"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True)
class Throughput:
    """How much a device does in a second, and who says so.

    Args:
        unit: "TOPS", "TFLOP/s" or "GB/s" (SI).
        dtype: what is computed with, as in "int8"; empty for bandwidth.
        reference: the datasheet's address, or how it was measured.
    """

    value: float
    unit: str
    dtype: str
    source: Source
    reference: str = ""

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}{' ' if self.dtype else ''}{self.dtype}, {self.source}"

    def to_dict(self) -> dict[str, Json]:
        return {
            "value": self.value,
            "unit": self.unit,
            "dtype": self.dtype,
            "source": self.source.value,
            "reference": self.reference,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises InvalidArgument."""
        value = data.get("value") if isinstance(data, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InvalidArgument("a throughput is a number that is not negative", param="throughput")
        return cls(
            float(value),
            _text(data, "unit"),
            _text(data, "dtype"),
            _member(Source, data, "source"),
            _text(data, "reference"),
        )


@dataclass(frozen=True, slots=True)
class Device:
    """One piece of hardware.

    Args:
        id: the same after a reboot, and fit for an element of a D-Bus object path; from where the device sits.
        bus: "pci", "usb", "platform", "acpi", "cpu", "virtual" … or empty.
        address: its place on that bus, as in "0000:c5:00.1" or "1-3".
        vendor_id: of the bus, four hexadecimal digits, as `product_id`; empty where the bus has none.
        driver: the bound kernel driver; empty where none is.
        hint: what helps when the state is not `working`: names the package, group or setting. May be empty.
        nodes: files that programs open, as in "/dev/dri/renderD128".
        attributes: more about its kind (README.md lists the names): plain JSON, sizes in bytes, clocks in kHz.
    """

    id: str
    kind: DeviceKind
    name: str
    vendor: str = ""
    bus: str = ""
    address: str = ""
    vendor_id: str = ""
    product_id: str = ""
    driver: str = ""
    state: DriverState = DriverState.WORKING
    hint: str = ""
    nodes: tuple[str, ...] = ()
    attributes: Mapping[str, Json] = field(default_factory=dict, hash=False)
    throughput: tuple[Throughput, ...] = ()

    @property
    def usable(self) -> bool:
        return self.state is DriverState.WORKING

    def to_dict(self) -> dict[str, Json]:
        return {
            "id": self.id,
            "kind": self.kind.value,
            "name": self.name,
            "vendor": self.vendor,
            "bus": self.bus,
            "address": self.address,
            "vendor_id": self.vendor_id,
            "product_id": self.product_id,
            "driver": self.driver,
            "state": self.state.value,
            "hint": self.hint,
            "nodes": list(self.nodes),
            "attributes": dict(self.attributes),
            "throughput": [one.to_dict() for one in self.throughput],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises InvalidArgument: a key is missing or of the wrong type."""
        if not isinstance(data, Mapping):
            raise InvalidArgument("a device is a JSON object", param="device")
        name = _text(data, "id")
        if not name or object_name(name) != name:
            raise InvalidArgument("a device's id has only letters, digits and underscores", param="id")
        nodes = data.get("nodes", ())
        if isinstance(nodes, str) or not isinstance(nodes, Sequence) or not all(isinstance(n, str) for n in nodes):
            raise InvalidArgument("nodes are a list of file names", param="nodes")
        attributes = data.get("attributes", {})
        if not isinstance(attributes, Mapping):
            raise InvalidArgument("attributes are a JSON object", param="attributes")
        throughput = data.get("throughput", ())
        if isinstance(throughput, str) or not isinstance(throughput, Sequence):
            raise InvalidArgument("throughput is a list", param="throughput")
        texts = ("name", "vendor", "bus", "address", "vendor_id", "product_id", "driver", "hint")
        return cls(
            id=name,
            kind=_member(DeviceKind, data, "kind"),
            state=_member(DriverState, data, "state"),
            nodes=tuple(nodes),
            attributes=dict(attributes),
            throughput=tuple(Throughput.from_dict(one) for one in throughput),
            **{key: _text(data, key) for key in texts},
        )


def object_name(*parts: str) -> str:
    """An id out of `parts`: whatever is no ASCII letter or digit becomes an underscore; never empty, at most MAX_ID."""
    joined = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(part for part in parts if part))
    return joined[:MAX_ID] or "_"


_Member = TypeVar("_Member", bound=StrEnum)


def _member(kind: type[_Member], data: Mapping[str, Any], key: str) -> _Member:
    try:
        return kind(str(data.get(key)))
    except ValueError as error:
        raise InvalidArgument(f"{key} is one of: {', '.join(kind)}", param=key) from error


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"{key} is text", param=key)
    return value
