"""The client's side of the bus, against a scripted daemon on a private one."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import Variant

from ai_assistant import (
    AlreadyExists,
    AsyncClient,
    AsyncInferenceEngine,
    Busy,
    Cancelled,
    Client,
    InferenceEngine,
    InternalError,
    InvalidArgument,
    InvalidModel,
    NoSpace,
    NoSuchModel,
    NotAuthorized,
    NotSupported,
    ServiceUnavailable,
    Timeout,
)
from ai_assistant._results import STATUS_KEYS
from ai_assistant.daemon import bus
from tests.sdk import bus_service
from tests.sdk.bus_service import ERROR, ROOT, Broker, Scripted, scripted

pytestmark = pytest.mark.bus


@pytest.fixture
def daemon(system_bus: Broker) -> Iterator[Scripted]:
    with scripted(system_bus.address) as running:
        yield running


@pytest.fixture
def client(daemon: Scripted) -> Iterator[Client]:
    with Client() as made:
        yield made


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_the_script_serves_what_the_xml_says(client: Client, daemon: Scripted, tmp_path: Path) -> None:
    """Otherwise these tests would prove nothing about the real daemon."""
    known = {name: bus.load(name) for name in bus.NAMES}
    model, job = known["Model"], known["Job"]
    assert {name: each.type for name, each in model.properties.items()} == {
        name: str(variant.signature) for name, variant in bus_service.model("x").items()
    }
    assert {name: each.type for name, each in job.properties.items()} == {
        name: str(variant.signature) for name, variant in bus_service.job("load").items()
    }
    manager = known["Manager"].methods
    wanted = {
        "GetStatus": ("", "a{sv}"),
        "GetStatistics": ("", "a{sv}"),
        "FindModel": ("s", "o"),
        "ImportModel": ("hsa{sv}", "o"),
        "PullModel": ("ssa{sv}", "o"),
        "OpenModel": ("ha{sv}", "os"),
        "SelfTest": ("", "a(sbs)"),
        "GetLog": ("us", "as"),
    }
    assert {name: (manager[name].in_signature, manager[name].out_signature) for name in wanted} == wanted
    assert (model.methods["Load"].in_signature, model.methods["Load"].out_signature) == ("a{sv}", "o")
    for method in (model.methods["Unload"], model.methods["Remove"], job.methods["Cancel"]):
        assert (method.in_signature, method.out_signature) == ("", "")


def test_status_has_every_key_and_no_variants(client: Client) -> None:
    status = client.status()
    assert set(STATUS_KEYS) <= set(status)
    assert status["watts"] is None
    assert status["models"] == [{"name": "assistant:1", "state": "loaded"}]
    assert status["temperature_c"] == 45.25


def test_statistics_have_no_variants(client: Client) -> None:
    found = client.statistics()
    assert (found["running"], found["connections"]) == (1, 2)
    assert found["models"][0]["ttft_p95_s"] == 1.5


def test_models(client: Client) -> None:
    assert [each.name for each in client.models()] == ["assistant:1", "writer:2"]
    found = client.model("assistant")
    assert (found.name, found.builtin, found.state, found.context_length) == ("assistant:1", True, "loaded", 2048)
    with pytest.raises(NoSuchModel) as caught:
        client.model("nobody")
    assert caught.value.message == "there is no model 'nobody'"
    assert caught.value.hint == "see ai-assistant model list"


def test_unload_and_remove(client: Client, daemon: Scripted) -> None:
    client.unload("assistant")
    assert client.model("assistant:1").state == "unloaded"
    client.remove("writer:2")
    assert [each.name for each in client.models()] == ["assistant:1"]


def test_import_sends_the_open_file_and_follows_the_job(client: Client, daemon: Scripted, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF and more")
    job = client.import_model(file, "new:1")
    assert daemon.files == [b"GGUF and more"]
    assert job.status().progress == 0.0

    def work() -> None:
        time.sleep(0.1)
        daemon.change(job.path, Progress=Variant("d", 0.5))
        time.sleep(0.1)
        result = Variant("a{sv}", {"name": Variant("s", "new:1")})
        daemon.change(job.path, Progress=Variant("d", 1.0), State=Variant("s", "done"), Result=result)

    worker = threading.Thread(target=work)
    worker.start()
    seen = list(job.watch())
    worker.join()
    assert [each.progress for each in seen][-1] == 1.0
    assert 0.5 in [each.progress for each in seen]
    assert seen[-1].ended
    assert job.wait().result == {"name": "new:1"}


def test_a_failed_job_raises_its_own_error(client: Client, daemon: Scripted) -> None:
    job = client.load("writer")
    error = Variant("(ss)", [ERROR + "NoSpace", "the disk is full (hint: remove models)"])
    daemon.change(job.path, State=Variant("s", "failed"), Error=error)
    with pytest.raises(NoSpace) as caught:
        job.wait()
    assert (caught.value.message, caught.value.hint) == ("the disk is full", "remove models")


def test_a_job_can_be_cancelled(client: Client, daemon: Scripted) -> None:
    job = client.load("writer")
    job.cancel()
    with pytest.raises(Cancelled):
        job.wait()


def test_a_daemon_that_leaves_ends_the_wait(client: Client, daemon: Scripted) -> None:
    job = client.load("writer")
    threading.Timer(0.3, daemon.stop).start()
    with pytest.raises(ServiceUnavailable) as caught:
        job.wait()
    assert caught.value.hint


def test_a_daemon_that_leaves_ends_a_call(client: Client, daemon: Scripted) -> None:
    daemon.silent.add("SelfTest")
    threading.Timer(0.3, daemon.stop).start()
    with pytest.raises(ServiceUnavailable, match="in the middle"):
        client.self_test()


def test_after_a_restart_the_same_client_goes_on(client: Client, daemon: Scripted, system_bus: Broker) -> None:
    assert client.models()
    daemon.stop()
    with pytest.raises(ServiceUnavailable) as caught:
        client.models()
    assert "systemctl start" in caught.value.hint
    with scripted(system_bus.address):
        assert client.models()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (ERROR + "Busy", Busy),
        (ERROR + "AlreadyExists", AlreadyExists),
        (ERROR + "SomethingNew", InternalError),
        ("org.freedesktop.DBus.Error.AccessDenied", NotAuthorized),
        ("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", NotAuthorized),
        ("org.freedesktop.DBus.Error.NoReply", ServiceUnavailable),
        ("org.freedesktop.DBus.Error.ServiceUnknown", ServiceUnavailable),
        ("org.freedesktop.DBus.Error.LimitsExceeded", Busy),
        ("org.freedesktop.DBus.Error.InvalidArgs", InvalidArgument),
        ("org.freedesktop.DBus.Error.UnknownMethod", NotSupported),
        ("org.example.Odd", InternalError),
    ],
)
def test_bus_errors_are_ours(client: Client, daemon: Scripted, sent: str, expected: type[Exception]) -> None:
    daemon.errors["SelfTest"] = (sent, "because")
    with pytest.raises(expected) as caught:
        client.self_test()
    assert type(caught.value) is expected


def test_self_test_and_log(client: Client) -> None:
    assert [(each.name, each.ok) for each in client.self_test()] == [("disk", True), ("worker", False)]
    assert client.log(3) == ["a line"] * 3


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "pipe", "nul"])
def test_files_that_are_no_models_are_not_sent(client: Client, daemon: Scripted, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("m\0" if kind == "nul" else "m.gguf")
    expected: type[Exception] = InvalidModel
    if kind == "missing":
        expected = NoSuchModel
    elif kind == "nul":
        expected = InvalidArgument
    elif kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    else:
        os.mkfifo(path)
    for call in (lambda: client.import_model(path, "x"), lambda: InferenceEngine(model_path=path)):
        with pytest.raises(expected) as caught:
            call()
        assert type(caught.value) is expected
    assert "ImportModel" not in [name for name, _ in daemon.calls]


def test_no_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (f"unix:path={tmp_path}/none", "nonsense", ""):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address or f"unix:path={tmp_path}/none")
        with Client() as client, pytest.raises(ServiceUnavailable):
            client.status()


def test_a_bus_without_the_daemon(system_bus: Broker) -> None:
    with Client() as client:
        assert client.present() is False
        with pytest.raises(ServiceUnavailable):
            client.status()


def test_a_daemon_that_does_not_answer(client: Client, daemon: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_assistant import _bus

    monkeypatch.setitem(_bus.Bus.call.__kwdefaults__ or {}, "timeout_s", 0.2)
    daemon.silent.add("GetStatus")
    with pytest.raises(Timeout):
        client.status()


def test_closing_ends_connection_and_thread(client: Client, daemon: Scripted) -> None:
    client.status()
    before = len(daemon.owners_gone)
    client.close()
    client.close()
    until(lambda: len(daemon.owners_gone) > before)
    assert not [each for each in threading.enumerate() if each.name == "ai-assistant-client"]


def test_a_dropped_client_ends_connection_and_thread(daemon: Scripted) -> None:
    client = Client()
    client.status()
    before = len(daemon.owners_gone)
    del client
    gc.collect()
    until(lambda: len(daemon.owners_gone) > before)
    until(lambda: not [each for each in threading.enumerate() if each.name == "ai-assistant-client"])


def test_from_several_threads(client: Client) -> None:
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(len(client.models()))) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(10)
    assert got == [2] * 8


def test_the_engine_hands_over_an_open_file(daemon: Scripted, tmp_path: Path) -> None:
    file = tmp_path / "My Model.gguf"
    file.write_bytes(b"GGUF!")
    with InferenceEngine(model_path=file, context_length=64) as engine:
        assert engine.backend == "daemon"
        assert engine.model == "my-model:t1"
        assert daemon.files == [b"GGUF!"]
        options = next(body for name, body in daemon.calls if name == "OpenModel")[1]
        assert {key: each.value for key, each in options.items()} == {"name": "my-model", "context_length": 64}
        before = len(daemon.owners_gone)
    until(lambda: len(daemon.owners_gone) > before)  # which is what ends the model


def test_the_engine_says_how_to_get_authorised(daemon: Scripted, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF!")
    daemon.errors["OpenModel"] = (ERROR + "NotAuthorized", "no")
    with pytest.raises(NotAuthorized, match="no") as caught:
        InferenceEngine(model_path=tmp_path / "m.gguf")
    assert "in-process" in caught.value.hint


async def test_async_client(daemon: Scripted, tmp_path: Path) -> None:
    async with AsyncClient() as client:
        assert await client.present()
        assert (await client.status())["hostname"] == "box"
        assert [each.name for each in await client.models()] == ["assistant:1", "writer:2"]
        assert (await client.model("writer")).name == "writer:2"
        job = await client.load("writer")
        assert not (await job.status()).ended
        await job.cancel()
        with pytest.raises(Cancelled):
            await job.wait()
        await client.unload("assistant")
        assert len(await client.log(2)) == 2
        assert len(await client.self_test()) == 2
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        await (await client.import_model(tmp_path / "m.gguf", "m")).cancel()
        await client.remove("writer")
        with pytest.raises(NoSuchModel):
            await client.model("writer")


async def test_async_engine_hands_over(daemon: Scripted, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF!")
    async with AsyncInferenceEngine(model_path=tmp_path / "m.gguf") as engine:
        assert engine.backend == "daemon"
        assert engine.model == "m:t1"
    await asyncio.to_thread(until, lambda: len(daemon.owners_gone) > 0)


def test_ctrl_c_while_waiting_ends_the_wait(daemon: Scripted) -> None:
    program = (
        "from ai_assistant import Client\n"
        "with Client() as client:\n"
        "    job = client.load('writer')\n"
        "    print('waiting', flush=True)\n"
        "    try:\n"
        "        job.wait()\n"
        "    except KeyboardInterrupt:\n"
        "        job.cancel()\n"
        "        print('cancelled', flush=True)\n"
    )
    checkout = Path(__file__).resolve().parents[2]
    process: Any = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=checkout)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert out == "cancelled\n"
    assert process.returncode == 0
    assert "Cancel" in [name for name, _ in daemon.calls]
    assert daemon.jobs[f"{ROOT}/jobs/1"]["State"].value == "cancelled"
