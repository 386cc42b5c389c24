"""org.ai_assistant1.Manager: the appliance as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dbus_fast import Variant

from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.bus.model import no_options
from ai_assistant.daemon.contract import Scope
from ai_assistant.daemon.devices import DeviceTable
from ai_assistant.daemon.jobs import Job
from ai_assistant.daemon.journal import PRIORITIES, read_log
from ai_assistant.daemon.metrics_summary import statistics
from ai_assistant.daemon.pulls import PullOptions
from ai_assistant.daemon.service import DaemonService
from ai_assistant.daemon.version import VERSION
from ai_assistant.errors import InvalidArgument
from ai_assistant.services.connection import Call, Descriptor
from ai_assistant.services.values import plain, variants

INTERFACE = "org.ai_assistant1.Manager"
MAX_LINES = 1000


class Manager:
    def __init__(
        self,
        service: DaemonService,
        authority: Authority,
        model_path: Callable[[str], str],
        job_path: Callable[[Job], str],
        devices: DeviceTable,
    ) -> None:
        self._service = service
        self._authority = authority
        self._model_path = model_path
        self._job_path = job_path
        self._devices = devices

    def properties(self) -> Mapping[str, Any]:
        machine = self._service.machine
        protected = machine.storage()
        return {
            "Version": VERSION,
            "State": self._service.current_state(),
            "Health": self._service.health(),
            "ModelCount": len(self._service.registry.all()),
            "StorageEncryption": str(protected.encryption),
            "StorageReason": protected.reason,
            "RecoveryKeyPending": machine.recovery_key_pending(),
        }

    async def get_status(self, call: Call) -> Mapping[str, Any]:
        await self._authority.uid(call.sender)
        status = self._service.status()
        # An empty list does not say what it is a list of, and clients rely on one type for a key.
        empty = {key: Variant("av", []) for key in ("temperatures", "models") if not status[key]}
        return variants(status) | empty

    async def get_statistics(self, call: Call) -> Mapping[str, Any]:
        await self._authority.uid(call.sender)
        found = await statistics(self._service)
        empty = {"models": Variant("av", [])} if not found["models"] else {}
        return variants(found) | empty

    async def list_models(self, call: Call) -> Sequence[str]:
        await self._authority.uid(call.sender)
        return [self._model_path(each.name) for each in self._service.models()]

    async def find_model(self, call: Call, name: str) -> str:
        await self._authority.uid(call.sender)
        return self._model_path(self._service.model(name).name)

    async def import_model(self, call: Call, file: Descriptor, name: str, options: Mapping[str, Any]) -> str:
        uid = await self._authority.require(call, Scope.IMPORT)
        no_options(plain(options))
        return self._job_path(await self._service.import_model(file.take(), name, call.sender, uid))

    async def pull_model(self, call: Call, source: str, name: str, options: Mapping[str, Any]) -> str:
        uid = await self._authority.require(call, Scope.IMPORT)
        values = plain(options)
        chosen = {key: values.pop(key) for key in ("token", "endpoint", "sha256") if key in values}
        no_options(values)
        for key, value in chosen.items():
            if not isinstance(value, str):
                raise InvalidArgument(f"{key} must be a string", param=key)
        return self._job_path(self._service.pull_model(source, name, PullOptions(**chosen), call.sender, uid))

    async def open_model(self, call: Call, file: Descriptor, options: Mapping[str, Any]) -> tuple[str, str]:
        uid = await self._authority.require(call, Scope.LOAD)
        values = plain(options)
        prefix = values.pop("name", "transient")
        context_length = values.pop("context_length", 0)
        hetero_compute = values.pop("hetero_compute", "")
        no_options(values)
        if not isinstance(hetero_compute, str):
            raise InvalidArgument("hetero_compute must be a string", param="hetero_compute")
        if not isinstance(prefix, str):
            raise InvalidArgument("name must be a string", param="name")
        if isinstance(context_length, bool) or not isinstance(context_length, int) or not 0 <= context_length < 1 << 24:
            raise InvalidArgument("context_length must be an integer from 0 to 16777215", param="context_length")
        entry = await self._service.open_model(file.take(), prefix, context_length, call.sender, uid, hetero_compute)
        return self._model_path(entry.name), entry.name

    async def measure_devices(self, call: Call) -> str:
        uid = await self._authority.require(call, Scope.LOAD)
        return self._job_path(self._service.jobs.start("measure", call.sender, uid, self._devices.measure))

    async def self_test(self, call: Call) -> Sequence[tuple[str, bool, str]]:
        await self._authority.require(call, Scope.LOAD)
        return await self._service.self_test()

    async def get_log(self, call: Call, lines: int, priority: str) -> Sequence[str]:
        await self._authority.require(call, Scope.LOAD)
        if not 1 <= lines <= MAX_LINES:
            raise InvalidArgument(f"lines must be between 1 and {MAX_LINES}", param="lines")
        if priority and priority not in PRIORITIES:
            raise InvalidArgument(f"priority must be one of {', '.join(PRIORITIES)}", param="priority")
        return await read_log(lines, priority or "info")
