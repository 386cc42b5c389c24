"""org.ai_assistant1 on a private bus, scripted, for the client's side of the bus.

Its members are checked against the product's XML (`test_bus_client.py`), so that it cannot drift from what
the daemon really serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbus_fast import DBusError, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

ROOT = "/org/ai_assistant1"
ERROR = "org.ai_assistant1.Error."

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
    <allow send_requested_reply="true"/><allow receive_type="signal"/><allow receive_type="method_return"/>
    <allow receive_type="error"/><allow eavesdrop="false"/>
    <allow send_destination="*"/>
  </policy>
</busconfig>
"""


@dataclass
class Broker:
    address: str
    process: subprocess.Popen[bytes]


@contextmanager
def broker(folder: Path) -> Iterator[Broker]:
    """A `dbus-daemon` that takes itself for the system bus."""
    path = folder / "bus"
    config = folder / "bus.conf"
    config.write_text(CONFIG.format(path=path))
    process = subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "dbus-daemon did not start"
        yield Broker(f"unix:path={path}", process)
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


Handler = Callable[[Message], tuple[str, list[Any]]]


def sizes(**known: int) -> dict[str, Variant]:
    """The parts of a memory estimate; those that are not named are 1,000,000 bytes."""
    parts = ("weights", "repacked", "kv", "compute", "runtime", "total")
    return {f"{part}_bytes": Variant("t", known.get(f"{part}_bytes", 1_000_000)) for part in parts}


def model(name: str, **more: Any) -> dict[str, Variant]:
    values: dict[str, Variant] = {
        "Name": Variant("s", name),
        "State": Variant("s", "unloaded"),
        "SizeBytes": Variant("t", 4_000_000),
        "Format": Variant("s", "gguf"),
        "Architecture": Variant("s", "llama"),
        "Parameters": Variant("t", 2_300_000),
        "Quantization": Variant("s", "Q8_0"),
        "ContextLength": Variant("u", 2048),
        "MemoryEstimateBytes": Variant("t", 9_000_000),
        "Memory": Variant("a{sv}", sizes(kv_bytes=5_000_000, total_bytes=9_000_000)),
        "ResidentBytes": Variant("t", 0),
        "Pinned": Variant("b", False),
        "Capabilities": Variant("as", ["generate", "embed"]),
        "Builtin": Variant("b", False),
        "Transient": Variant("b", False),
        "Created": Variant("t", 1_750_000_000),
        "Error": Variant("s", ""),
        "Warning": Variant("s", ""),
    }
    return {**values, **more}


def job(kind: str, **more: Any) -> dict[str, Variant]:
    values: dict[str, Variant] = {
        "Kind": Variant("s", kind),
        "State": Variant("s", "running"),
        "Progress": Variant("d", 0.0),
        "Message": Variant("s", "working"),
        "Details": Variant("a{sv}", {}),
        "Error": Variant("(ss)", ["", ""]),
        "Result": Variant("a{sv}", {}),
        "Created": Variant("t", 1_750_000_000),
    }
    return {**values, **more}


STATUS: dict[str, Variant] = {
    "version": Variant("s", "0.0-test"),
    "state": Variant("s", "running"),
    "hostname": Variant("s", "box"),
    "addresses": Variant("as", ["192.0.2.7"]),
    "uptime_s": Variant("d", 3725.0),
    "cores": Variant("x", 2),
    "memory_total_bytes": Variant("x", 8 << 30),
    "memory_available_bytes": Variant("x", 4 << 30),
    "temperature_c": Variant("d", 45.25),
    "watts_source": Variant("s", "none"),
    "storage_encryption": Variant("s", "none"),
    "storage_reason": Variant("s", "this machine has no TPM"),
    "models": Variant("av", [Variant("a{sv}", {"name": Variant("s", "assistant:1"), "state": Variant("s", "loaded")})]),
    "running": Variant("x", 0),
}


STATISTICS: dict[str, Variant] = {
    "running": Variant("x", 1),
    "connections": Variant("x", 2),
    "models": Variant(
        "av",
        [
            Variant(
                "a{sv}",
                {
                    "name": Variant("s", "assistant:1"),
                    "state": Variant("s", "loaded"),
                    "pinned": Variant("b", True),
                    "estimate_bytes": Variant("x", 9_000_000),
                    "resident_bytes": Variant("x", 9 << 20),
                    "running": Variant("x", 1),
                    "waiting": Variant("x", 3),
                    "kv_cells": Variant("x", 1000),
                    "kv_used": Variant("x", 250),
                    "prefix_hits": Variant("x", 7),
                    "prefill_tokens_per_s": Variant("d", 120.0),
                    "decode_tokens_per_s": Variant("d", 12.5),
                    "ttft_p50_s": Variant("d", 0.2),
                    "ttft_p95_s": Variant("d", 1.5),
                },
            )
        ],
    ),
}


