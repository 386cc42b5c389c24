"""SDK and command line against the real daemon: private bus, real polkit, real workers, the built-in model."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ai_assistant import (
    AsyncInferenceEngine,
    Client,
    InferenceEngine,
    InvalidModel,
    NoSuchModel,
    ServiceUnavailable,
    WorkerCrashed,
)
from tests.bus import world as worlds
from tests.bus.world import CHECKOUT, USERS, World
from tests.cli.conftest import Result
from tests.cli.test_talk import Terminal
from tests.support import gguf_writer
from tests.support.recovery import ENCRYPTED, KEY, describe, key_waits

pytestmark = [pytest.mark.bus, pytest.mark.engine]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    assert not worlds.missing(), worlds.missing()
    engine = next(each for each in os.environ["PYTHONPATH"].split(":") if each and (Path(each) / "llama_cpp").is_dir())
    with worlds.temporary_directory() as directory:
        made = World(directory)
        made.prepare()
        made.add_builtin("assistant", "1", CHECKOUT / "models" / "assistant-1.gguf")
        try:
            made.start_bus()
            made.start_polkit()
            made.start_workers(engine)
            made.start_daemon()
            yield made
            print(made.log)
        finally:
            made.stop()


@pytest.fixture(scope="module")
def tiny(world: World) -> Path:
    """A model of random weights that all the world's users may read."""
    path = gguf_writer.write_llama(world.directory / "tiny.gguf", context=2048)
    path.chmod(0o644)
    return path


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world as this process, which is root, sees it."""
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", world.address)
    monkeypatch.setenv("AI_ASSISTANT_SOCKET", str(world.api))
    return world


def cli(world: World, *args: str, user: str = "admin", stdin: str = "") -> Result:
    """The command line as one of the world's users."""
    command = world.inside([sys.executable, "-m", "ai_assistant", *args], user=USERS.get(user, 0))
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{CHECKOUT}:{os.environ['PYTHONPATH']}",
        "DBUS_SYSTEM_BUS_ADDRESS": world.address,
        "AI_ASSISTANT_SOCKET": str(world.api),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, cwd="/", timeout=120)
    assert "Traceback" not in done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_status_for_everybody(world: World) -> None:
    for user in ("outsider", "member", "admin", "root"):
        found = cli(world, "status", "--json", user=user).json
        assert found["state"] == "running"
        assert found["models"][0]["name"] == "assistant:1"
        assert found["memory_total_bytes"] > 0
    assert "assistant:1" in cli(world, "status", user="outsider").out


def test_devices_for_everybody_and_measured_by_members(world: World) -> None:
    until(lambda: cli(world, "devices", "--kind", "cpu", "--json", user="outsider").json, 60)
    (processor,) = cli(world, "devices", "--kind", "cpu", "--json", user="outsider").json
    assert processor["attributes"]["threads"] == os.cpu_count()
    assert cli(world, "devices", "--measure", user="outsider").status == 3
    (memory,) = cli(world, "devices", "--measure", "--kind", "memory", "--json", user="member").json
    (speed,) = memory["throughput"]
    assert (speed["unit"], speed["source"]) == ("GB/s", "measured")
    assert speed["value"] > 0.1


def test_ask_in_english_and_chinese(world: World) -> None:
    warm = cli(world, "ask", "how warm is it?", "--json", user="member")
    assert warm.status == 0, warm.err
    assert warm.json["action"] == "temperature"
    assert warm.json["answer"]
    free = cli(world, "ask", "磁盘还有多少空间", "--json", user="member")
    assert free.status == 0, free.err
    assert free.json["action"] == "disk"
    assert "磁盘" in free.json["answer"]


def test_ask_tells_what_it_can_do(world: World) -> None:
    told = cli(world, "ask", "help", user="member")
    assert told.status == 0, told.err
    assert len(told.out) > 200


