"""Bad input over the bus: a named error each time, and afterwards the daemon is as it was and serves."""

# ruff: noqa: ASYNC240 - the test may wait for its files
from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from dbus_fast import Message, Variant

from ai_assistant.services.wire import MAX_MESSAGE_BYTES, SMALL_MESSAGE_BYTES
from tests.bus.client import ROOT, Client, Refused, connected
from tests.bus.world import World

MIB = 1 << 20


async def settled(world: World, limit: int) -> int:
    """The number of open descriptors once it is at most `limit`, or after five seconds."""
    for _ in range(100):
        if world.descriptors() <= limit:
            break
        await asyncio.sleep(0.05)
    return world.descriptors()


async def looked(client: Client) -> None:
    """Until the daemon has looked for devices: it keeps a descriptor to be told of changes."""
    for _ in range(200):
        reply = await client.raw(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        if any("/devices/" in path for path in reply.body[0]):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no device appeared")


@pytest_asyncio.fixture(autouse=True)
async def unharmed(world: World) -> AsyncIterator[None]:
    """After each test: alive, no descriptors left open, memory bounded, a second request works."""
    async with connected(world.address) as client:
        await client.call("Manager", "ListModels")
        await looked(client)
    fds, memory = world.descriptors(), world.memory()
    yield
    async with connected(world.address) as client:
        assert isinstance(await client.call("Manager", "ListModels"), list)
    assert world.alive
    assert await settled(world, fds) <= fds
    assert world.memory() < memory + 16 * MIB
    assert "Traceback" not in world.log


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES, 60 * MIB])
async def test_huge_strings_are_refused_and_not_kept(world: World, client: Client, size: int) -> None:
    before = world.memory("VmHWM")
    for _ in range(3):
        with pytest.raises(Refused) as caught:
            await client.call("Inference", "Generate", "ssa{sv}", "assistant:1", "x" * size, {})
        assert caught.value.name == "org.ai_assistant1.Error.InvalidArgument"
        assert "larger than" in caught.value.text
    assert world.memory("VmHWM") < before + 8 * MIB


async def test_the_largest_message_that_is_decoded(world: World, client: Client) -> None:
    text = "x" * (MAX_MESSAGE_BYTES - 1000)
    for _ in range(3):
        with pytest.raises(Refused, match="NoSuchModel"):
            await client.call("Inference", "Generate", "ssa{sv}", "none", text, {})
    with pytest.raises(Refused, match="NoSuchModel"):
        await client.call("Manager", "FindModel", "s", text[: SMALL_MESSAGE_BYTES - 1000])
    with pytest.raises(Refused, match="larger than"):
        await client.call("Manager", "FindModel", "s", text[:SMALL_MESSAGE_BYTES])


async def test_what_no_method_takes_is_never_decoded(world: World, client: Client) -> None:
    # Three bytes each on the wire, a hundred times that as objects.
    many: list[list[str]] = [[] for _ in range(500_000)]
    before = world.memory("VmHWM")
    for path, interface, member, error in (
        (ROOT, "org.ai_assistant1.Inference", "OpenStream", "InvalidArgs"),
        (ROOT, "org.ai_assistant1.Manager", "Nope", "UnknownMethod"),
        ("/nowhere", "org.ai_assistant1.Manager", "GetStatus", "UnknownObject"),
    ):
        with pytest.raises(Refused, match=error):
            await client.raw(path, interface, member, "aas", many)
    assert world.memory("VmHWM") < before + 8 * MIB


async def test_unexpected_descriptors_are_closed(world: World, client: Client, tmp_path: Path) -> None:
    file = os.open("/etc/hostname", os.O_RDONLY)
    try:
        for _ in range(50):
            for path, interface, member in (
                (ROOT, "org.ai_assistant1.Manager", "GetStatus"),
                (ROOT, "org.ai_assistant1.Manager", "Unknown"),
                ("/nowhere", "org.ai_assistant1.Manager", "GetStatus"),
                (ROOT, "org.freedesktop.DBus.Peer", "Ping"),
            ):
                # A signature with h, so that the message is valid; the method takes none.
                with pytest.raises(Refused):
                    await client.raw(path, interface, member, "hh", 0, 1, fds=(file, file))
        signal = Message.new_signal(ROOT, "a.b", "C", "h", [0], [file])
        signal.destination = "org.ai_assistant1"
        for _ in range(50):
            await client.bus.send(signal)
            signal.serial = 0
    finally:
        os.close(file)


async def test_descriptor_arguments_that_did_not_come(client: Client) -> None:
    with pytest.raises(Refused, match="InvalidArgument"):
        await client.call("Manager", "OpenModel", "ha{sv}", 7, {})


