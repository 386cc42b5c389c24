"""The bus connection against a peer that the test plays: framing, descriptors, bursts, and hostile bytes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import resource
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from dbus_fast import Message, MessageType, Variant
from dbus_fast._private.unmarshaller import Unmarshaller

from ai_assistant.daemon import bus
from ai_assistant.daemon.bus import ROOT
from ai_assistant.errors import ServiceUnavailable
from ai_assistant.services import wire as module
from ai_assistant.services.connection import Call, Connection
from ai_assistant.services.values import plain, variant, variants
from ai_assistant.services.wire import (
    MAX_MESSAGE_BYTES,
    SMALL_MESSAGE_BYTES,
    BusError,
    Header,
    Incoming,
    Wire,
    parse_header,
)

OK = b"OK 0123456789abcdef\r\nAGREE_UNIX_FD\r\n"


def encoded(message: Message, serial: int = 7) -> bytes:
    message.serial = serial
    return bytes(message._marshall(True))


def call(*body: object, signature: str = "", fds: tuple[int, ...] = ()) -> Message:
    return Message(
        "org.ai_assistant1", "/p", "a.b", "C", sender=":1.9", signature=signature, body=list(body), unix_fds=list(fds)
    )


class Peer:
    """Plays the message bus."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.received: list[Incoming] = []
        self.lost: list[Exception] = []
        self.wire = Wire(self.received.append, self.lost.append)
        self.sock: socket.socket | None = None

    async def accept(self, address: str) -> None:
        loop = asyncio.get_running_loop()
        connecting = asyncio.ensure_future(self.wire.connect(address))
        self.sock, _ = await loop.sock_accept(self.listener)
        self.sock.setblocking(False)
        assert b"BEGIN\r\n" in await loop.sock_recv(self.sock, 4096)
        await self.send(OK)
        hello = await loop.sock_recv(self.sock, 4096)
        header = parse_header(hello)
        assert header is not None
        assert header.member == "Hello"
        reply = Message(
            message_type=MessageType.METHOD_RETURN, reply_serial=header.serial, signature="s", body=[":1.5"]
        )
        await self.send(encoded(reply))
        await connecting

    async def send(self, data: bytes) -> None:
        assert self.sock is not None
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def settle(self, count: int) -> None:
        for _ in range(200):
            if len(self.received) >= count or self.lost:
                return
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def peer(tmp_path: object) -> AsyncIterator[Peer]:
    path = f"{tmp_path}/bus"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        made = Peer(listener)
        await made.accept(f"unix:path={path}")
        yield made
        made.wire.close()
        if made.sock is not None:
            made.sock.close()


def test_headers_are_read_as_the_library_writes_them() -> None:
    message = call("x", 3, signature="su", fds=(0, 1))
    data = encoded(message)
    header = parse_header(data)
    assert header is not None
    assert (header.kind, header.serial, header.total_bytes) == (MessageType.METHOD_CALL, 7, len(data))
    assert (header.path, header.interface, header.member, header.signature) == ("/p", "a.b", "C", "su")
    assert (header.destination, header.unix_fds, header.expects_reply) == ("org.ai_assistant1", 2, True)
    for length in range(len(data) - 12):
        assert parse_header(data[:length]) is None or length >= 16


def test_random_bytes_are_an_error_or_too_short() -> None:
    rng = random.Random(3)
    good = encoded(call("x", signature="s"))
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(ValueError, IndexError, struct.error):
            parse_header(data)


async def test_messages_in_any_pieces(peer: Peer) -> None:
    data = b"".join(encoded(call(str(index) * 50, signature="s"), index + 1) for index in range(20))
    rng = random.Random(1)
    at = 0
    while at < len(data):
        step = rng.randrange(1, 300)
        await peer.send(data[at : at + step])
        at += step
        await asyncio.sleep(0)
    await peer.settle(20)
    assert [each.body[0] for each in peer.received] == [str(index) * 50 for index in range(20)]


