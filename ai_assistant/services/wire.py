"""One connection to a message bus: bytes and descriptors in and out, nothing about objects.

dbus-fast encodes and decodes; its own connection class is not used, because of what a hostile or merely
busy peer can do to it:

* it reads a 60 MB message completely and keeps several copies: here the header is read first, and the
  body of a message over `MAX_MESSAGE_BYTES` is thrown away as it arrives;
* a burst of signals that meets EAGAIN ends the connection: here it waits until the socket takes more;
* descriptors are tied to messages by the size of a read: here by the count in each message's header,
  and close-on-exec is set by the kernel in the same call;
* signatures sent by peers stay in a cache without a limit (2.44): here it is emptied now and then.
"""

from __future__ import annotations

import array
import asyncio
import io
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from dbus_fast import Message, MessageFlag, MessageType
from dbus_fast._private.unmarshaller import Unmarshaller
from dbus_fast.signature import get_signature_tree

from ai_assistant.errors import ServiceUnavailable

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 << 20
"""Largest message that is decoded. Larger ones are answered with an error and never held."""
SMALL_MESSAGE_BYTES = 64 << 10
"""Enough for a call that carries no texts."""
MAX_REPLY_BYTES = 24 << 20
"""A stock dbus-daemon disconnects whoever sends more than 32 MiB."""
MAX_QUEUE_BYTES = 64 << 20
_HEADER_LIMIT = 64 << 10
_READ_BYTES = 256 << 10
_ANCILLARY = socket.CMSG_SPACE(253 * 4)
_CACHED_SIGNATURES = 512
DEFAULT_ADDRESS = "unix:path=/run/dbus/system_bus_socket"


@dataclass(slots=True)
class Header:
    """The routing part of a message, read before anything else of it."""

    kind: MessageType | None
    """None: a kind of message that the specification may add one day; such are ignored."""
    flags: int
    serial: int
    total_bytes: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    unix_fds: int = 0

    @property
    def expects_reply(self) -> bool:
        return self.kind is MessageType.METHOD_CALL and not self.flags & MessageFlag.NO_REPLY_EXPECTED.value


@dataclass(slots=True)
class Incoming:
    """A message with its body decoded; whoever receives it owns `fds`. `oversize` and `unread` ones have no body."""

    header: Header
    body: list[Any] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    oversize: bool = False
    unread: bool = False
    """Nobody takes a body of that signature."""


