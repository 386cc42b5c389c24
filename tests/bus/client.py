"""A client on the private bus, with dbus-fast's own connection: not the code that the daemon uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus

ROOT = "/org/ai_assistant1"
PREFIX = "org.ai_assistant1."


class Refused(Exception):
    """An error reply."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.text = text


class Client:
    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.signals: list[Message] = []

    async def raw(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *body: Any,
        fds: tuple[int, ...] = (),
        timeout_s: float = 60,
    ) -> Message:
        """Call and return the reply; raises Refused for errors."""
        message = Message(
            "org.ai_assistant1", path, interface, member, signature=signature, body=list(body), unix_fds=list(fds)
        )
        reply = await asyncio.wait_for(self.bus.call(message), timeout_s)
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise Refused(reply.error_name or "", reply.body[0] if reply.body else "")
        return reply

    async def call(self, interface: str, member: str, signature: str = "", *body: Any, **more: Any) -> Any:
        """Call one of our interfaces; the result, or a list of several."""
        path = more.pop("path", ROOT)
        reply = await self.raw(path, PREFIX + interface, member, signature, *body, **more)
        return reply.body[0] if len(reply.body) == 1 else reply.body

    async def get(self, path: str, interface: str, name: str) -> Any:
        reply = await self.raw(path, "org.freedesktop.DBus.Properties", "Get", "ss", PREFIX + interface, name)
        value = reply.body[0]
        return value.value if isinstance(value, Variant) else value

    async def job(self, path: str, timeout_s: float = 60) -> dict[str, Any]:
        """Wait until a job has ended and return its properties."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            reply = await self.raw(path, "org.freedesktop.DBus.Properties", "GetAll", "s", PREFIX + "Job")
            values = {key: value.value for key, value in reply.body[0].items()}
            if values["State"] in ("done", "failed", "cancelled"):
                return values
            assert asyncio.get_running_loop().time() < deadline, values
            await asyncio.sleep(0.05)

    async def listen(self, rule: str = "type='signal',sender='org.ai_assistant1'") -> None:
        """Collect signals from now on."""

        def keep(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL and (message.path or "").startswith(ROOT):
                self.signals.append(message)

        self.bus.add_message_handler(keep)
        driver = "org.freedesktop.DBus"
        await self.bus.call(Message(driver, "/org/freedesktop/DBus", driver, "AddMatch", signature="s", body=[rule]))


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[Client]:
    """A client that may pass descriptors."""
    bus = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
    try:
        yield Client(bus)
    finally:
        bus.disconnect()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(bus.wait_for_disconnect(), 5)  # type: ignore[no-untyped-call]
