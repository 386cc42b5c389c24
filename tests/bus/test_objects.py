"""What every D-Bus client relies on: introspection as in the XML, properties, the object manager, errors."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from dbus_fast import Variant

from ai_assistant.daemon import bus
from ai_assistant.services import schema
from tests.bus.client import ROOT, Client, Refused
from tests.bus.world import World

XML = Path(bus.__file__).parent / "xml"
Shape = dict[str, object]


def shape(interface: ElementTree.Element) -> Shape:
    """An interface as plain values, without its documentation."""
    found: Shape = {}
    for element in interface:
        name = element.get("name", "")
        if element.tag == "method":
            found[name] = [(arg.get("direction"), arg.get("name"), arg.get("type")) for arg in element.findall("arg")]
        elif element.tag == "property":
            found[name] = (element.get("type"), element.get("access"))
    return found


async def _device(client: Client) -> str:
    """The processor, once the daemon has looked."""
    for _ in range(300):
        reply = await client.raw(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        for path, interfaces in reply.body[0].items():
            if interfaces.get(f"{schema.PREFIX}Device", {}).get("Kind") == Variant("s", "cpu"):
                return str(path)
        await asyncio.sleep(0.1)
    raise AssertionError("no processor was found")


async def test_live_introspection_is_the_xml(world: World, client: Client, tiny_model: Path) -> None:
    with tiny_model.open("rb") as file:
        job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "shape", {}, fds=(file.fileno(),))
    result = (await client.job(job))["Result"]
    device = await _device(client)
    places = {"Manager": ROOT, "Inference": ROOT, "Job": job, "Model": result["model"].value, "Device": device}
    for name, path in places.items():
        reply = await client.raw(path, "org.freedesktop.DBus.Introspectable", "Introspect")
        live = {each.get("name"): each for each in ElementTree.fromstring(reply.body[0]).findall("interface")}
        written = ElementTree.parse(XML / f"{schema.PREFIX}{name}.xml").find("interface")
        assert written is not None
        assert shape(live[schema.PREFIX + name]) == shape(written)


def test_busctl_shows_the_tree(world: World) -> None:
    tree = world.busctl("tree", "org.ai_assistant1").stdout
    assert "/org/ai_assistant1" in tree
    assert "/org/ai_assistant1/jobs" in tree
    assert "Traceback" not in tree


async def test_children_are_whole_components(client: Client) -> None:
    reply = await client.raw("/org", "org.freedesktop.DBus.Introspectable", "Introspect")
    assert [each.get("name") for each in ElementTree.fromstring(reply.body[0]).findall("node")] == ["ai_assistant1"]
    reply = await client.raw("/org/ai", "org.freedesktop.DBus.Introspectable", "Introspect")
    assert not ElementTree.fromstring(reply.body[0]).findall("node")


async def test_properties(client: Client) -> None:
    assert await client.get(ROOT, "Manager", "Version") == "0.1.0"
    for name, error in (("Nope", "UnknownProperty"), ("", "UnknownProperty")):
        with pytest.raises(Refused) as caught:
            await client.get(ROOT, "Manager", name)
        assert caught.value.name.endswith(error)
    with pytest.raises(Refused, match="UnknownInterface"):
        await client.get(ROOT, "Nope", "Version")


async def test_objects_come_and_go_with_signals(client: Client, tiny_model: Path) -> None:
    await client.listen()
    with tiny_model.open("rb") as file:
        path, name = await client.call("Manager", "OpenModel", "ha{sv}", 0, {}, fds=(file.fileno(),))
    managed = (await client.raw(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")).body[0]
    assert managed[path]["org.ai_assistant1.Model"]["Name"].value == name
    await client.call("Model", "Remove", path=path)
    await asyncio.sleep(0.1)
    seen = [(each.member, each.path, each.body[0]) for each in client.signals if each.member != "PropertiesChanged"]
    assert ("InterfacesAdded", ROOT, path) in seen
    assert ("InterfacesRemoved", ROOT, path) in seen
    with pytest.raises(Refused, match="UnknownObject"):
        await client.get(path, "Model", "Name")


async def test_status_measures_this_machine(client: Client) -> None:
    status = {key: value.value for key, value in (await client.call("Manager", "GetStatus")).items()}
    assert status["version"] == "0.1.0"
    assert status["disk_free_bytes"] <= status["disk_total_bytes"]
    assert status["running"] == 0
    reply = await client.call("Manager", "GetStatus")
    assert (reply["models"].signature, reply["addresses"].signature) == ("av", "as")
    assert reply["temperatures"].signature == "av"


async def test_wrong_calls_get_standard_errors(world: World, client: Client) -> None:
    wrong = [
        (ROOT, "org.ai_assistant1.Manager", "FindModel", "u", (1,), "InvalidArgs"),
        (ROOT, "org.ai_assistant1.Manager", "FindModel", "", (), "InvalidArgs"),
        (ROOT, "org.ai_assistant1.Manager", "Nothing", "", (), "UnknownMethod"),
        (ROOT, "org.ai_assistant1.Nothing", "GetStatus", "", (), "UnknownInterface"),
        ("/org/ai_assistant1/models/999", "org.ai_assistant1.Model", "Unload", "", (), "UnknownObject"),
        (ROOT, "org.freedesktop.DBus.Properties", "Set", "ss", ("a", "b"), "InvalidArgs"),
        (ROOT, "org.freedesktop.DBus.Nothing", "Nothing", "", (), "UnknownMethod"),
        (ROOT, "org.ai_assistant1.Manager", "FindModel", "s", ("no-such-model",), "NoSuchModel"),
        (ROOT, "org.ai_assistant1.Manager", "FindModel", "s", ("../../etc/passwd",), "NoSuchModel"),
        (ROOT, "org.ai_assistant1.Manager", "GetLog", "us", (0, ""), "InvalidArgument"),
        (ROOT, "org.ai_assistant1.Manager", "GetLog", "us", (5, "loud"), "InvalidArgument"),
    ]
    for path, interface, member, signature, body, error in wrong:
        with pytest.raises(Refused) as caught:
            await client.raw(path, interface, member, signature, *body)
        assert caught.value.name.endswith("." + error), (member, caught.value)
        assert "Traceback" not in caught.value.text
    assert world.alive


def test_errors_carry_hints_and_no_tracebacks(world: World) -> None:
    text = world.call("FindModel", "s", "nope")
    assert "there is no model 'nope'" in text
    assert "(hint: " in text


async def test_set_is_refused(world: World) -> None:
    done = world.busctl("set-property", "org.ai_assistant1", ROOT, "org.ai_assistant1.Manager", "Version", "s", "9")
    assert done.returncode != 0
    assert world.property(ROOT, "Manager", "Version") == "0.1.0"


def test_idle_is_small_and_quiet(world: World) -> None:
    world.wakeups(1)
    assert world.wakeups(5) <= 5
    rss = world.memory()
    print(json.dumps({"idle_rss_bytes": rss}))
    assert rss <= 45_000_000, rss


def test_stop_is_orderly(tmp_path: Path, world: World) -> None:
    fds = world.descriptors()
    assert fds < 64
    assert world.stop_daemon() == 0
    world.start_daemon()
    assert world.api.exists()


async def test_pins_drains_and_estimates(client: Client, tiny_model: Path) -> None:
    with tiny_model.open("rb") as file:
        job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, "steady", {}, fds=(file.fileno(),))
    path = (await client.job(job))["Result"]["model"].value
    assert await client.get(path, "Model", "Pinned") is False
    await client.call("Model", "Pin", path=path)
    assert await client.get(path, "Model", "Pinned") is True
    await client.call("Model", "Unpin", path=path)
    assert await client.get(path, "Model", "Pinned") is False
    known = await client.get(path, "Model", "Memory")
    assert known["total_bytes"].value == await client.get(path, "Model", "MemoryEstimateBytes")
    one = {"sequences": Variant("u", 1)}
    small = await client.call("Model", "Estimate", "a{sv}", one, path=path)
    assert 0 < small["kv_bytes"].value < known["kv_bytes"].value
    values = await client.job(await client.call("Model", "Drain", path=path))
    assert values["State"] == "done"
    for options in (
        {"sequences": Variant("u", 100_000)}, {"context_length": Variant("d", float("nan"))},
        {"context_length": Variant("x", -1)}, {"context_length": Variant("b", True)}, {"surprise": Variant("u", 1)},
    ):  # fmt: skip
        with pytest.raises(Refused, match="InvalidArgument"):
            await client.call("Model", "Estimate", "a{sv}", options, path=path)
