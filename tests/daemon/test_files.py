"""What the image copies as it is, and what is generated, fits the code."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon import bus, inspection
from ai_assistant.daemon.authority import ADMIN_GROUP, USER_GROUP, USER_SCOPES, allowed
from ai_assistant.daemon.bus import device, inference, job, manager, model
from ai_assistant.daemon.contract import Peer, Scope
from ai_assistant.services import schema

CHECKOUT = Path(__file__).resolve().parents[2]
DATA = CHECKOUT / "daemon" / "data"


def test_reference_is_generated_from_the_xml() -> None:
    done = subprocess.run(
        [sys.executable, CHECKOUT / "docs/generate_dbus.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", bus.NAMES)
def test_every_member_is_documented_and_answered(name: str) -> None:
    interface = bus.load(name)
    handlers: dict[str, type[Any]] = {
        "Manager": manager.Manager,
        "Inference": inference.Inference,
        "Model": model.ModelObject,
        "Job": job.JobObject,
        "Device": device.DeviceObject,
    }
    schema.check(interface, object.__new__(handlers[name]))
    assert interface.text
    assert all(each.text for each in interface.methods.values())
    assert all(each.text for each in interface.properties.values())
    again = schema.parse(f"<node>{interface.xml()}</node>")
    assert again.methods.keys() == interface.methods.keys()
    assert again.properties.keys() == interface.properties.keys()


def test_a_handler_that_does_not_fit_is_refused() -> None:
    class Wrong:
        async def cancel(self) -> None: ...

    with pytest.raises(TypeError, match="takes 0 arguments"):
        schema.check(bus.load("Job"), Wrong())
    with pytest.raises(TypeError, match="has no coroutine"):
        schema.check(bus.load("Job"), object())


def test_polkit_knows_every_scope() -> None:
    policy = ElementTree.parse(DATA / "usr/share/polkit-1/actions/org.ai-assistant1.policy")
    actions = {each.get("id", "").rpartition(".")[2]: each for each in policy.findall("action")}
    assert actions.keys() == {str(scope) for scope in Scope} - {"read"}
    for each in actions.values():
        assert each.findtext("defaults/allow_any") == "no"
        # Without this polkit refuses to tell the daemon anything about other users.
        assert each.findtext("annotate") == "unix-user:ai-assistant"
    rules = (DATA / "usr/share/polkit-1/rules.d/50-ai-assistant.rules").read_text()
    listed = set(re.findall(r'"org\.ai-assistant1\.(\w+)"', rules))
    assert listed == {str(scope) for scope in USER_SCOPES} - {"read"}
    assert f'isInGroup("{USER_GROUP}")' in rules
    assert f'isInGroup("{ADMIN_GROUP}")' in rules


def test_groups_on_the_socket() -> None:
    numbers = {USER_GROUP: 100, ADMIN_GROUP: 200}

    def may(groups: set[int], scope: Scope, uid: int = 1000, gid: int = 1000) -> bool:
        return allowed(Peer(uid, gid, frozenset(groups)), scope, group_id=numbers.get)

    for scope in Scope:
        assert may({100}, scope) == (scope in (Scope.READ, Scope.INFER, Scope.LOAD))
        assert may({200}, scope)
        assert may(set(), scope, uid=0)
        assert may(set(), scope) == (scope is Scope.READ)
        assert may(set(), scope, gid=200)
        assert allowed(Peer(1, 1, frozenset({100})), scope, group_id=lambda name: None) == (scope is Scope.READ)


def units() -> dict[str, str]:
    return {path.name: path.read_text() for path in (DATA / "usr/lib/systemd/system").glob("*.*") if path.is_file()}


def test_units_name_the_same_sockets() -> None:
    found = units()
    assert "ListenStream=/run/ai-assistant/api.sock" in found["ai-assistant-api.socket"]
    assert "FileDescriptorName=api" in found["ai-assistant-api.socket"]
    assert "Accept=yes" in found["ai-assistant-worker.socket"]
    assert "SocketMode=0600" in found["ai-assistant-worker.socket"]
    for name in ("ai-assistantd.service", "ai-assistant-worker@.service"):
        assert "Environment=PYTHONPATH=/usr/lib/ai-assistant/python" in found[name]


def test_workers_are_kept_from_each_other() -> None:
    worker = units()["ai-assistant-worker@.service"].splitlines()
    assert {"User=aiw-%i", "PrivateUsers=yes", "DynamicUser=yes"} <= set(worker)
    denied = {call for line in worker if line.startswith("SystemCallFilter=~") for call in line[18:].split()}
    assert {"ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"} <= denied


def test_a_worker_with_a_gpu_is_as_every_other_and_has_render_nodes() -> None:
    system = DATA / "usr/lib/systemd/system"
    folder = system / "ai-assistant-gpu-worker@.service.d"
    assert sorted(each.name for each in folder.iterdir()) == ["10-worker.conf", "50-gpu.conf"]
    assert (folder / "10-worker.conf").resolve() == (system / "ai-assistant-worker@.service").resolve()
    lines = (folder / "50-gpu.conf").read_text().splitlines()
    said = [line for line in lines if line and line[0] not in "#["]
    nodes = [line.removeprefix("DeviceAllow=") for line in said if line.startswith("DeviceAllow=")]
    assert nodes
    assert all(re.fullmatch(r"/dev/dri/renderD1(2[89]|3[01]) rw", each) for each in nodes)
    assert {line.partition("=")[0] for line in said} == {
        "Description", "SupplementaryGroups", "BindPaths", "DeviceAllow", "Environment"
    }  # fmt: skip
    assert "SupplementaryGroups=render" in said
    # Nothing is in the unit itself, which would be read before what it shares with the others.
    own = units()["ai-assistant-gpu-worker@.service"].splitlines()
    assert [line for line in own if line and line[0] != "#"] == ["[Unit]", "Description=AI Assistant worker with a GPU"]
    sockets = [units()[f"ai-assistant-{name}.socket"].splitlines() for name in ("worker", "gpu-worker")]
    differ = {line.partition("=")[0] for line in set(sockets[0]) ^ set(sockets[1])}
    assert differ == {"Description", "ListenStream"}


def test_the_daemon_always_comes_back() -> None:
    daemon = set(units()["ai-assistantd.service"].splitlines())
    wanted = {"Restart=on-failure", "StartLimitIntervalSec=0", "RestartSteps=6", "RestartMaxDelaySec=60"}
    assert wanted | {"OOMPolicy=continue"} <= daemon
    # A child that reads a header, the only kind there is, fits in beside the daemon.
    limit = next(line for line in daemon if line.startswith("MemoryMax="))
    assert limit == "MemoryMax=1G"
    assert inspection._MEMORY_BYTES * inspection._AT_A_TIME <= 512 << 20


def test_what_is_imported_is_private() -> None:
    assert {"StateDirectoryMode=0700", "UMask=0077"} <= set(units()["ai-assistantd.service"].splitlines())
    rules = (DATA / "usr/lib/tmpfiles.d/ai-assistant.conf").read_text().splitlines()
    assert all(line.split()[2] == "0700" for line in rules if "/var/lib/" in line)


def test_the_daemon_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import ai_assistant.daemon.app, ai_assistant.daemon.api.server, ai_assistant.daemon.api.openai\n"
        "heavy = {'numpy', 'jinja2', 'typer', 'rich', 'httpx', 'pydantic', 'llama_cpp', 'onnxruntime', 'openai'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


_LATER = {
    "ai_assistant.daemon.app": {
        "ai_assistant.hal.detect",
        "email",
        "http.client",
        "importlib.resources",
        "pyudev",
        "starlette",
        "urllib.request",
        "uvicorn",
    },
    "ai_assistant.provisioning.storage": {"configparser", "hashlib", "secrets", "ssl"},
}


@pytest.mark.parametrize("module", _LATER)
def test_what_every_boot_waits_for_leaves_the_rest_for_later(module: str) -> None:
    script = f"import sys, {module}\nprint(sorted({_LATER[module]!r} & set(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