async def test_files_that_are_no_models(client: Client, tiny_model: Path, tmp_path: Path) -> None:
    whole = tiny_model.read_bytes()
    counts = whole[:8] + b"\xff" * 7 + b"\x7f" + whole[16:]
    contents = {
        "empty": b"",
        "one byte": b"G",
        "only the magic": whole[:4],
        "truncated header": whole[:1000],
        "truncated weights": whole[:-1],
        "wrong magic": b"GGUX" + whole[4:],
        "absurd counts": counts,
        "other architecture": whole.replace(b"llama", b"lemma"),
        "text": b"hello\n" * 1000,
    }
    paths: dict[str, Path] = {}
    for name, content in contents.items():
        paths[name] = tmp_path / name.replace(" ", "-")
        paths[name].write_bytes(content)
    for name, begin in (("sparse zeros", b""), ("sparse behind a header", counts[:64])):
        paths[name] = tmp_path / name.replace(" ", "-")
        with paths[name].open("wb") as file:
            file.write(begin)
            file.truncate(100 * 10**9)
    for name, path in paths.items():
        for method, signature, arguments in (
            ("OpenModel", "ha{sv}", (0, {})),
            ("ImportModel", "hsa{sv}", (0, "bad", {})),
        ):
            with path.open("rb") as file, pytest.raises(Refused) as caught:
                await client.call("Manager", method, signature, *arguments, fds=(file.fileno(),), timeout_s=10)
            assert caught.value.name == "org.ai_assistant1.Error.InvalidModel", (name, caught.value)


async def test_a_good_header_before_a_hundred_gigabytes_of_nothing(
    world: World, client: Client, tiny_model: Path, tmp_path: Path
) -> None:
    """It passes as a model, since weights may be followed by padding; the disk decides about the import."""
    path = tmp_path / "padded.gguf"
    path.write_bytes(tiny_model.read_bytes())
    os.truncate(path, max(100 * 10**9, 2 * shutil.disk_usage(tmp_path).total))
    with path.open("rb") as file, pytest.raises(Refused, match="NoSpace"):
        await client.call("Manager", "ImportModel", "hsa{sv}", 0, "padded", {}, fds=(file.fileno(),), timeout_s=10)


async def test_descriptors_that_are_no_files(client: Client, tiny_model: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    left, right = socket.socketpair()
    opened = {
        "pipe": read,
        "socket": left.detach(),
        "folder": os.open(tmp_path, os.O_RDONLY),
        "device": os.open("/dev/zero", os.O_RDONLY),
        "write-only": os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT),
        "path-only": os.open(tiny_model, os.O_PATH),
    }
    try:
        for name, fd in opened.items():
            with pytest.raises(Refused) as caught:
                await client.call("Manager", "OpenModel", "ha{sv}", 0, {}, fds=(fd,), timeout_s=10)
            assert caught.value.name == "org.ai_assistant1.Error.InvalidModel", (name, caught.value)
    finally:
        right.close()
        for fd in (*opened.values(), write):
            os.close(fd)


async def test_bad_names_and_options(client: Client, tiny_model: Path) -> None:
    wrong = [
        ("../x", {}),
        ("", {}),
        ("a:b:c", {}),
        ("A", {}),
        ("x" * 65, {}),
        ("a/b", {}),
        (".hidden", {}),
        ("good", {"unknown": Variant("s", "x")}),
    ]
    with tiny_model.open("rb") as file:
        for name, options in wrong:
            with pytest.raises(Refused, match="InvalidArgument"):
                await client.call("Manager", "ImportModel", "hsa{sv}", 0, name, options, fds=(file.fileno(),))
        for options in (
            {"name": Variant("u", 1)},
            {"name": Variant("s", "a:1")},
            {"context_length": Variant("s", "x")},
            {"context_length": Variant("i", -1)},
            {"hetero_compute": Variant("s", "maybe?")},
            {"hetero_compute": Variant("u", 1)},
            {"what": Variant("b", True)},
        ):
            with pytest.raises(Refused, match="InvalidArgument"):
                await client.call("Manager", "OpenModel", "ha{sv}", 0, options, fds=(file.fileno(),))


async def test_transient_models_die_with_their_connection(world: World, client: Client, tiny_model: Path) -> None:
    count = await client.get(ROOT, "Manager", "ModelCount")
    async with connected(world.address) as other:
        with tiny_model.open("rb") as file:
            for _ in range(3):
                await other.call("Manager", "OpenModel", "ha{sv}", 0, {}, fds=(file.fileno(),))
        assert await client.get(ROOT, "Manager", "ModelCount") == count + 3
    for _ in range(100):
        if await client.get(ROOT, "Manager", "ModelCount") == count:
            break
        await asyncio.sleep(0.05)
    assert await client.get(ROOT, "Manager", "ModelCount") == count