class BusError(Exception):
    """An error reply to a call of ours."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


_KINDS = {kind.value: kind for kind in MessageType}
_FIELDS = {1: "path", 2: "interface", 3: "member", 4: "error_name", 5: "reply_serial"}
_FIELDS |= {6: "destination", 7: "sender", 8: "signature", 9: "unix_fds"}


def parse_header(buffer: bytes | bytearray | memoryview) -> Header | None:
    """The header of the message at the start of `buffer`, or None if more bytes are needed.

    Raises:
        ValueError: that is no D-Bus message; the stream cannot be used any more.
    """
    if len(buffer) < 16:
        return None
    order = {0x6C: "<", 0x42: ">"}.get(buffer[0])
    if order is None or buffer[3] != 1:
        raise ValueError("not a D-Bus message")
    body, serial, fields = struct.unpack_from(order + "III", buffer, 4)
    end = 16 + fields
    start_of_body = (end + 7) & ~7
    if fields > _HEADER_LIMIT or body > 1 << 27:
        raise ValueError("absurd message size")
    if len(buffer) < start_of_body:
        return None
    header = Header(_KINDS.get(buffer[1]), buffer[2], serial, start_of_body + body)
    position = 16
    while position < end:
        position = (position + 7) & ~7
        if position >= end:
            break
        code, length, kind = buffer[position], buffer[position + 1], chr(buffer[position + 2])
        if length != 1:
            raise ValueError("header field of an unknown kind")
        position += 4
        value: Any
        if kind == "g":
            size = buffer[position]
            value = bytes(buffer[position + 1 : position + 1 + size]).decode()
            position += size + 2
        elif kind in "sou":
            position = (position + 3) & ~3
            (value,) = struct.unpack_from(order + "I", buffer, position)
            position += 4
            if kind != "u":
                size, value = value, bytes(buffer[position : position + value]).decode()
                position += size + 1
        else:
            raise ValueError("header field of an unknown kind")
        name = _FIELDS.get(code)
        if name is not None:
            setattr(header, name, value)
    return header


class Wire:
    """The connection. All methods belong to the event loop that `connect` ran in.

    Args:
        receive: called for every method call and signal; owns the descriptors of what it is given.
        lost: called once when the bus is gone, with the reason.
        limit: the size up to which a call or signal is worth decoding, in bytes; 0: its body is not even looked at,
            since a small body of some signatures takes a hundred times its size when it is decoded.
    """

    def __init__(
        self,
        receive: Callable[[Incoming], None],
        lost: Callable[[Exception], None],
        limit: Callable[[Header], int] = lambda header: MAX_MESSAGE_BYTES,
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._skip = 0
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._queued_bytes = 0
        self._writing = False
        self._empty = asyncio.Event()
        self._serial = 0
        self._calls: dict[int, asyncio.Future[Incoming]] = {}
        self.unique_name = ""

    async def connect(self, address: str = "") -> None:
        """Log in and say hello.

        Raises:
            ServiceUnavailable: no bus there, or it refused us.
        """
        where = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or DEFAULT_ADDRESS
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            await self._loop.sock_connect(sock, _socket_path(where))
            await self._login(sock)
        except (OSError, ValueError, EOFError) as error:
            sock.close()
            raise ServiceUnavailable(f"cannot connect to the message bus at {where}: {error}") from error
        self._socket = sock
        self._loop.add_reader(sock.fileno(), self._readable)
        reply = await self.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")
        self.unique_name = reply.body[0]

    async def _login(self, sock: socket.socket) -> None:
        identity = str(os.getuid()).encode().hex()
        hello = f"\0AUTH EXTERNAL {identity}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
        await self._loop.sock_sendall(sock, hello.encode())
        lines = b""
        # The server says nothing after these two lines until we do.
        while lines.count(b"\r\n") < 2 and len(lines) < 4096:
            piece = await self._loop.sock_recv(sock, 1024)
            if not piece:
                raise EOFError("it closed the connection")
            lines += piece
        first, second, *_ = lines.split(b"\r\n")
        if not first.startswith(b"OK ") or second != b"AGREE_UNIX_FD":
            raise ValueError(f"it answered {first[:80]!r}, {second[:80]!r}")

    def close(self) -> None:
        """Drop the connection; calls of ours that are under way fail. Idempotent."""
        self._end(ConnectionError("closed"), tell=False)

    @property
    def connected(self) -> bool:
        return self._socket is not None

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all that was sent is out."""
        if self._queue and self._socket is not None:
            self._empty = asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), timeout_s)

    # ---- out

    def send(self, message: Message, fds: Sequence[int] = ()) -> int:
        """Queue a message and return its serial; `fds` are closed when they are out (or cannot go out).

        Raises:
            ValueError: over `MAX_REPLY_BYTES`; nothing was sent.
        """
        try:
            self._serial = self._serial % 0xFFFF_FFFF + 1
            message.serial = self._serial
            message.unix_fds = list(fds)
            data = message._marshall(True)
            if len(data) > MAX_REPLY_BYTES:
                raise ValueError(f"message of {len(data)} bytes")
            if self._socket is None:
                raise ConnectionError("not connected")
        except BaseException as error:
            _close(fds)
            if isinstance(error, ConnectionError):
                return self._serial
            raise
        self._queue.append((memoryview(data), list(fds)))
        self._queued_bytes += len(data)
        if self._queued_bytes > MAX_QUEUE_BYTES:
            self._end(ConnectionError("the bus does not read"), tell=True)
        elif not self._writing:
            self._write()
        return self._serial

    def _write(self) -> None:
        sock = self._socket
        while self._queue and sock is not None:
            data, fds = self._queue[0]
            try:
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = sock.sendmsg([data], control)
            except (BlockingIOError, InterruptedError):
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(sock.fileno(), self._write)
                return
            except OSError as error:
                self._end(error, tell=True)
                return
            self._queued_bytes -= sent
            if fds:
                _close(fds)
            if sent == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[sent:], [])
        self._empty.set()
        if self._writing and sock is not None:
            self._writing = False
            self._loop.remove_writer(sock.fileno())

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout_s: float = 25.0,
    ) -> Incoming:
        """Call a method of somebody else and wait for the reply.

        Raises:
            BusError: an error reply, including ``org.freedesktop.DBus.Error.NoReply`` after `timeout_s`.
        """
        message = Message(destination, path, interface, member, signature=signature, body=list(body))
        serial = self.send(message)
        if self._socket is None:
            raise BusError("org.freedesktop.DBus.Error.Disconnected", "the bus is gone")
        future: asyncio.Future[Incoming] = self._loop.create_future()
        self._calls[serial] = future
        try:
            reply = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise BusError("org.freedesktop.DBus.Error.NoReply", f"{destination} does not answer") from None
        finally:
            self._calls.pop(serial, None)
        _close(reply.fds)
        if reply.header.kind is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            raise BusError(reply.header.error_name, text)
        return reply

    # ---- in

    def _readable(self) -> None:
        sock = self._socket
        if sock is None:
            return
        try:
            data, control, flags, _ = sock.recvmsg(_READ_BYTES, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(error, tell=True)
            return
        for level, kind, content in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array.array("i", content[: len(content) // 4 * 4]))
        if flags & socket.MSG_CTRUNC:
            # Some are lost, and nobody can tell which: the rest would go to the wrong messages.
            self._end(ConnectionError("descriptors were lost: too many are open"), tell=True)
            return
        if not data:
            self._end(ConnectionError("the bus closed the connection"), tell=True)
            return
        self._buffer += data
        try:
            self._parse()
        except Exception as error:
            log.exception("cannot read from the message bus")
            self._end(error, tell=True)

    def _parse(self) -> None:
        while self._buffer and self._socket is not None:
            if self._skip:
                dropped = min(self._skip, len(self._buffer))
                del self._buffer[:dropped]
                self._skip -= dropped
                continue
            header = parse_header(self._buffer)
            if header is None:
                return
            if header.kind is None:
                self._skip = header.total_bytes
                _close(self._take(header.unix_fds))
                continue
            most = self._worth(header)
            if header.total_bytes > most:
                self._skip = header.total_bytes
                self._deliver(Incoming(header, fds=self._take(header.unix_fds), oversize=most > 0, unread=most == 0))
                continue
            if len(self._buffer) < header.total_bytes:
                return
            raw = bytes(self._buffer[: header.total_bytes])
            del self._buffer[: header.total_bytes]
            fds = self._take(header.unix_fds)
            try:
                message = Unmarshaller(io.BytesIO(raw)).unmarshall()  # type: ignore[arg-type]
            except Exception:
                # The bus has checked the message: this is a limit or defect of the library, not of the stream.
                log.exception("cannot decode a message from %s", header.sender)
                message = None
            _forget_signatures()
            if message is None:
                self._deliver(Incoming(header, fds=fds, oversize=True))
            else:
                self._deliver(Incoming(header, message.body, fds))

    def _worth(self, header: Header) -> int:
        if header.kind in (MessageType.METHOD_RETURN, MessageType.ERROR):
            return MAX_MESSAGE_BYTES if header.reply_serial in self._calls else 0
        return self._limit(header)

    def _take(self, count: int) -> list[int]:
        return [self._fds.popleft() for _ in range(min(count, len(self._fds)))]

    def _deliver(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.kind in (MessageType.METHOD_RETURN, MessageType.ERROR):
            future = self._calls.get(header.reply_serial)
            if future is None or future.done():
                _close(incoming.fds)
            elif incoming.oversize or incoming.unread:
                _close(incoming.fds)
                future.set_exception(BusError("org.freedesktop.DBus.Error.LimitsExceeded", "the reply is too large"))
            else:
                future.set_result(incoming)
            return
        self._receive(incoming)

    def _end(self, reason: Exception, *, tell: bool) -> None:
        sock, self._socket = self._socket, None
        if sock is None:
            return
        self._loop.remove_reader(sock.fileno())
        if self._writing:
            self._loop.remove_writer(sock.fileno())
        sock.close()
        for _, fds in self._queue:
            _close(fds)
        self._queue.clear()
        _close(self._fds)
        self._fds.clear()
        self._empty.set()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(BusError("org.freedesktop.DBus.Error.Disconnected", str(reason)))
        if tell:
            self._lost(reason)


def _close(fds: Sequence[int] | deque[int]) -> None:
    for fd in fds:
        os.close(fd)


def _forget_signatures() -> None:
    info = getattr(get_signature_tree, "cache_info", None)
    if info is not None and info().currsize > _CACHED_SIGNATURES:
        get_signature_tree.cache_clear()


def _socket_path(address: str) -> str:
    """The path of the first unix socket in a D-Bus address list; abstract names start with a NUL."""
    for each in address.split(";"):
        transport, _, rest = each.partition(":")
        values = dict(pair.partition("=")[::2] for pair in rest.split(",") if pair)
        if transport == "unix" and "path" in values:
            return unquote(values["path"])
        if transport == "unix" and "abstract" in values:
            return "\0" + unquote(values["abstract"])
    raise ValueError("not the address of a unix socket")