def test_asking_on_a_terminal_goes_on_after_a_refusal(here: World) -> None:
    terminal = Terminal("ask")
    terminal.until("> ")
    terminal.type("how warm is it?\n")
    terminal.until(r"temperature(.|\r\n)*> |°C(.|\r\n)*> ")
    terminal.type("what is the capital of France?\n")
    terminal.until(r"error:(.|\r\n)*> ")
    terminal.type("restart the machine\n")
    terminal.until(r"\[y/N\]:")
    terminal.type("n\n")
    terminal.until(r"not done(.|\r\n)*> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ask_does_not_change_anything_unasked(world: World) -> None:
    dry = cli(world, "ask", "please restart the machine", "--dry-run", "--json")
    assert dry.status == 0, dry.err
    assert dry.json["changes"] is True
    refused = cli(world, "ask", "please restart the machine")
    assert refused.status == 2
    assert "--yes" in refused.err


def test_ask_is_refused_to_outsiders_and_for_nonsense(world: World) -> None:
    assert cli(world, "ask", "how warm is it?", user="outsider").status == 3
    nonsense = cli(world, "ask", "what is the capital of France?", "--json")
    assert nonsense.status == 1
    assert nonsense.error["name"] == "Unsure"


def test_import_run_show_unload_remove(world: World, tiny: Path) -> None:
    denied = cli(world, "model", "import", str(tiny), user="outsider")
    assert denied.status == 3
    given = cli(world, "model", "import", str(tiny), "--name", "tiny:7", "--json", user="admin")
    assert given.json == {"name": "tiny:7"}, given.err
    *_, end = cli(world, "run", "tiny", "hello", "-m", "8", "-t", "0", "--json", user="member").lines
    assert end["event"] == "end"
    assert 1 <= end["usage"]["completion_tokens"] <= 8
    raw = cli(world, "run", "tiny:7", "--raw", "once upon", "-m", "4", "--seed", "1", user="member")
    assert raw.status == 0, raw.err
    assert cli(world, "model", "show", "tiny", "--json").json["state"] == "loaded"
    assert cli(world, "model", "unload", "tiny").out == "tiny:7 is unloaded\n"
    assert cli(world, "model", "load", "tiny", user="member").out == "tiny:7 is loaded\n"
    names = [each["name"] for each in cli(world, "model", "list", "--json").json]
    assert names == ["assistant:1", "tiny:7"]
    assert cli(world, "chat", "--json", "-m", "4", stdin="hello\n").lines[-1]["model"] == "tiny:7"
    assert cli(world, "model", "remove", "tiny", "--yes", user="member").status == 3
    assert cli(world, "model", "remove", "tiny", "--yes").status == 0
    assert cli(world, "run", "tiny", "hello").status == 1


def test_run_a_file_without_importing_it(world: World, tiny: Path) -> None:
    *_, end = cli(world, "run", str(tiny), "hello", "-m", "4", "--json", user="member").lines
    assert end["model"].startswith("tiny")
    names = [each["name"] for each in cli(world, "model", "list", "--json").json]
    assert names == ["assistant:1"]
    assert cli(world, "run", str(tiny), "hello", user="outsider").status == 3


def test_a_file_that_is_no_model(world: World) -> None:
    file = world.directory / "bad.gguf"
    file.write_text("GGUF and nothing that makes sense")
    file.chmod(0o644)
    for command in (("model", "import", str(file)), ("run", str(file), "x")):
        result = cli(world, *command, "--json")
        assert (result.status, result.error["name"]) == (1, "InvalidModel")


def test_doctor_finds_bus_api_and_polkit_in_order(world: World) -> None:
    found = {each["name"]: each for each in cli(world, "doctor", "--json", user="member").json}
    for name in ("bus", "api", "polkit", "groups", "configuration"):
        assert found[name]["state"] == "ok", found[name]
    # The compiled engine lies where only root may look.
    engine = next(each for each in cli(world, "doctor", "--json", user="root").json if each["name"] == "engine")
    assert engine["state"] == "ok", engine
    outsider = {each["name"]: each for each in cli(world, "doctor", "--json", user="outsider").json}
    assert outsider["groups"]["state"] == "failed"


def test_the_recovery_key_is_for_administrators(world: World) -> None:
    root = world.directory / "root"
    describe(root, ENCRYPTED)
    key_waits(root)
    world.start_vault("--refresh", "true")
    for user in ("outsider", "member"):
        assert cli(world, "storage", user=user).status == 0
        for command in (("recovery-key",), ("acknowledge", "--yes"), ("reseal",)):
            refused = cli(world, "storage", *command, "--json", user=user)
            assert (refused.status, refused.error["name"]) == (3, "NotAuthorized")
        assert "waits to be written down" in cli(world, "status", user=user).out
    assert cli(world, "storage", "recovery-key").out == KEY + "\n"
    assert cli(world, "storage", "acknowledge", "--yes").status == 0
    assert cli(world, "status", "--json", user="outsider").json["recovery_key_pending"] is False
    assert "encrypted, opened by the TPM" in cli(world, "status", user="outsider").out


def test_the_transient_model_dies_with_the_engine(here: World, tiny: Path) -> None:
    with Client() as client:
        with InferenceEngine(model_path=tiny, context_length=256) as engine:
            assert engine.backend == "daemon"
            assert engine.chat("hello", max_tokens=4).usage.completion_tokens >= 1
            assert engine.generate("once", max_tokens=4, temperature=0) == engine.generate(
                "once", max_tokens=4, temperature=0
            )
            assert [each.transient for each in client.models()].count(True) == 1
        until(lambda: not any(each.transient for each in client.models()))
        engine = InferenceEngine(model_path=tiny)
        engine.chat("x", max_tokens=1)
        del engine
        gc.collect()
        until(lambda: not any(each.transient for each in client.models()))
        until(lambda: len(here.worker_pids()) <= 1)


def test_a_program_that_is_killed_leaves_no_model(here: World, tiny: Path) -> None:
    program = (
        "import sys, time; from ai_assistant import InferenceEngine;"
        f"engine = InferenceEngine(model_path={str(tiny)!r}); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        with Client() as client:
            assert any(each.transient for each in client.models())
            process.kill()
            until(lambda: not any(each.transient for each in client.models()))


def test_a_closed_stream_frees_its_slot(here: World, tiny: Path) -> None:
    with InferenceEngine(model_path=tiny) as engine:
        for _ in range(12):
            with engine.stream([{"role": "user", "content": "hello"}], max_tokens=2000, temperature=1.0) as stream:
                next(stream)
        assert engine.chat("still there", max_tokens=2).usage.completion_tokens >= 1


def test_a_killed_worker_is_a_named_error_and_the_next_request_works(here: World, tiny: Path) -> None:
    with InferenceEngine(model_path=tiny) as engine:
        before = set(here.worker_pids())
        stream = engine.stream("once upon a time", max_tokens=2000)
        next(stream)
        mine = set(here.worker_pids()) - before or set(here.worker_pids())
        for pid in mine:
            os.kill(pid, 9)
        with pytest.raises(WorkerCrashed):
            list(stream)

        def answers() -> bool:
            try:
                return engine.chat("again", max_tokens=2).usage.completion_tokens >= 1
            except (WorkerCrashed, ServiceUnavailable):
                return False

        until(answers)


def test_bad_files_and_names(here: World, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(InvalidModel):
        InferenceEngine(model_path=tmp_path / "bad.gguf")
    with pytest.raises(NoSuchModel):
        InferenceEngine("nobody")


async def test_async_engine(here: World, tiny: Path) -> None:
    async with AsyncInferenceEngine(model_path=tiny) as engine:
        assert engine.backend == "daemon"
        answers = await asyncio.gather(*(engine.chat(f"hello {i}", max_tokens=4) for i in range(6)))
        assert all(each.usage.completion_tokens >= 1 for each in answers)
        stream = await engine.stream("once", max_tokens=4)
        assert "".join([text async for text in stream]) == stream.text


def test_json_schema_from_the_command_line(world: World, tiny: Path) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    (world.directory / "schema.json").write_text(json.dumps(schema))
    result = cli(world, "run", str(tiny), "--schema", str(world.directory / "schema.json"), "yes or no?")
    assert result.status == 0, result.err
    assert isinstance(json.loads(result.out)["ok"], bool)


def test_a_restart_of_the_daemon_is_noticed_and_survived(here: World) -> None:
    """Last, since it ends what the others stand on."""
    with Client() as client:
        assert client.status()["state"] == "running"
        here.stop_daemon()
        with pytest.raises(ServiceUnavailable) as caught:
            client.status()
        assert caught.value.hint
        result = cli(here, "status")
        assert result.status == 4
        here.start_daemon()
        assert client.status()["state"] == "running"
        assert [each.name for each in client.models()] == ["assistant:1"]
