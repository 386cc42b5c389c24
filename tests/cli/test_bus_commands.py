"""The commands that use the bus, against a scripted daemon on a private one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from dbus_fast import Variant

from tests.cli.conftest import CHECKOUT, PROGRAM, Cli, program
from tests.cli.test_talk import Terminal
from tests.sdk.bus_service import ERROR, ROOT, Broker, Scripted

pytestmark = pytest.mark.bus


def finish(daemon: Scripted, state: str = "done", **values: Variant) -> threading.Thread:
    """End the first job as soon as there is one."""

    def body() -> None:
        path = f"{ROOT}/jobs/1"
        deadline = time.monotonic() + 20
        while path not in daemon.jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        daemon.change(path, Progress=Variant("d", 0.5), Message=Variant("s", "half way"))
        time.sleep(0.4)
        daemon.change(path, State=Variant("s", state), Progress=Variant("d", 1.0), **values)

    thread = threading.Thread(target=body)
    thread.start()
    return thread


def test_status(cli: Cli, daemon: Scripted) -> None:
    result = cli("status")
    assert result.status == 0
    fields = dict(line.split("  ", 1) for line in result.out.splitlines())
    stripped = {key.strip(): value.strip() for key, value in fields.items()}
    assert stripped["state"] == "running"
    assert stripped["address"] == "192.0.2.7"
    assert stripped["models"] == "assistant:1 (loaded)"
    assert stripped["temperature"] == "45.2 °C"
    assert stripped["power"] == "no sensor"
    assert stripped["memory"] == "4.0 GiB free of 8.0 GiB"
    assert stripped["disk"] == "unknown"
    assert stripped["storage"] == "not encrypted: this machine has no TPM"
    assert stripped["up"] == "1 h 2 min"
    found = cli("status", "--json").json
    assert found["watts"] is None
    assert found["models"] == [{"name": "assistant:1", "state": "loaded"}]
    assert cli("--json", "status").json == found


def test_version_tells_both(cli: Cli, daemon: Scripted) -> None:
    assert cli("version", "--json").json["daemon"] == "0.0-test"


def test_banner_has_the_status(cli: Cli, daemon: Scripted) -> None:
    result = cli("banner")
    assert "AI Assistant OS 0.0-test" in result.out
    assert "192.0.2.7" in result.out
    assert "assistant:1 (loaded)" in result.out


def test_model_list_and_show(cli: Cli, daemon: Scripted) -> None:
    result = cli("model", "list")
    assert [line.split()[0] for line in result.out.splitlines()] == ["assistant:1", "writer:2"]
    assert "2.3 M" in result.out
    found = cli("model", "list", "--json").json
    assert [(each["name"], each["builtin"], each["size_bytes"]) for each in found] == [
        ("assistant:1", True, 4_000_000),
        ("writer:2", False, 4_000_000),
    ]
    assert "2048 tokens" in cli("model", "show", "assistant").out
    assert cli("model", "show", "assistant", "--json").json == found[0]
    missing = cli("model", "show", "nobody", "--json")
    assert (missing.status, missing.error["name"]) == (1, "NoSuchModel")


def test_import(cli: Cli, daemon: Scripted, tmp_path: Path) -> None:
    file = tmp_path / "My Model Q4.gguf"
    file.write_bytes(b"GGUF")
    ending = finish(daemon, Result=Variant("a{sv}", {"name": Variant("s", "my-model-q4:1")}))
    result = cli("model", "import", str(file))
    ending.join()
    assert (result.status, result.err) == (0, "")
    assert result.out == "imported my-model-q4:1; try it with: ai-assistant run my-model-q4:1\n"
    sent = next(body for name, body in daemon.calls if name == "ImportModel")
    assert sent[1] == "my-model-q4"
    assert daemon.files == [b"GGUF"]


def test_an_import_that_fails(cli: Cli, daemon: Scripted, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    error = Variant("(ss)", [ERROR + "NoSpace", "the disk is full (hint: remove models)"])
    ending = finish(daemon, "failed", Error=error)
    result = cli("model", "import", str(tmp_path / "m.gguf"), "--name", "x:3", "--json")
    ending.join()
    assert result.status == 1
    assert result.error == {"name": "NoSpace", "message": "the disk is full", "hint": "remove models"}


def test_an_import_of_nothing(cli: Cli, daemon: Scripted, tmp_path: Path) -> None:
    result = cli("model", "import", str(tmp_path / "none.gguf"), "--json")
    assert (result.status, result.error["name"]) == (1, "NoSuchModel")


def test_load_and_unload(cli: Cli, daemon: Scripted) -> None:
    ending = finish(daemon)
    result = cli("model", "load", "writer")
    ending.join()
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("writer:2 is ")
    assert cli("model", "unload", "assistant").out == "assistant:1 is unloaded\n"


def test_pin_and_drain(cli: Cli, daemon: Scripted) -> None:
    assert cli("model", "pin", "assistant").out == "assistant:1 is pinned\n"
    assert "(pinned)" in cli("model", "list").out
    assert cli("model", "unpin", "assistant", "--json").json["pinned"] is False
    ending = finish(daemon)
    result = cli("model", "drain", "assistant")
    ending.join()
    assert (result.status, result.out) == (0, "assistant:1 is unloaded\n")
    assert cli("model", "pin", "nobody").status == 1


def test_estimate(cli: Cli, daemon: Scripted) -> None:
    assert cli("model", "estimate", "assistant", "--context", "4096", "--json").json["kv_bytes"] == 4_096_000
    assert "total" in cli("model", "estimate", "assistant").out
    assert cli("model", "estimate", "assistant", "--context", "-1").status == 2


def test_remove_asks_and_without_a_terminal_refuses(cli: Cli, daemon: Scripted) -> None:
    refused = cli("model", "remove", "writer")
    assert refused.status == 2
    assert "--yes" in refused.err
    assert "Remove" not in [name for name, _ in daemon.calls]
    assert cli("model", "remove", "writer", "--yes", "--json").json == {"name": "writer:2", "removed": True}
    assert "Remove" in [name for name, _ in daemon.calls]


@pytest.mark.parametrize("answer", ["y", "n"])
def test_remove_on_a_terminal(daemon: Scripted, answer: str) -> None:
    terminal = Terminal("model", "remove", "writer")
    terminal.until(r"Delete writer:2 \(3.8 MiB\) from this appliance\?.*:")
    terminal.type(answer + "\n")
    if answer == "y":
        terminal.until("removed writer:2")
    assert terminal.end() == (0 if answer == "y" else 1)
    assert ("Remove" in [name for name, _ in daemon.calls]) is (answer == "y")


def test_progress_is_for_terminals(daemon: Scripted) -> None:
    ending = finish(daemon)
    terminal = Terminal("model", "load", "writer")
    text = terminal.until("writer:2 is ")
    ending.join()
    assert "half way" in text
    assert "50 %" in text
    assert terminal.end() == 0


def test_ctrl_c_cancels_the_job(daemon: Scripted) -> None:
    with subprocess.Popen([*PROGRAM, "model", "load", "writer"], stderr=subprocess.PIPE, cwd=CHECKOUT) as process:
        deadline = time.monotonic() + 20
        while not daemon.jobs:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == b""
    assert daemon.jobs[f"{ROOT}/jobs/1"]["State"].value == "cancelled"


@pytest.mark.parametrize(("name", "status"), [("NotAuthorized", 3), ("Busy", 1), ("NotSupported", 1)])
def test_bus_errors_have_their_exit_status(cli: Cli, daemon: Scripted, name: str, status: int) -> None:
    daemon.errors["Unload"] = (ERROR + name, "no (hint: do this)")
    result = cli("model", "unload", "writer", "--json")
    assert result.status == status
    assert result.error == {"name": name, "message": "no", "hint": "do this"}


def test_a_bus_without_the_daemon_is_4(cli: Cli, private_bus: Broker) -> None:
    result = cli("status")
    assert result.status == 4
    assert "systemctl start ai-assistantd" in result.err


def test_doctor(cli: Cli, daemon: Scripted) -> None:
    result = cli("doctor", "--json")
    found = {each["name"]: each for each in result.json}
    names = "bus api polkit groups disk storage memory devices units configuration engine"
    assert list(found) == names.split()
    assert found["bus"]["state"] == "ok"
    assert found["api"]["state"] == "failed"
    assert found["api"]["hint"]
    assert (found["polkit"]["state"], found["polkit"]["detail"]) == ("failed", "polkit does not answer on the bus")
    assert found["storage"]["state"] == "warning"
    assert "no TPM" in found["storage"]["detail"]
    assert found["memory"]["state"] in ("ok", "failed")
    assert result.status == 1
    text = cli("doctor")
    assert text.status == 1
    assert "✓ bus: the daemon (0.0-test) is running" in text.out
    assert "✗ api: " in text.out
    assert "    hint: " in text.out


def test_model_names_are_completed(daemon: Scripted) -> None:
    """Through the API socket; without one there is nothing to offer, and no error either."""
    environment = {"_AI_ASSISTANT_COMPLETE": "complete_bash", "COMP_WORDS": "ai-assistant run a", "COMP_CWORD": "2"}
    done = subprocess.run(PROGRAM, capture_output=True, text=True, cwd=CHECKOUT, env={**os.environ, **environment})
    assert done.stderr == ""
    assert done.stdout.strip() == ""


def test_json_comes_alone(daemon: Scripted) -> None:
    result = program("model", "list", "--json")
    assert json.loads(result.out)
    assert result.err == ""
