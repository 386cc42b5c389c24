"""org.ai_assistant1.Model: one object for each model that the daemon knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dbus_fast import Variant

from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.contract import Scope
from ai_assistant.daemon.jobs import Job
from ai_assistant.daemon.service import DaemonService
from ai_assistant.engines.memory import MemoryEstimate
from ai_assistant.errors import InvalidArgument
from ai_assistant.services.connection import Call
from ai_assistant.services.values import plain

INTERFACE = "org.ai_assistant1.Model"


def no_options(options: Mapping[str, Any]) -> None:
    """Raise InvalidArgument for any option: there are none yet, and one that is ignored would mislead."""
    for key in options:
        raise InvalidArgument(f"unknown option {key[:80]!r}", param=key[:80])


def _sizes(estimate: MemoryEstimate) -> dict[str, Variant]:
    return {key: Variant("t", value) for key, value in estimate.to_dict().items()}


class ModelObject:
    def __init__(self, service: DaemonService, authority: Authority, name: str, job_path: Callable[[Job], str]) -> None:
        self._service = service
        self._authority = authority
        self._name = name
        self._job_path = job_path

    def properties(self) -> Mapping[str, Any]:
        # Not `model`: signals about a change are made in the task of whoever caused it.
        record = self._service.record(self._service.registry.get(self._name))
        return {
            "Name": record.name,
            "State": str(record.state),
            "SizeBytes": record.size_bytes,
            "Format": record.format,
            "Architecture": record.architecture,
            "Parameters": record.parameters,
            "Quantization": record.quantization,
            "ContextLength": record.context_length,
            "MemoryEstimateBytes": record.memory_estimate_bytes,
            "Memory": _sizes(record.memory),
            "ResidentBytes": record.resident_bytes or 0,
            "Pinned": record.pinned,
            "Capabilities": list(record.capabilities),
            "Builtin": record.builtin,
            "Transient": record.transient,
            "Created": record.created,
            "Error": record.error,
            "Warning": record.warning,
        }

    async def load(self, call: Call, options: Mapping[str, Any]) -> str:
        uid = await self._authority.require(call, Scope.LOAD)
        no_options(plain(options))
        return self._job_path(self._service.start_load(self._name, call.sender, uid))

    async def unload(self, call: Call) -> None:
        if not self._owned_by(call):
            await self._authority.require(call, Scope.UNLOAD)
        await self._service.unload(self._name)

    async def pin(self, call: Call) -> None:
        await self._pin(call, True)

    async def unpin(self, call: Call) -> None:
        await self._pin(call, False)

    async def _pin(self, call: Call, pinned: bool) -> None:
        await self._authority.require(call, Scope.UNLOAD)
        await self._service.pin(self._name, pinned)

    async def drain(self, call: Call) -> str:
        uid = await self._authority.require(call, Scope.UNLOAD)
        return self._job_path(self._service.start_drain(self._name, call.sender, uid))

    async def estimate(self, call: Call, options: Mapping[str, Any]) -> Mapping[str, Any]:
        await self._authority.uid(call.sender)
        values = plain(options)
        context_length, sequences = values.pop("context_length", 0), values.pop("sequences", 0)
        no_options(values)
        return _sizes(self._service.estimate(self._name, context_length, sequences))

    async def remove(self, call: Call) -> None:
        if not self._owned_by(call):
            await self._authority.require(call, Scope.REMOVE)
        # Also when it is busy: it may be the model that keeps its worker busy for ever.
        await self._service.remove(self._name, force=True)

    def _owned_by(self, call: Call) -> bool:
        # Bus names are never given twice, so this cannot be another connection.
        return self._service.registry.get(self._name).owner == call.sender
