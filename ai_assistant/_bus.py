"""A connection to the system bus as a client of org.ai_assistant1, with the product's errors.

Calls are sent as plain messages: the interfaces are known (daemon/bus/xml), so nothing is introspected
at run time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.errors import AuthError, InvalidAddressError

from ai_assistant._results import split_hint
from ai_assistant._transport import AGAIN_HINT, GROUP_HINT, START_HINT, went_away
from ai_assistant.errors import (
    BUS_PREFIX,
    AIAssistantError,
    Busy,
    InternalError,
    InvalidArgument,
    NotAuthorized,
    NotSupported,
    ServiceUnavailable,
    Timeout,
    from_name,
)

SERVICE = "org.ai_assistant1"
ROOT = "/org/ai_assistant1"
MANAGER = "org.ai_assistant1.Manager"
INFERENCE = "org.ai_assistant1.Inference"
MODEL = "org.ai_assistant1.Model"
DEVICE = "org.ai_assistant1.Device"
JOB = "org.ai_assistant1.Job"
_DBUS = "org.freedesktop.DBus"
_PROPERTIES = "org.freedesktop.DBus.Properties"

CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0
_POLL_S = 2.0

_GONE = frozenset({"ServiceUnknown", "NameHasNoOwner", "Disconnected", "NoServer"})
_UNKNOWN = frozenset({"UnknownMethod", "UnknownInterface", "UnknownProperty", "InvalidSignature"})


class Bus:
    """Belongs to the event loop that `connect` ran on."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    @classmethod
    async def connect(cls, address: str | None = None) -> Bus:
        """
        Args:
            address: None is the system bus, or what DBUS_SYSTEM_BUS_ADDRESS says.
        Raises:
            ServiceUnavailable: there is no bus there.
        """
        hint = "is dbus running? In a container, its socket must be shared: see DBUS_SYSTEM_BUS_ADDRESS"
        try:
            bus = MessageBus(bus_address=address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await bus.connect()
        except (OSError, EOFError, InvalidAddressError, AuthError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServiceUnavailable(f"cannot connect to the system bus: {why}", hint=hint) from error
        return cls(bus)

    @property
    def connected(self) -> bool:
        return bool(self._bus.connected)

    def close(self) -> None:
        """Transient models and everything else that hangs on this connection end with it."""
        with contextlib.suppress(Exception):  # a connection that broke on its own has no socket left
            self._bus.disconnect()

    async def call(
        self,
        member: str,
        signature: str = "",
        *body: Any,
        path: str = ROOT,
        interface: str = MANAGER,
        fds: Sequence[int] = (),
        timeout_s: float | None = CALL_TIMEOUT_S,
        destination: str = SERVICE,
    ) -> list[Any]:
        """The values that the method returns; variants are unwrapped. The descriptors stay the caller's.

        Raises:
            AIAssistantError: the named error of the daemon, or why it could not be asked.
        """
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
        )
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._bus.call(message)
        except TimeoutError as error:
            raise went_away(error) from error
        except (OSError, EOFError) as error:
            raise went_away(error) from error
        assert reply is not None
        for fd in reply.unix_fds:  # nothing asked for here comes as a descriptor
            os.close(fd)
        if reply.message_type is MessageType.ERROR:
            raise _error(reply)
        return [plain(value) for value in reply.body]

    async def properties(self, path: str, interface: str) -> dict[str, Any]:
        values: dict[str, Any] = (await self.call("GetAll", "s", interface, path=path, interface=_PROPERTIES))[0]
        return values

    async def daemon_present(self) -> bool:
        """Whether the daemon owns its name or the bus can start it."""
        asked = {"path": "/org/freedesktop/DBus", "interface": _DBUS, "destination": _DBUS}
        if (await self.call("NameHasOwner", "s", SERVICE, **asked))[0]:  # type: ignore[arg-type]
            return True
        return SERVICE in (await self.call("ListActivatableNames", **asked))[0]  # type: ignore[arg-type]

    async def watch(self, path: str, interface: str) -> AsyncGenerator[dict[str, Any]]:
        """The properties of an object: now, and again after each change, until the caller stops.

        Raises:
            ServiceUnavailable: the daemon left the bus.
        """
        wake = asyncio.Event()
        gone = False

        def seen(message: Message) -> None:
            nonlocal gone
            if message.message_type is not MessageType.SIGNAL:
                return
            if message.member == "PropertiesChanged" and message.path == path:
                wake.set()
            elif message.member == "NameOwnerChanged" and message.sender == _DBUS and message.body[0] == SERVICE:
                gone = True
                wake.set()

        rules = (
            f"type='signal',sender='{SERVICE}',path='{path}',interface='{_PROPERTIES}',member='PropertiesChanged'",
            f"type='signal',sender='{_DBUS}',member='NameOwnerChanged',arg0='{SERVICE}'",
        )
        self._bus.add_message_handler(seen)
        try:
            for rule in rules:
                await self._match("AddMatch", rule)
            while True:
                wake.clear()
                # All of them anew: a property may be announced as changed without its value.
                yield await self.properties(path, interface)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await wake.wait()
                if gone:
                    raise went_away()
        finally:
            self._bus.remove_message_handler(seen)
            if self.connected:
                for rule in rules:
                    with contextlib.suppress(AIAssistantError):
                        await self._match("RemoveMatch", rule)

    async def _match(self, member: str, rule: str) -> None:
        await self.call(member, "s", rule, path="/org/freedesktop/DBus", interface=_DBUS, destination=_DBUS)


def plain(value: Any) -> Any:
    """A value without its variants, at any depth."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def _error(reply: Message) -> AIAssistantError:
    name = reply.error_name or ""
    text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else "no reason was given"
    if name.startswith(BUS_PREFIX):
        message, hint = split_hint(text)
        return from_name(name, message, hint=hint)
    bare = name.removeprefix(_DBUS + ".Error.")
    if bare in _GONE or bare.startswith("Spawn."):
        return ServiceUnavailable("the daemon is not on the bus", hint=START_HINT)
    if bare == "NoReply":
        return ServiceUnavailable("the daemon left the bus in the middle of the request", hint=AGAIN_HINT)
    if bare in ("Timeout", "TimedOut"):
        return Timeout("the daemon did not answer in time")
    if bare in ("AccessDenied", "InteractiveAuthorizationRequired"):
        return NotAuthorized("the bus or polkit refused this", hint=GROUP_HINT)
    if bare == "LimitsExceeded":
        return Busy("too many requests on one connection", hint="try again in a moment")
    if bare == "InvalidArgs":
        return InvalidArgument(text)
    if bare in _UNKNOWN or bare == "UnknownObject":
        return NotSupported(f"the daemon does not know this: {text}", hint="is it an older version?")
    return InternalError(f"{name or 'the bus'}: {text}")