@dataclass
class Scripted:
    """The daemon's objects, and what it was asked. It answers from its own thread."""

    address: str
    models: dict[str, dict[str, Variant]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Variant]] = field(default_factory=dict)
    calls: list[tuple[str, list[Any]]] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    """What could be read from each descriptor that came."""
    errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Method → error name and message, instead of an answer."""
    silent: set[str] = field(default_factory=set)
    """Methods that are never answered."""
    owners_gone: list[str] = field(default_factory=list)
    _bus: MessageBus | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        ready = threading.Event()

        def body() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._connect())
            ready.set()
            self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=body, name="scripted-daemon", daemon=True)
        self._thread.start()
        assert ready.wait(10)

    async def _connect(self) -> None:
        self._bus = await MessageBus(bus_address=self.address, negotiate_unix_fd=True).connect()
        self._bus.add_message_handler(self._received)
        rule = "type='signal',member='NameOwnerChanged',sender='org.freedesktop.DBus'"
        await self._bus.call(
            Message("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch",
                    signature="s", body=[rule])
        )  # fmt: skip
        await self._bus.request_name("org.ai_assistant1")

    def stop(self) -> None:
        """Leave the bus, as a crash does."""
        if self._thread is None:
            return
        assert self._bus is not None
        # A daemon that left on its own has closed its loop, perhaps just now.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._bus.disconnect)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._thread = None

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def change(self, path: str, **values: Variant) -> None:
        """Set properties of a job and announce them."""

        async def announce() -> None:
            self.jobs[path].update(values)
            assert self._bus is not None
            await self._bus.send(
                Message(
                    path=path,
                    interface="org.freedesktop.DBus.Properties",
                    member="PropertiesChanged",
                    message_type=MessageType.SIGNAL,
                    signature="sa{sv}as",
                    body=["org.ai_assistant1.Job", {}, list(values)],
                )
            )

        self.run(announce())

    def _received(self, message: Message) -> Message | bool | None:
        if message.message_type is MessageType.SIGNAL and message.member == "NameOwnerChanged":
            name, _, new = message.body
            if name.startswith(":") and not new:
                self.owners_gone.append(name)
            return None
        if message.message_type is not MessageType.METHOD_CALL or not (message.path or "").startswith(ROOT):
            return None
        member = message.member or ""
        if member == "Introspect":
            return None
        self.calls.append((member, message.body))
        for fd in message.unix_fds:
            self.files.append(os.pread(fd, 64, 0))
            os.close(fd)
        if member in self.silent:
            return True
        if member in self.errors:
            name, text = self.errors[member]
            return Message.new_error(message, name, text)
        try:
            signature, body = self._answer(message, member)
        except DBusError as error:
            return Message.new_error(message, error.type, error.text)
        return Message.new_method_return(message, signature, body)

    def _answer(self, message: Message, member: str) -> tuple[str, list[Any]]:
        path = message.path or ""
        if member == "GetStatus":
            return "a{sv}", [STATUS]
        if member == "GetStatistics":
            return "a{sv}", [STATISTICS]
        if member == "GetManagedObjects":
            objects = {each: {"org.ai_assistant1.Model": values} for each, values in self.models.items()}
            objects |= {each: {"org.ai_assistant1.Job": values} for each, values in self.jobs.items()}
            return "a{oa{sa{sv}}}", [objects]
        if member == "GetAll":
            found = self.models.get(path) or self.jobs.get(path)
            if found is None:
                raise DBusError("org.freedesktop.DBus.Error.UnknownObject", f"no object {path}")
            return "a{sv}", [found]
        if member == "FindModel":
            return "o", [self._find(message.body[0])]
        if member == "ImportModel":
            return "o", [self._job("import")]
        if member == "PullModel":
            return "o", [self._job("pull")]
        if member == "OpenModel":
            name = message.body[1].get("name", Variant("s", "transient")).value + ":t1"
            path = f"{ROOT}/models/{len(self.models) + 1}"
            self.models[path] = model(name, Transient=Variant("b", True))
            return "os", [path, name]
        if member == "Load":
            return "o", [self._job("load")]
        if member == "Unload":
            self.models[path]["State"] = Variant("s", "unloaded")
            return "", []
        if member in ("Pin", "Unpin"):
            self.models[path]["Pinned"] = Variant("b", member == "Pin")
            return "", []
        if member == "Drain":
            self.models[path]["State"] = Variant("s", "unloaded")
            return "o", [self._job("drain")]
        if member == "Estimate":
            asked = message.body[0]
            cells = asked["context_length"].value if "context_length" in asked else 2048
            return "a{sv}", [sizes(kv_bytes=cells * 1000)]
        if member == "Remove":
            del self.models[path]
            return "", []
        if member == "Cancel":
            self.jobs[path]["State"] = Variant("s", "cancelled")
            return "", []
        if member == "SelfTest":
            return "a(sbs)", [[["disk", True, "fine"], ["worker", False, "no answer"]]]
        if member == "GetLog":
            return "as", [["a line"] * message.body[0]]
        raise DBusError("org.freedesktop.DBus.Error.UnknownMethod", f"no method {member}")

    def _find(self, name: str) -> str:
        for path, values in self.models.items():
            full = values["Name"].value
            if name in (full, full.partition(":")[0]):
                return path
        raise DBusError(ERROR + "NoSuchModel", f"there is no model {name!r} (hint: see ai-assistant model list)")

    def _job(self, kind: str) -> str:
        path = f"{ROOT}/jobs/{len(self.jobs) + 1}"
        self.jobs[path] = job(kind)
        return path


@contextmanager
def scripted(address: str) -> Iterator[Scripted]:
    """A daemon with a built-in model and one of a user's."""
    daemon = Scripted(address)
    daemon.models[f"{ROOT}/models/1"] = model("assistant:1", Builtin=Variant("b", True), State=Variant("s", "loaded"))
    daemon.models[f"{ROOT}/models/2"] = model("writer:2")
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()
