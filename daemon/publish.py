"""Keeps the objects on the bus in step with the service: one per model, job and device, with their changes."""

from __future__ import annotations

import asyncio
import logging
from itertools import count

from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.bus import ROOT, device, inference, job, manager, model
from ai_assistant.daemon.devices import DeviceTable
from ai_assistant.daemon.jobs import Job
from ai_assistant.daemon.service import DaemonService
from ai_assistant.errors import NoSuchModel
from ai_assistant.hal.device import Device
from ai_assistant.services.connection import Connection

log = logging.getLogger(__name__)


class Publisher:
    """Exports everything when it is made and follows from then on."""

    def __init__(
        self, connection: Connection, service: DaemonService, authority: Authority, devices: DeviceTable
    ) -> None:
        self._connection = connection
        self._service = service
        self._authority = authority
        self._devices = devices
        self._numbers = count(1)
        self._models: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        connection.export(
            ROOT,
            {
                manager.INTERFACE: manager.Manager(service, authority, self.model_path, self.job_path, devices),
                inference.INTERFACE: inference.Inference(service, authority),
            },
        )
        for record in service.models():
            self._add_model(record.name)
        service.on_added = self._add_model
        service.on_removed = self._remove_model
        service.on_state = self._manager_changed
        service.residency.changed = self._model_changed
        service.jobs.added = self._add_job
        service.jobs.changed = self._job_changed
        service.jobs.removed = lambda each: connection.unexport(self.job_path(each))
        for each in devices.all():
            self._add_device(each)
        devices.added = self._add_device
        devices.removed = lambda each: connection.unexport(self.device_path(each))
        devices.changed = lambda each: connection.changed(self.device_path(each), device.INTERFACE)
        connection.on_vanished.append(self._vanished)

    def model_path(self, name: str) -> str:
        """Raises NoSuchModel."""
        try:
            return self._models[name]
        except KeyError:
            raise NoSuchModel(f"there is no model {name[:100]!r}") from None

    def job_path(self, each: Job) -> str:
        return f"{ROOT}/jobs/{each.number}"

    def _add_model(self, name: str) -> None:
        if name in self._models:
            return  # Two imports of one name and content both succeed, and both say so.
        path = f"{ROOT}/models/{next(self._numbers)}"
        self._models[name] = path
        handler = model.ModelObject(self._service, self._authority, name, self.job_path)
        self._connection.export(path, {model.INTERFACE: handler})
        self._manager_changed()

    def _remove_model(self, name: str) -> None:
        path = self._models.pop(name, None)
        if path is not None:
            self._connection.unexport(path)
            self._manager_changed()

    def _model_changed(self, name: str) -> None:
        path = self._models.get(name)
        if path is not None:
            self._connection.changed(path, model.INTERFACE)
            # A model that cannot be loaded is a matter of the appliance's health as well.
            self._manager_changed()

    def _manager_changed(self) -> None:
        self._connection.changed(ROOT, manager.INTERFACE)

    def _add_job(self, each: Job) -> None:
        handler = job.JobObject(each, self._authority, self._models.get)
        self._connection.export(self.job_path(each), {job.INTERFACE: handler})

    def device_path(self, each: Device) -> str:
        return f"{ROOT}/devices/{each.id}"

    def _add_device(self, each: Device) -> None:
        self._connection.export(self.device_path(each), {device.INTERFACE: device.DeviceObject(self._devices, each.id)})

    def _job_changed(self, each: Job) -> None:
        self._connection.changed(self.job_path(each), job.INTERFACE)

    def _vanished(self, name: str) -> None:
        if not any(entry.owner == name for entry in self._service.registry.all()):
            return
        task = asyncio.get_running_loop().create_task(self._service.drop_owner(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
