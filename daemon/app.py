"""Puts the daemon together and runs it: configuration, models, bus, socket, and an orderly end."""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ai_assistant.daemon import bus, journal
from ai_assistant.daemon import config as configuration
from ai_assistant.daemon.authority import Authority, allowed
from ai_assistant.daemon.contract import Counters
from ai_assistant.daemon.devices import DeviceTable, Monitor
from ai_assistant.daemon.fetch.client import FETCH_SOCKET, Fetcher
from ai_assistant.daemon.jobs import JobTable
from ai_assistant.daemon.pins import Pins
from ai_assistant.daemon.pressure import some_avg10
from ai_assistant.daemon.publish import Publisher
from ai_assistant.daemon.registry import BUILTIN_DIRECTORY, Registry
from ai_assistant.daemon.residency import Meters, Residency, Worker, load_options
from ai_assistant.daemon.service import DaemonService
from ai_assistant.daemon.status import Machine
from ai_assistant.daemon.version import VERSION
from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.errors import ServiceUnavailable
from ai_assistant.hal.hetero.intent import OFF, parse
from ai_assistant.services.connection import Connection
from ai_assistant.services.notify import keep_alive, notify, passed_sockets, watchdog_interval

if TYPE_CHECKING:
    from ai_assistant.daemon.api.network import Network
    from ai_assistant.hal.device import Device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where things are; the defaults are those of the appliance."""

    root: Path = Path("/")
    bus_address: str = ""
    """Empty: the system bus."""
    api_socket: Path | None = None
    """A socket to make when the service manager passed none."""
    worker_socket: Path = Path("/run/ai-assistant/worker.sock")
    gpu_worker_socket: Path = Path("/run/ai-assistant/gpu-worker.sock")
    """Of workers that may open GPUs: used when the configuration gives models other devices than the processor."""
    fetch_socket: Path = FETCH_SOCKET
    state_directory: Path = Path("/var/lib/ai-assistant")


def connector(path: Path) -> Callable[[], Awaitable[Worker]]:
    """A function that starts a worker by connecting to its socket unit."""

    async def connect() -> Worker:
        return await WorkerClient.connect(str(path))

    return connect


def worker_socket(options: Options, config: configuration.Config) -> Path:
    """Whose workers are wanted: those that see GPUs only where models may use one."""
    return options.worker_socket if parse(config.models_hetero_compute) == OFF else options.gpu_worker_socket


class App:
    """The daemon. Make it inside the event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.config = configuration.load(options.root)
        self._stop = asyncio.Event()
        counters = Counters()
        loading = load_options(self.config)
        registry = Registry(options.root / BUILTIN_DIRECTORY, options.state_directory / "models", loading)
        self._machine = Machine(options.root, options.state_directory)
        pins = Pins(options.state_directory / "pins.json")
        residency = Residency(
            self.config,
            connector(worker_socket(options, self.config)),
            Meters(self._machine.memory_available, self._machine.memory_total, lambda: some_avg10(options.root)),
            counters,
            pinned=pins.__contains__,
            spill_directory=options.state_directory,
            disk_kept=lambda: self.service.space.kept_bytes,
        )
        jobs = JobTable(per_owner=self.config.limits_jobs_per_caller)
        patience = {
            "attempts": self.config.pull_attempts,
            "first_wait_s": self.config.pull_retry_first_s,
            "stall_s": self.config.pull_stall_s,
        }
        fetcher = Fetcher(options.fetch_socket, allow_http=self.config.pull_allow_http, patience=patience)
        self.service = DaemonService(
            self.config, registry, residency, jobs, self._machine, counters, pins, fetcher=fetcher
        )
        self.devices = DeviceTable(self._detect, self._monitor, self._measure)
        self._connection: Connection | None = None
        self._ending = False

    def _detect(self) -> tuple[Device, ...]:
        from ai_assistant.hal.detect import detect

        return detect(self._options.root, state=self._options.state_directory)

    def _measure(self, devices: Sequence[Device]) -> None:
        from ai_assistant.hal.detect.measure import measure

        measure(devices, self._options.state_directory)

    def _monitor(self) -> Monitor:
        from ai_assistant.hal.detect.monitor import Monitor as UdevMonitor

        return UdevMonitor(self._detect)

    def stop(self) -> None:
        """Begin the orderly end."""
        self._stop.set()

    async def run(self) -> int:
        """Serve until `stop`; the exit status.

        Raises:
            AIAssistantError: it could not start.
        """
        journal.set_up(self.config.log_level)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        interval = watchdog_interval()
        watchdog = loop.create_task(keep_alive(interval)) if interval else None
        notify("STATUS=Reading models")
        sockets = self._sockets()
        await asyncio.to_thread(self.service.registry.scan)
        await asyncio.to_thread(self.service.pulls.sweep)
        self.service.pins.keep_only(each.name for each in self.service.registry.all())
        connection = self._connection = Connection(
            map(bus.load, bus.NAMES),
            root=bus.ROOT,
            large=bus.TEXTS,
            calls_per_caller=self.config.limits_calls_per_caller,
        )
        await connection.connect(self._options.bus_address)
        Publisher(connection, self.service, Authority(connection), self.devices)
        self.service.set_state("running")
        await connection.own_name(bus.BUS_NAME)
        # The sockets have taken connections since before this process was there, and keep them until the libraries that
        # speak HTTP are loaded: a third of all that there is to load. The bus is served meanwhile. Whatever waits for
        # this daemon at boot – the banner, a check of the boot partition – would take the processor away from that.
        api_stop = asyncio.Event()
        api = loop.create_task(self._serve_api(sockets, api_stop)) if sockets else None
        if api is None:
            self._ready()
        stopping = loop.create_task(self._stop.wait())
        waiting: set[asyncio.Future[object]] = {stopping, connection.lost}  # type: ignore[arg-type]
        if api is not None:
            waiting.add(api)  # type: ignore[arg-type]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        status = 0 if self._stop.is_set() else 1
        if api is not None and api.done() and not self._stop.is_set():
            log.error("the socket API ended", exc_info=api.exception())
        self._ending = True
        notify("STOPPING=1\nSTATUS=Finishing what runs")
        await self._end(api, api_stop)
        for task in (stopping, watchdog):
            if task is not None:
                task.cancel()
        return status

    def _ready(self) -> None:
        """Everything answers. Devices are looked for only now: at boot that would want the same core."""
        if self._ending:
            return  # it was stopped, or lost the bus, while it started
        notify("READY=1\nSTATUS=" + self._summary())
        log.info("ai-assistantd %s is ready: %s", VERSION, self._summary())
        self.devices.start()

    async def _end(self, api: asyncio.Task[None] | None, api_stop: asyncio.Event) -> None:
        """Stop accepting, let generations finish for a while, cancel the rest, free everything."""
        assert self._connection is not None
        await self.service.finish()
        api_stop.set()
        if api is not None:
            await asyncio.wait([api], timeout=10)
        await self.devices.close()
        await self._connection.close()
        await self.service.jobs.close()
        await self.service.residency.close()
        log.info("stopped")

    async def _serve_api(self, sockets: list[socket.socket], stop: asyncio.Event) -> None:
        await asyncio.to_thread(importlib.import_module, "ai_assistant.daemon.api.server")
        from ai_assistant.daemon.api.server import serve

        network = await asyncio.to_thread(self._network)
        await serve(self.service, sockets, stop, allowed, network=network, answering=self._ready)

    def _network(self) -> Network:
        from ai_assistant.daemon.api.network import Network

        machine = self._machine.status()
        return Network.open(
            self._options.state_directory,
            passed_sockets("api-tcp"),
            str(machine.get("hostname") or ""),
            [str(each) for each in machine.get("addresses") or ()],
        )

    def _sockets(self) -> list[socket.socket]:
        passed = passed_sockets("api")
        if passed or self._options.api_socket is None:
            return passed
        path = self._options.api_socket
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
                path.unlink()
            sock.bind(str(path))
            # Everybody may connect: who it is decides what he may do.
            path.chmod(0o666)
        except OSError as error:
            raise ServiceUnavailable(f"cannot listen at {path}: {error.strerror}") from error
        sock.listen(128)
        sock.setblocking(False)
        return [sock]

    def _summary(self) -> str:
        count = len(self.service.registry.all())
        return f"{count} model{'' if count == 1 else 's'} known"
