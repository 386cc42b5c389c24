"""Objects on the bus: dispatch from the XML, properties, the object manager, errors, callers.

Everything that arrives is assumed to be hostile: arguments are checked against the XML before a handler
sees them, descriptors that nobody took are closed, only named errors leave, each caller has a limit of
unanswered calls, and whoever leaves the bus has its calls cancelled and is reported to `on_vanished`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dbus_fast import Message, MessageFlag, MessageType, Variant

from ai_assistant.errors import AIAssistantError, Busy, InternalError, InvalidArgument
from ai_assistant.services import schema, standard
from ai_assistant.services.wire import MAX_MESSAGE_BYTES, SMALL_MESSAGE_BYTES, BusError, Header, Incoming, Wire

log = logging.getLogger(__name__)

_ERROR = "org.freedesktop.DBus.Error."
_CHANGE_INTERVAL_S = 0.25


class Handler(Protocol):
    """Answers one interface on one object; its methods are found by the names in the XML."""

    def properties(self) -> Mapping[str, Any]:
        """The value of every property in the XML, as plain Python values."""


class Outgoing:
    """A descriptor in a reply; it is closed when it has been sent or when the call failed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd


@dataclass(slots=True)
class Descriptor:
    """A descriptor in a call; closed after the call unless taken."""

    fd: int

    def take(self) -> int:
        """From now on the caller of this owns it."""
        fd, self.fd = self.fd, -1
        return fd


@dataclass(slots=True)
class Call:
    """Who calls: the unique bus name, and whether it allows questions to its user."""

    sender: str
    interactive: bool = False