async def test_descriptors_belong_to_the_message_that_counts_them(peer: Peer) -> None:
    assert peer.sock is not None
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    plain_call = encoded(call("x", signature="s"), 1)
    with_two = encoded(call(0, signature="h", fds=(0, 1)), 2)
    with_one = encoded(call(0, signature="h", fds=(0,)), 3)
    # One write: the kernel hands over all three descriptors with the first read.
    socket.send_fds(peer.sock, [plain_call + with_two + with_one + plain_call], files)
    await peer.settle(4)
    assert [len(each.fds) for each in peer.received] == [0, 2, 1, 0]
    got = [fd for each in peer.received for fd in each.fds]
    assert all(not os.get_inheritable(fd) for fd in got)
    for fd in (*got, *files):
        os.close(fd)


async def test_large_bodies_are_dropped_as_they_come(peer: Peer) -> None:
    big = encoded(call("x" * (MAX_MESSAGE_BYTES + 5), signature="s"), 1)
    small = encoded(call("after", signature="s"), 2)
    await peer.send(big + small)
    await peer.settle(2)
    assert [each.oversize for each in peer.received] == [True, False]
    assert peer.received[0].body == []
    assert peer.received[0].header.member == "C"
    assert peer.received[1].body == ["after"]
    assert len(peer.wire._buffer) == 0


async def test_only_bodies_that_are_wanted_are_decoded(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counting(stream: io.BytesIO) -> Unmarshaller:
        decoded.append(1)
        return Unmarshaller(stream)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "Unmarshaller", counting)
    peer.wire._limit = lambda header: {"s": 1000, "as": 0}[header.signature]
    await peer.send(encoded(call(["x"] * 50, signature="as"), 1) + encoded(call("x" * 2000, signature="s"), 2))
    # An answer that nobody waits for.
    stray = Message(message_type=MessageType.METHOD_RETURN, reply_serial=999, signature="as", body=[["x"]])
    await peer.send(encoded(stray) + encoded(call("y", signature="s"), 3))
    await peer.settle(3)
    assert [(each.unread, each.oversize, each.body) for each in peer.received] == [
        (True, False, []),
        (False, True, []),
        (False, False, ["y"]),
    ]
    assert len(decoded) == 1


