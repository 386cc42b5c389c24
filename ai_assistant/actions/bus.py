"""The system bus as the actions need it: one call at a time, plain values in and out."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from ai_assistant.actions.catalogue import Typed
from ai_assistant.errors import (
    BUS_PREFIX,
    AIAssistantError,
    InternalError,
    InvalidArgument,
    NotAuthorized,
    NotSupported,
    ServiceUnavailable,
    Timeout,
    from_name,
)

_DBUS = "org.freedesktop.DBus.Error."
_NOBODY = frozenset({
    _DBUS + "ServiceUnknown", _DBUS + "NameHasNoOwner", _DBUS + "Spawn.ServiceNotFound", _DBUS + "Spawn.ChildExited",
    _DBUS + "Spawn.ExecFailed", "org.freedesktop.systemd1.NoSuchUnit", "org.freedesktop.systemd1.UnitMasked",
})  # fmt: skip
_NO_SUCH_MEMBER = frozenset(
    _DBUS + each for each in ("UnknownMethod", "UnknownInterface", "UnknownObject", "UnknownProperty")
)
_DENIED = frozenset({_DBUS + "AccessDenied", _DBUS + "AuthFailed", _DBUS + "InteractiveAuthorizationRequired"})
_LATE = frozenset({_DBUS + "NoReply", _DBUS + "Timeout", _DBUS + "TimedOut"})
_INVALID = frozenset({_DBUS + "InvalidArgs", _DBUS + "PropertyReadOnly"})


class BusFailure(Exception):
    """An error reply, or a connection that broke (then `name` is the bus's own NoReply or Disconnected)."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message

    @property
    def nobody_there(self) -> bool:
        """Whether the bus name has no owner and nothing can start one."""
        return self.name in _NOBODY

    def as_error(self, service: str) -> AIAssistantError:
        """The product's error for it; `service` is what to call the one who answered."""
        if self.name.startswith(BUS_PREFIX):
            message, _, hint = self.message.partition(" (hint: ")
            return from_name(self.name, message, hint=hint.removesuffix(")"))
        if self.nobody_there or self.name in _NO_SUCH_MEMBER:
            return NotSupported(f"this image has no {service} that can do that")
        if self.name in _DENIED:
            return NotAuthorized(f"the {service} does not let you do that", hint="use sudo, or ask the device's owner")
        if self.name in _LATE:
            return Timeout(f"the {service} did not answer in time")
        if self.name in _INVALID:
            return InvalidArgument(f"the {service} does not accept that: {self.message}")
        if self.name == _DBUS + "Disconnected":
            return ServiceUnavailable("the system bus cannot be reached", hint="is the appliance running?")
        return InternalError(f"the {service} answered: {self.message or self.name}")


class Bus(Protocol):
    """What the actions ask of a message bus."""

    async def call(
        self, name: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Call a method and return the reply's values, variants unwrapped; `Typed` values become variants.

        Raises:
            BusFailure: for an error reply, no reply within the time limit, or no bus.
        """


class SystemBus:
    """The real bus, through dbus-fast; connects on entry.

    Args:
        address: of another bus than the system's, for tests.
        timeout_s: for one call. A self-test and a restart of a service take seconds.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 90.0) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._bus: Any = None

    async def __aenter__(self) -> Self:
        from dbus_fast import BusType
        from dbus_fast.aio import MessageBus

        try:
            self._bus = await MessageBus(bus_address=self._address, bus_type=BusType.SYSTEM).connect()
        except Exception as error:  # the library raises many kinds, among them bare Exception
            raise ServiceUnavailable(
                f"the system bus cannot be reached: {error}", hint="is the appliance running?"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bus is not None:
            self._bus.disconnect()
            self._bus = None

    async def call(
        self, name: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        import asyncio

        from dbus_fast import Message, MessageType

        if self._bus is None:
            raise BusFailure(_DBUS + "Disconnected", "not connected")
        message = Message(
            destination=name, path=path, interface=interface, member=member, signature=signature,
            body=[_packed(each) for each in body],
        )  # fmt: skip
        try:
            reply = await asyncio.wait_for(self._bus.call(message), self._timeout_s)
        except TimeoutError:
            raise BusFailure(_DBUS + "NoReply", f"no reply within {self._timeout_s:.0f} s") from None
        except (OSError, EOFError) as error:
            raise BusFailure(_DBUS + "Disconnected", str(error)) from error
        if reply is None:
            raise BusFailure(_DBUS + "Disconnected", "the connection was closed")
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise BusFailure(reply.error_name or "", text)
        return tuple(_plain(each) for each in reply.body)


def _packed(value: Any) -> Any:
    from dbus_fast import Variant

    if isinstance(value, Typed):
        return Variant(value.signature, value.value)
    return list(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    from dbus_fast import Variant

    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