class DBusFault(Exception):
    """A standard error of D-Bus itself, such as UnknownMethod."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = _ERROR + name
        self.message = message


class Connection:
    """A service's presence on a bus.

    Args:
        interfaces: those that its objects may have.
        root: the object that is the object manager of the others; empty: there is none.
        large: names of methods whose messages may be over 64 KiB.
    """

    def __init__(
        self,
        interfaces: Iterable[schema.Interface],
        *,
        root: str = "",
        large: frozenset[str] = frozenset(),
        calls_per_caller: int = 64,
    ) -> None:
        self._objects: dict[str, dict[str, Handler]] = {}
        self._schemas: dict[str, schema.Interface] = {each.name: each for each in interfaces}
        self._root = root
        self._large = large
        self._limit = calls_per_caller
        self._quiet_since = asyncio.get_running_loop().time()
        self._calls: dict[str, set[asyncio.Task[None]]] = {}
        self._dirty: dict[tuple[str, str], set[str]] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}
        self._last: dict[tuple[str, str], dict[str, Any]] = {}
        self.on_vanished: list[Callable[[str], None]] = []
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.wire = Wire(self._receive, self._on_lost, self._worth)

    async def connect(self, address: str = "") -> None:
        """Join the bus; call `own_name` when all objects are there.

        Raises:
            ServiceUnavailable: no bus.
        """
        await self.wire.connect(address)
        rule = (
            "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
            "member='NameOwnerChanged',arg2=''"
        )
        await self._driver("AddMatch", "s", [rule])

    async def own_name(self, name: str) -> None:
        """Take the well-known name.

        Raises:
            Busy: another process has it.
        """
        do_not_queue = 4
        try:
            reply = await self._driver("RequestName", "su", [name, do_not_queue])
        except BusError as error:
            raise InternalError(f"may not own {name}: {error.message}") from error
        if reply.body[0] != 1:
            raise Busy(f"{name} is owned by another process", hint="is another instance of the service running?")

    async def release_name(self, name: str) -> None:
        """Give the well-known name back, and answer what was asked until then; later calls start the service anew.

        Raises:
            BusError: the bus is gone.
        """
        await self._driver("ReleaseName", "s", [name])
        # The bus keeps the order, so whatever it had for us has arrived with its reply.
        while tasks := [task for each in self._calls.values() for task in each]:
            await asyncio.wait(tasks)

    @property
    def quiet_s(self) -> float:
        """Seconds since the last call was answered; 0 while one is not."""
        return 0.0 if self._calls else self._loop.time() - self._quiet_since

    async def credentials(self, sender: str) -> dict[str, Any]:
        """``UnixUserID``, ``UnixGroupIDs``, ``ProcessID`` of a bus connection, where the bus knows them.

        Raises:
            BusError: it left.
        """
        reply = await self._driver("GetConnectionCredentials", "s", [sender])
        return {key: value.value for key, value in reply.body[0].items()}

    async def _driver(self, member: str, signature: str, body: Sequence[Any]) -> Incoming:
        driver = "org.freedesktop.DBus"
        return await self.wire.call(driver, "/org/freedesktop/DBus", driver, member, signature, body)

    async def close(self) -> None:
        """Answer what was answered, cancel the rest, leave the bus."""
        for timer in self._timers.values():
            timer.cancel()
        tasks = [task for each in self._calls.values() for task in each]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2)
        await self.wire.flush()
        self.wire.close()

    def _on_lost(self, reason: Exception) -> None:
        log.error("lost the message bus: %s", reason)
        if not self.lost.done():
            self.lost.set_result(None)

    # ---- objects

    def export(self, path: str, handlers: Mapping[str, Handler]) -> None:
        """Publish an object; `handlers` by interface name. Announced as InterfacesAdded.

        Raises:
            TypeError: a handler does not fit its XML.
        """
        for name, handler in handlers.items():
            schema.check(self._schemas[name], handler)
        self._objects[path] = dict(handlers)
        for name in handlers:
            self._last[(path, name)] = self._values(path, name)
        if self._root and path != self._root:
            body = [path, {name: self._variants(path, name) for name in handlers}]
            self._signal(self._root, "org.freedesktop.DBus.ObjectManager", "InterfacesAdded", "oa{sa{sv}}", body)

    def unexport(self, path: str) -> None:
        """Withdraw an object; unknown paths are ignored. Announced as InterfacesRemoved."""
        handlers = self._objects.pop(path, None)
        if handlers is None:
            return
        for name in handlers:
            self._last.pop((path, name), None)
            self._dirty.pop((path, name), None)
            timer = self._timers.pop((path, name), None)
            if timer is not None:
                timer.cancel()
        if self._root:
            body = [path, list(handlers)]
            self._signal(self._root, "org.freedesktop.DBus.ObjectManager", "InterfacesRemoved", "oas", body)

    def changed(self, path: str, interface: str) -> None:
        """Properties of an object may have changed: at once if it was quiet, else at most 4 times a second."""
        key = (path, interface)
        if key in self._timers:
            self._dirty[key] = set()
            return
        if self._announce(key):
            self._timers[key] = self._loop.call_later(_CHANGE_INTERVAL_S, self._settle, key)

    def _settle(self, key: tuple[str, str]) -> None:
        del self._timers[key]
        if self._dirty.pop(key, None) is not None:
            self.changed(*key)

    def _announce(self, key: tuple[str, str]) -> bool:
        path, interface = key
        if path not in self._objects:
            return False
        properties = self._schemas[interface].properties
        now, before = self._values(path, interface), self._last[key]
        different = {
            name: Variant(properties[name].type, value)
            for name, value in now.items()
            if properties[name].emits_change and before.get(name) != value
        }
        self._last[key] = now
        if not different:
            return False
        body = [interface, different, []]
        self._signal(path, "org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", body)
        return True

    def _values(self, path: str, interface: str) -> dict[str, Any]:
        values = dict(self._objects[path][interface].properties())
        if values.keys() != self._schemas[interface].properties.keys():
            raise InternalError(f"properties of {interface} are not those of the XML")
        return values

    def _variants(self, path: str, interface: str) -> dict[str, Variant]:
        kinds = self._schemas[interface].properties
        return {name: Variant(kinds[name].type, value) for name, value in self._values(path, interface).items()}

    def _signal(self, path: str, interface: str, member: str, signature: str, body: Sequence[Any]) -> None:
        if self.wire.connected:
            self.wire.send(Message.new_signal(path, interface, member, signature, list(body)))

    # ---- calls

    def _worth(self, header: Header) -> int:
        """Size up to which a message is decoded; 0: what it carries is not what its receiver takes."""
        if header.kind is MessageType.SIGNAL:
            wanted = ("org.freedesktop.DBus", "NameOwnerChanged", "sss")
            return SMALL_MESSAGE_BYTES if (header.sender, header.member, header.signature) == wanted else 0
        standing = standard.METHODS.get((header.interface, header.member))
        if standing is not None:
            return SMALL_MESSAGE_BYTES if header.signature == standing else 0
        method = self._method(header)
        if method is None or header.signature != method.in_signature:
            return 0
        return MAX_MESSAGE_BYTES if method.name in self._large else SMALL_MESSAGE_BYTES

    def _method(self, header: Header) -> schema.Method | None:
        for name in self._objects.get(header.path, ()):
            if header.interface in ("", name) and header.member in self._schemas[name].methods:
                return self._schemas[name].methods[header.member]
        return None

    def _receive(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.kind is MessageType.SIGNAL:
            _close(incoming.fds)
            if self._worth(header) and incoming.body:
                self._vanished(incoming.body[0])
            return
        running = self._calls.setdefault(header.sender, set())
        if len(running) >= self._limit:
            _close(incoming.fds)
            self._error(incoming, Busy("too many unanswered calls", hint="wait for the replies"))
            return
        task = self._loop.create_task(self._answer(incoming))
        running.add(task)
        task.add_done_callback(lambda done: self._forget(header.sender, done))

    def _forget(self, sender: str, task: asyncio.Task[None]) -> None:
        running = self._calls.get(sender)
        if running is not None:
            running.discard(task)
            if not running:
                del self._calls[sender]
        self._quiet_since = self._loop.time()

    def _vanished(self, name: str) -> None:
        if not name.startswith(":"):
            return
        for task in self._calls.get(name, ()):
            task.cancel()
        for each in self.on_vanished:
            each(name)

    async def _answer(self, incoming: Incoming) -> None:
        descriptors = [Descriptor(fd) for fd in incoming.fds]
        try:
            if incoming.oversize:
                raise InvalidArgument(
                    f"the message is larger than {self._worth(incoming.header)} bytes",
                    hint="pass bulk data as a descriptor or use the socket",
                )
            signature, body = await self._dispatch(incoming, descriptors)
            self._reply(incoming, signature, body)
        except asyncio.CancelledError:
            # The caller left, or the daemon stops: nobody reads an answer.
            raise
        except Exception as error:
            self._error(incoming, error)
        finally:
            for each in descriptors:
                if each.fd >= 0:
                    os.close(each.fd)

    async def _dispatch(self, incoming: Incoming, descriptors: Sequence[Descriptor]) -> tuple[str, list[Any]]:
        header = incoming.header
        answer = self._standard(incoming)
        if answer is not None:
            return answer
        handlers = self._objects.get(header.path)
        if handlers is None:
            raise DBusFault("UnknownObject", f"no object at {header.path[:200]}")
        if header.interface and header.interface not in handlers:
            raise DBusFault("UnknownInterface", f"no interface {header.interface[:200]} at {header.path[:200]}")
        for name in [header.interface] if header.interface else list(handlers):
            method = self._schemas[name].methods.get(header.member)
            if method is not None:
                break
        else:
            raise DBusFault("UnknownMethod", f"no method {header.member[:200]} at {header.path[:200]}")
        if header.signature != method.in_signature:
            raise DBusFault(
                "InvalidArgs", f"{method.name} takes {method.in_signature or 'nothing'}, not {header.signature[:80]}"
            )
        if incoming.unread:
            # The object came after the message did.
            raise DBusFault("UnknownObject", f"no object at {header.path[:200]}")
        arguments: list[Any] = []
        for each, value in zip(method.inputs, incoming.body, strict=True):
            if each.type == "h":
                if value >= len(descriptors):
                    raise InvalidArgument("the descriptor did not arrive", param=each.name)
                value = descriptors[value]
            arguments.append(value)
        interactive = bool(header.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION.value)
        result = await getattr(handlers[name], method.python_name)(Call(header.sender, interactive), *arguments)
        if not method.outputs:
            return "", []
        return method.out_signature, [result] if len(method.outputs) == 1 else list(result)

    def _standard(self, incoming: Incoming) -> tuple[str, list[Any]] | None:
        """Answers of the interfaces that D-Bus itself defines; None: not one of those."""
        header = incoming.header
        wanted = standard.METHODS.get((header.interface, header.member))
        if wanted is None:
            if header.interface.startswith("org.freedesktop.DBus."):
                raise DBusFault("UnknownMethod", f"no method {header.interface[:200]}.{header.member[:200]}")
            return None
        if header.signature != wanted:
            raise DBusFault("InvalidArgs", f"{header.member} takes {wanted or 'nothing'}")
        match header.member:
            case "Ping":
                return "", []
            case "GetMachineId":
                return "s", [_machine_id()]
            case "Introspect":
                return "s", [self.introspect(header.path)]
            case "GetManagedObjects" if header.path and header.path == self._root:
                return "a{oa{sa{sv}}}", [self._managed()]
            case "GetManagedObjects":
                raise DBusFault("UnknownMethod", f"the object manager is {self._root or 'not here'}")
        return self._property_call(header.path, header.member, incoming.body)

    def _property_call(self, path: str, member: str, body: Sequence[Any]) -> tuple[str, list[Any]]:
        handlers = self._objects.get(path)
        if handlers is None:
            raise DBusFault("UnknownObject", f"no object at {path[:200]}")
        interface = body[0]
        if interface not in handlers:
            if member == "GetAll" and (not interface or interface.startswith("org.freedesktop.DBus.")):
                merged: dict[str, Variant] = {}
                for each in handlers if not interface else ():
                    merged |= self._variants(path, each)
                return "a{sv}", [merged]
            raise DBusFault("UnknownInterface", f"no interface {interface[:200]} at {path[:200]}")
        if member == "GetAll":
            return "a{sv}", [self._variants(path, interface)]
        if body[1] not in self._schemas[interface].properties:
            raise DBusFault("UnknownProperty", f"no property {body[1][:200]}")
        if member == "Set":
            raise DBusFault("PropertyReadOnly", f"{body[1]} is read-only")
        return "v", [self._variants(path, interface)[body[1]]]

    def _managed(self) -> dict[str, dict[str, dict[str, Variant]]]:
        found: dict[str, dict[str, dict[str, Variant]]] = {}
        for path, handlers in self._objects.items():
            if path == self._root:
                continue
            try:
                found[path] = {name: self._variants(path, name) for name in handlers}
            except Exception:
                # One object in a wrong state must not hide all the others.
                log.exception("cannot read the properties of %s", path)
        return found

    def introspect(self, path: str) -> str:
        """Introspection XML of any path, with the children below it."""
        interfaces = [self._schemas[name].xml() for name in self._objects.get(path, {})]
        manager = bool(path) and path == self._root
        return standard.document(interfaces, standard.children(path, self._objects), manager=manager)

    def _reply(self, incoming: Incoming, signature: str, body: list[Any]) -> None:
        header = incoming.header
        fds = [each.fd for each in body if isinstance(each, Outgoing)]
        if not header.expects_reply:
            _close(fds)
            return
        position = 0
        for index, each in enumerate(body):
            if isinstance(each, Outgoing):
                body[index], position = position, position + 1
        message = Message(
            message_type=MessageType.METHOD_RETURN,
            reply_serial=header.serial,
            destination=header.sender,
            signature=signature,
            body=body,
        )
        try:
            self.wire.send(message, fds)
        except ValueError as error:
            raise InvalidArgument("the answer is too large for the bus", hint="use the socket instead") from error

    def _error(self, incoming: Incoming, error: Exception) -> None:
        header = incoming.header
        if isinstance(error, DBusFault):
            name, text = error.name, error.message
        else:
            if not isinstance(error, AIAssistantError):
                extra = {"DBUS_SENDER": header.sender}
                log.error("defect in %s.%s", header.interface, header.member, exc_info=error, extra=extra)
                error = InternalError("internal error", hint="the journal has the details")
            name = error.bus_name
            text = f"{error.message} (hint: {error.hint})" if error.hint else error.message
        if not header.expects_reply or not self.wire.connected:
            return
        message = Message(
            message_type=MessageType.ERROR,
            reply_serial=header.serial,
            destination=header.sender,
            error_name=name,
            signature="s",
            # A NUL would make the message invalid, and then the bus would drop us.
            body=[text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()[:4000]],
        )
        self.wire.send(message)


def _machine_id() -> str:
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii") as file:  # noqa: PTH123
                text = file.read(64).strip()
        except OSError:
            continue
        if len(text) == 32:
            return text
    raise DBusFault("Failed", "this machine has no id yet")


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