async def test_transient_models_are_limited(world: World, tiny_model: Path) -> None:
    async with connected(world.address) as other:
        with tiny_model.open("rb") as file:
            for _ in range(16):
                await other.call("Manager", "OpenModel", "ha{sv}", 0, {}, fds=(file.fileno(),))
            with pytest.raises(Refused, match="Busy"):
                await other.call("Manager", "OpenModel", "ha{sv}", 0, {}, fds=(file.fileno(),))


async def test_a_caller_that_leaves_in_the_middle(world: World, tiny_model: Path) -> None:
    for _ in range(5):
        async with connected(world.address) as other:
            with tiny_model.open("rb") as file:
                message = Message(
                    "org.ai_assistant1",
                    ROOT,
                    "org.ai_assistant1.Manager",
                    "OpenModel",
                    signature="ha{sv}",
                    body=[0, {}],
                    unix_fds=[file.fileno()],
                )
                await other.bus.send(message)


async def test_unanswered_calls_are_limited(world: World, tiny_model: Path) -> None:
    async with connected(world.address) as other:
        with tiny_model.open("rb") as file:
            calls = [
                other.call("Manager", "OpenModel", "ha{sv}", 0, {"name": Variant("s", "UPPER")}, fds=(file.fileno(),))
                for _ in range(120)  # the bus itself ends it at 128
            ]
            assert world.daemon is not None
            # All of them wait when it looks, however fast it is.
            world.daemon.send_signal(signal.SIGSTOP)
            waiting = asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0.5)
            world.daemon.send_signal(signal.SIGCONT)
            results = await waiting
    names = {each.name for each in results if isinstance(each, Refused)}
    assert "org.ai_assistant1.Error.Busy" in names
    assert all(isinstance(each, Refused) for each in results)


async def test_many_signatures_do_not_stay(world: World, client: Client) -> None:
    letters = "ybnqiuxtds"
    for index in range(2000):
        signature = "(" + "".join(letters[int(digit)] for digit in f"{index:08d}") + ")"
        value = Variant(signature, ["" if each == "s" else 0.0 if each == "d" else False if each == "b" else 0
                                    for each in signature[1:-1]])  # fmt: skip
        with pytest.raises(Refused):
            await client.raw(ROOT, "a.b", "C", "v", value)


async def test_import_leaves_nothing_behind_when_cancelled(
    world: World, client: Client, tiny_model: Path, tmp_path: Path
) -> None:
    before = world.state_files()
    path = tmp_path / "large.gguf"
    path.write_bytes(tiny_model.read_bytes())
    os.truncate(path, 3 * 10**9)
    with path.open("rb") as file:
        job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "large", {}, fds=(file.fileno(),))
    await asyncio.sleep(0.3)
    await client.call("Job", "Cancel", path=job)
    values = await client.job(job)
    assert values["State"] == "cancelled"
    assert values["Error"][0] == "org.ai_assistant1.Error.Cancelled"
    assert world.state_files() == before


async def test_a_file_that_changes_while_it_is_read(
    world: World, client: Client, tiny_model: Path, tmp_path: Path
) -> None:
    before = world.state_files()
    path = tmp_path / "changing.gguf"
    path.write_bytes(tiny_model.read_bytes())
    os.truncate(path, 1_000_000_000)
    with path.open("rb") as file:
        job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "changing", {}, fds=(file.fileno(),))
    os.truncate(path, 900_000_000)
    values = await client.job(job)
    assert values["State"] == "failed"
    assert values["Error"][0] == "org.ai_assistant1.Error.InvalidModel"
    assert world.state_files() == before


async def test_import_twice_and_remove(world: World, client: Client, tiny_model: Path, tmp_path: Path) -> None:
    before = world.state_files()
    for _ in range(2):
        with tiny_model.open("rb") as file:
            job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "twice:2", {}, fds=(file.fileno(),))
        values = await client.job(job)
        assert values["State"] == "done"
        assert values["Progress"] == 1.0
        assert values["Result"]["name"].value == "twice:2"
    other = bytearray(tiny_model.read_bytes())
    other[-1] ^= 1
    path = tmp_path / "other.gguf"
    path.write_bytes(other)
    with path.open("rb") as file:
        job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "twice:2", {}, fds=(file.fileno(),))
    assert (await client.job(job))["Error"][0] == "org.ai_assistant1.Error.AlreadyExists"
    model = await client.call("Manager", "FindModel", "s", "twice")
    await client.call("Model", "Remove", path=model)
    assert world.state_files() == before
