"""What the two processes say to each other: short JSON objects with their length in front, descriptors beside them.

Nothing of the child is taken on trust, so nothing here can make an object of a class of its choosing, and the parent
takes no descriptors from it. Whatever is long – tensors, graphs, programs – lies in shared memory, see `shared`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ai_assistant.errors import AIAssistantError, BackendFailed, from_name
from ai_assistant.hal.contract import BackendDevice, Capabilities, Probe
from ai_assistant.hal.graph import DType, TensorSpec

MAX_FRAME = 8 << 20
MAX_TEXT = 300
MAX_DEVICES = 256
MAX_TENSORS = 4096
MAX_RANK = 64
_LENGTH = struct.Struct("<I")
_MAY_SAY = {
    "NotSupported", "OutOfMemory", "InvalidArgument", "InvalidModel", "DeviceLost", "BackendFailed", "Busy",
    "NotAuthorized",
}  # fmt: skip
"""The errors that the contract lets a backend raise. Another name becomes BackendFailed."""


class Garbage(Exception):
    """What came is not what was agreed upon."""


def frame(message: Mapping[str, Any]) -> bytes:
    """Raises Garbage: the message is too long."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_FRAME:
        raise Garbage(f"a message of {len(data)} bytes is too long")
    return _LENGTH.pack(len(data)) + data


def length(header: bytes) -> int:
    """The length of the message behind a header of 4 bytes. Raises Garbage: it is too long, or empty."""
    found: int = _LENGTH.unpack(header)[0]
    if not 2 <= found <= MAX_FRAME:
        raise Garbage(f"it announced a message of {found} bytes")
    return found


def take(buffer: bytearray) -> dict[str, Any] | None:
    """The first whole message, which is removed; None when there is none yet. Raises Garbage."""
    if len(buffer) < _LENGTH.size:
        return None
    end = _LENGTH.size + length(bytes(buffer[: _LENGTH.size]))
    if len(buffer) < end:
        return None
    message = parse(bytes(buffer[_LENGTH.size : end]))
    del buffer[:end]
    return message


def parse(data: bytes) -> dict[str, Any]:
    """Raises Garbage: that is no JSON object."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbage("it sent what is no JSON") from error
    if not isinstance(message, dict):
        raise Garbage("it sent JSON that is no object")
    return message


# --------------------------------------------------------------------------------------- values, as the parent reads


def text(value: object) -> str:
    """What a child says, fit for a message: short, and without control characters."""
    if not isinstance(value, str):
        raise Garbage("it sent something else where text belongs")
    return "".join(each if each.isprintable() else " " for each in value[:MAX_TEXT])


def integer(value: object, low: int = 0, high: int = 1 << 62) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Garbage("it sent something else where a number belongs")
    return value


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise Garbage("it sent something else where true or false belongs")
    return value


def items(value: object, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise Garbage("it sent something else where a list belongs, or too long a list")
    return value


def spec(value: object) -> TensorSpec:
    dtype, *shape = items(value, MAX_RANK + 1) or [None]
    try:
        return TensorSpec(DType(dtype), tuple(None if each is None else integer(each) for each in shape))
    except (ValueError, TypeError, AIAssistantError) as error:
        raise Garbage("it described a tensor that cannot be") from error


def specs(value: object) -> tuple[TensorSpec, ...]:
    return tuple(spec(each) for each in items(value, MAX_TENSORS))


def error(value: object) -> AIAssistantError:
    """What a child says went wrong, as an error of the contract."""
    if not isinstance(value, dict):
        raise Garbage("it sent an error that is none")
    name, message, hint = (text(value.get(key, "")) for key in ("name", "message", "hint"))
    if name not in _MAY_SAY:
        return BackendFailed(f"{name}: {message}", hint=hint)
    return from_name(name, message, hint=hint)


def probe(value: Mapping[str, Any]) -> Probe:
    devices = tuple(_device(each) for each in items(value.get("devices"), MAX_DEVICES))
    return Probe(devices, text(value.get("unavailable")), text(value.get("hint")))


def device(value: object) -> BackendDevice:
    return _device(value)


def _device(value: object) -> BackendDevice:
    parts = [text(each) for each in items(value, 4)]
    if len(parts) != 4:
        raise Garbage("it described a device that is none")
    return BackendDevice(*parts)


def capabilities(value: object) -> Capabilities:
    if not isinstance(value, dict):
        raise Garbage("it sent something else where capabilities belong")
    alignment = integer(value.get("alignment"), 1, 1 << 21)
    if alignment & (alignment - 1):
        raise Garbage("it named an alignment that is no power of two")
    try:
        dtypes = frozenset(DType(each) for each in items(value.get("dtypes"), 64))
    except (ValueError, TypeError) as error:
        raise Garbage("it named a type that there is not") from error
    return Capabilities(
        dtypes,
        memory_bytes=integer(value.get("memory_bytes")),
        alignment=alignment,
        dynamic_shapes=boolean(value.get("dynamic_shapes")),
        # The buffers are shared memory, so the host sees them; memory of anybody else the child cannot see.
        host_memory=False,
        caches_programs=boolean(value.get("caches_programs")),
        reads_power=boolean(value.get("reads_power")),
        max_queues=integer(value.get("max_queues"), 0, 1 << 20),
    )


def checked(read: Callable[[], Any]) -> Any:
    """What a reader gives. Raises BackendFailed: the child sent garbage."""
    try:
        return read()
    except Garbage as error:
        raise BackendFailed(f"the backend's process broke the protocol: {error}") from error


# ------------------------------------------------------------------------------------------- values, as they are sent


def of_spec(value: TensorSpec) -> list[object]:
    return [value.dtype.value, *value.shape]


def of_specs(values: Sequence[TensorSpec]) -> list[list[object]]:
    return [of_spec(each) for each in values]


def of_device(value: BackendDevice) -> list[str]:
    return [value.id, value.name, value.kind, value.hal_id]


def of_capabilities(value: Capabilities) -> dict[str, object]:
    return {
        "dtypes": sorted(value.dtypes),
        "memory_bytes": value.memory_bytes,
        "alignment": value.alignment,
        "dynamic_shapes": value.dynamic_shapes,
        "caches_programs": value.caches_programs,
        "reads_power": value.reads_power,
        "max_queues": value.max_queues,
    }


def of_error(value: Exception) -> dict[str, object]:
    """Also of what a backend must not raise."""
    if isinstance(value, AIAssistantError):
        return {"name": value.name, "message": value.message[:MAX_TEXT], "hint": value.hint[:MAX_TEXT]}
    if isinstance(value, MemoryError):
        return {"name": "OutOfMemory", "message": "the backend's process has no more memory", "hint": ""}
    return {"name": "BackendFailed", "message": f"{type(value).__name__}: {str(value)[:200]}", "hint": ""}