async def test_lost_descriptors_end_the_connection(peer: Peer) -> None:
    assert peer.sock is not None
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(files) + 3, hard))
        socket.send_fds(peer.sock, [encoded(call(0, signature="h", fds=tuple(range(8))), 1)], files)
        await peer.settle(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [str(each) for each in peer.lost] == ["descriptors were lost: too many are open"]
    assert peer.received == []
    # What did arrive is closed, and the connection with it.
    assert len(os.listdir("/proc/self/fd")) < before  # noqa: PTH208
    for fd in files:
        os.close(fd)


async def test_what_a_method_does_not_take_is_not_decoded() -> None:
    connection = Connection(map(bus.load, bus.NAMES), root=ROOT, large=bus.TEXTS)

    class Handler:
        def properties(self) -> dict[str, object]:
            return {}

        async def generate(self, call: Call, model: str, prompt: str, options: object) -> None: ...
        async def open_stream(self, call: Call, request: str) -> None: ...
        async def embed(self, call: Call, model: str, texts: list[str]) -> None: ...
        async def embed_with(self, call: Call, model: str, texts: list[str], options: object) -> None: ...

    connection.export(ROOT, {"org.ai_assistant1.Inference": Handler()})

    def worth(member: str, signature: str, interface: str = "org.ai_assistant1.Inference", path: str = ROOT) -> int:
        return connection._worth(
            Header(MessageType.METHOD_CALL, 0, 1, 100, path, interface, member, signature=signature)
        )

    assert worth("OpenStream", "s") == worth("OpenStream", "s", "") == MAX_MESSAGE_BYTES
    assert worth("OpenStream", "as") == worth("Nope", "s") == worth("OpenStream", "s", path="/x") == 0
    assert worth("Get", "ss", "org.freedesktop.DBus.Properties") == SMALL_MESSAGE_BYTES
    assert worth("Get", "a(ss)", "org.freedesktop.DBus.Properties") == 0
    assert connection._worth(Header(MessageType.SIGNAL, 0, 1, 100, sender=":1.9", member="NameOwnerChanged")) == 0


async def test_a_burst_waits_for_the_reader(peer: Peer) -> None:
    count = 3000
    for index in range(count):
        peer.wire.send(Message.new_signal("/p", "a.b", "S", "us", [index, "x" * 1000]))
    assert peer.wire.connected
    loop = asyncio.get_running_loop()
    assert peer.sock is not None
    data, seen = b"", 0
    while seen < count:
        data += await loop.sock_recv(peer.sock, 1 << 20)
        while (header := parse_header(data)) is not None and len(data) >= header.total_bytes:
            data = data[header.total_bytes :]
            seen += 1
    assert seen == count
    await peer.wire.flush()
    assert not peer.lost


async def test_sent_descriptors_are_closed_here(peer: Peer) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    peer.wire.send(Message.new_signal("/p", "a.b", "S", "h", [0]), [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ValueError, match="message of"):
        peer.wire.send(Message.new_signal("/p", "a.b", "S", "sh", ["x" * (module.MAX_REPLY_BYTES), 0]), [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert peer.wire.connected


async def test_a_bus_that_does_not_read_is_given_up(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUEUE_BYTES", 1 << 20)
    for _ in range(20):
        peer.wire.send(Message.new_signal("/p", "a.b", "S", "s", ["x" * 200_000]))
    assert not peer.wire.connected
    assert len(peer.lost) == 1


async def test_calls_fail_when_the_bus_goes(peer: Peer) -> None:
    waiting = asyncio.ensure_future(peer.wire.call("a.b", "/", "a.b", "C"))
    await asyncio.sleep(0.01)
    assert peer.sock is not None
    peer.sock.close()
    with pytest.raises(BusError, match="Disconnected"):
        await waiting
    assert len(peer.lost) == 1
    with pytest.raises(BusError, match="Disconnected"):
        await peer.wire.call("a.b", "/", "a.b", "C")


async def test_calls_have_a_timeout(peer: Peer) -> None:
    with pytest.raises(BusError, match="NoReply"):
        await peer.wire.call("a.b", "/", "a.b", "C", timeout_s=0.05)
    assert peer.wire._calls == {}


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b"l\1\0\1" + b"\xff" * 60])
async def test_what_is_no_message_ends_the_connection(peer: Peer, junk: bytes) -> None:
    await peer.send(junk)
    await peer.settle(1)
    assert len(peer.lost) == 1
    assert not peer.wire.connected


async def test_unknown_kinds_of_messages_are_ignored(peer: Peer) -> None:
    odd = bytearray(encoded(call("x", signature="s"), 1))
    odd[1] = 9
    await peer.send(bytes(odd) + encoded(call("y", signature="s"), 2))
    await peer.settle(1)
    assert [each.body for each in peer.received] == [["y"]]


async def test_no_bus_is_a_named_error(tmp_path: object) -> None:
    for address in (f"unix:path={tmp_path}/none", "tcp:host=localhost", "nonsense"):
        with pytest.raises(ServiceUnavailable):
            await Wire(lambda each: None, lambda error: None).connect(address)


def test_values_and_variants() -> None:
    values = {"a": 1, "b": 2.5, "c": None, "d": True, "e": ["x"], "f": [{"g": 1}], "h": {"i": "j"}, "k": []}
    made = variants(values)
    assert {key: each.signature for key, each in made.items()} == {
        "a": "x", "b": "d", "d": "b", "e": "as", "f": "av", "h": "a{sv}", "k": "as",
    }  # fmt: skip
    assert plain(made) == {key: value for key, value in values.items() if value is not None}
    assert plain(Variant("v", Variant("(su)", ["x", 1]))) == ["x", 1]
    with pytest.raises(TypeError):
        variant(object())
