"""The serving features in the booted image: downloads, the API on the network, who may pin, `top` on a terminal."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from image.container import Container
from tests.support import hub_server
from tests.support.hub_server import Hub

pytestmark = pytest.mark.appliance

MODEL = "/usr/lib/ai-assistant/models/assistant/1/model.gguf"
STATE = "/var/lib/ai-assistant"
SOURCE = "hf:o/n:Q8_0"
PORT = 8443
SOCKET_UNIT = "ai-assistant-api-tcp.socket"
CLONE_NEWNET = 0x40000000
CHAT = json.dumps(
    {"model": "assistant:1", "messages": [{"role": "user", "content": "how warm is it?"}], "max_tokens": 8}
)


def enter_network(namespace: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


@pytest.fixture
def hub(appliance: Container) -> Iterator[Hub]:
    """On the appliance's loopback: this thread opens the listening sockets there and comes back."""
    with Path("/proc/thread-self/ns/net").open("rb") as ours:
        enter_network(Path(f"/proc/{appliance.leader}/ns/net"))
        try:
            serving = hub_server.serving()
            made = serving.__enter__()
        finally:
            enter_network(Path(f"/proc/self/fd/{ours.fileno()}"))
    made.files["o/n"] = {"tiny-Q8_0.gguf": (appliance.root / MODEL.removeprefix("/")).read_bytes()}
    try:
        yield made
    finally:
        serving.__exit__(None, None, None)


@pytest.fixture
def plain(appliance: Container) -> Iterator[str]:
    """A user who may use models and nothing else."""
    appliance.run("useradd", "--groups", "ai-assistant", "plain")
    yield "plain"
    appliance.run("userdel", "plain")


def pull_command(hub: Hub, *more: str) -> list[str]:
    return ["ai-assistant", "--json", "model", "pull", SOURCE, "--endpoint", hub.url, *more]


def failure(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error that a command has printed."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])["error"]
    return found


def fetch_pid(appliance: Container) -> int:
    """Process of the download that runs, once bytes have come; inside its unit."""
    deadline = time.monotonic() + 60
    while True:
        listed = appliance.run("systemctl", "list-units", "--plain", "--no-legend", "ai-assistant-fetch@*").stdout
        parts = appliance.run("sh", "-c", f"find {STATE}/models/.pulls -name part-0 -size +0 || true").stdout
        if listed.strip() and parts.strip():
            unit = listed.split()[0]
            pid = int(appliance.run("systemctl", "show", "--property=MainPID", "--value", unit).stdout)
            if pid:
                return pid
        assert time.monotonic() < deadline, (listed, parts)
        time.sleep(0.05)


def test_a_pull_is_confined_killed_and_goes_on(appliance: Container, hub: Hub) -> None:
    content = hub.files["o/n"]["tiny-Q8_0.gguf"]
    hub.faults.append(hub_server.paced(200, 0.1))
    begun = subprocess.Popen(
        appliance.command(*pull_command(hub, "--name", "pulled:1")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        pid = fetch_pid(appliance)
        status = appliance.run("cat", f"/proc/{pid}/status").stdout
        for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert re.search(rf"^{kind}:\s+0+$", status, re.MULTILINE), status
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), status
        assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE), status
        daemon = appliance.run("id", "-u", "ai-assistant").stdout.strip()
        uid = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
        assert uid is not None
        assert uid[1] not in ("0", daemon), status
        for closed in (STATE, "/run/dbus", "/run/ai-assistant"):
            seen = appliance.run("nsenter", f"--target={pid}", "--mount", "stat", "--format=%a", closed).stdout
            assert seen.strip() == "0", closed
        appliance.run("kill", "-KILL", str(pid))
        out, err = begun.communicate(timeout=60)
    finally:
        begun.kill()
    error = failure(subprocess.CompletedProcess([], begun.returncode, out, err))
    assert error["name"] == "DownloadFailed"
    assert "goes on" in error["hint"]

    done = appliance.run(*pull_command(hub, "--name", "pulled:1")).stdout
    assert json.loads(done.strip().splitlines()[-1]) == {"phase": "done", "name": "pulled:1"}
    first, second = hub.bodies()
    assert "Range" not in first.headers
    assert int(second.headers["Range"].removeprefix("bytes=").rstrip("-")) > 0
    stored = appliance.run("sha256sum", f"{STATE}/models/pulled/1/model.gguf").stdout.split()[0]
    assert stored == hashlib.sha256(content).hexdigest()
    assert appliance.run("find", f"{STATE}/models/.pulls", "-name", "part-*").stdout == ""
    assert "pulled:1" in appliance.run("ai-assistant", "model", "list").stdout
    assert appliance.run("ai-assistant", "run", "pulled:1", "how warm is it?", user="developer").stdout.strip()
    appliance.run("ai-assistant", "model", "remove", "pulled:1", "--yes")


def test_a_wrong_hash_is_refused(appliance: Container, hub: Hub) -> None:
    hub.lies["tiny-Q8_0.gguf"] = "0" * 64
    error = failure(appliance.run(*pull_command(hub, "--name", "wrong:1"), check=False))
    assert error["name"] == "DownloadFailed"
    assert "hash" in error["message"]
    assert "wrong:1" not in appliance.run("ai-assistant", "model", "list").stdout


def test_a_full_disk_is_named_before_anything_comes(appliance: Container, hub: Hub) -> None:
    pid = appliance.run("systemctl", "show", "--property=MainPID", "--value", "ai-assistantd").stdout.strip()
    inside = ("nsenter", f"--target={pid}", "--mount")
    appliance.run(*inside, "mount", "-t", "tmpfs", "-o", "size=1M,mode=0700,uid=ai-assistant", "tmpfs", STATE)
    try:
        error = failure(appliance.run(*pull_command(hub, "--name", "full:1"), check=False))
    finally:
        appliance.run(*inside, "umount", STATE)
    assert error["name"] == "NoSpace"
    assert hub.bodies() == []


def test_nobody_but_administrators_pulls(appliance: Container, hub: Hub, plain: str) -> None:
    assert appliance.run(*pull_command(hub), user=plain, check=False).returncode == 3
    assert hub.seen == []


def listening(appliance: Container) -> str:
    return appliance.run("ss", "--listening", "--tcp", "--no-header", "--numeric").stdout


def request(appliance: Container, path: str, key: str = "", body: str = "") -> tuple[int, str, str]:
    """Status, headers and body of what comes over TLS, with the device's certificate as the only trust."""
    header = ("--header", f"Authorization: Bearer {key}") if key else ()
    data = ("--json", body) if body else ()
    url = f"https://localhost:{PORT}{path}"
    out = appliance.run(
        "curl", "--silent", "--show-error", "--include", "--cacert", "/tmp/box.pem", *header, *data, url
    ).stdout  # fmt: skip
    head, _, rest = out.replace("\r\n", "\n").partition("\n\n")
    return int(head.split()[1]), head.lower(), rest


def add_key(appliance: Container, name: str, *more: str) -> str:
    made = appliance.run("ai-assistant", "api", "key", "add", name, *more)
    assert re.fullmatch(r"aia_[\w-]{43}\n", made.stdout), made.stdout
    return made.stdout.strip()


def test_the_network_api_is_off(appliance: Container) -> None:
    assert f":{PORT}" not in listening(appliance)
    assert appliance.run("systemctl", "is-enabled", SOCKET_UNIT, check=False).stdout.strip() == "disabled"
    assert json.loads(appliance.run("ai-assistant", "api", "status", "--json").stdout)["enabled"] is False


@pytest.fixture(scope="module")
def network(appliance: Container) -> Iterator[Container]:
    """The API on the network, closed again afterwards."""
    appliance.run("ai-assistant", "api", "enable", "--yes")
    try:
        assert f":{PORT}" in listening(appliance)
        appliance.run("install", "-m", "644", f"{STATE}/tls/cert.pem", "/tmp/box.pem")
        yield appliance
    finally:
        appliance.run("ai-assistant", "api", "disable", "--yes")


def test_a_key_and_its_end(network: Container) -> None:
    for path in ("/v1/models", "/health", "/nowhere"):
        assert request(network, path)[0] == 401
    key = add_key(network, "laptop")
    status, _, answer = request(network, "/v1/chat/completions", key, CHAT)
    assert status == 200, answer
    assert json.loads(answer)["choices"][0]["message"]["content"]
    kept = json.loads(network.run("cat", f"{STATE}/api-keys.json").stdout)
    assert [each["digest"] for each in kept] == [hashlib.sha256(key.encode()).hexdigest()]
    assert network.run("stat", "--format=%a %U", f"{STATE}/api-keys.json").stdout.split() == ["600", "ai-assistant"]
    assert network.run("grep", "-rl", key, STATE, check=False).stdout == ""
    assert key not in network.run("journalctl", "--no-pager", "--output=export").stdout
    assert key not in network.run("ai-assistant", "api", "key", "list", "--json").stdout
    network.run("ai-assistant", "api", "key", "remove", "laptop", "--yes")
    assert request(network, "/v1/models", key)[0] == 401


def test_scopes_and_limits(network: Container) -> None:
    watcher = add_key(network, "watcher", "--scope", "read")
    assert request(network, "/v1/models", watcher)[0] == 200
    assert request(network, "/v1/chat/completions", watcher, CHAT)[0] == 403
    assert request(network, "/network/keys", watcher)[0] == 403
    limited = add_key(network, "limited", "--requests", "1")
    assert request(network, "/v1/models", limited)[0] == 200
    status, headers, answer = request(network, "/v1/models", limited)
    assert (status, json.loads(answer)["error"]["code"]) == (429, "Busy")
    wait = re.search(r"^retry-after: (\d+)$", headers, re.MULTILINE)
    assert wait, headers
    assert 1 <= int(wait[1]) <= 60, headers
    for name in ("watcher", "limited"):
        network.run("ai-assistant", "api", "key", "remove", name, "--yes")


def test_the_owners_certificate_comes_as_a_credential(network: Container) -> None:
    """The device's own pair stands for one that was brought, so that what trusts it stays right."""
    for kind in ("cert", "key"):
        network.run("install", "-m", "600", f"{STATE}/tls/{kind}.pem", f"/tmp/own.{kind}")
    own = ("--certificate", "/tmp/own.cert", "--private-key", "/tmp/own.key")
    try:
        network.run("ai-assistant", "api", "enable", "--yes", *own)
        found = json.loads(network.run("ai-assistant", "api", "status", "--json").stdout)
        assert (found["certificate"]["source"], found["problem"]) == ("the owner's", "")
        assert network.run("stat", "--format=%a %U", "/etc/credstore/ai-assistant.tls.key").stdout.split() == [
            "600",
            "root",
        ]
        assert network.run("cat", "/etc/credstore/ai-assistant.tls.key", user="ai-assistant", check=False).returncode
        assert request(network, "/health")[0] == 401
    finally:
        network.run("sh", "-c", "rm -f /etc/credstore/ai-assistant.tls.* /tmp/own.*")


def test_disable_closes_the_port(network: Container) -> None:
    network.run("ai-assistant", "api", "disable", "--yes")
    assert f":{PORT}" not in listening(network)
    refused = network.run("curl", "--silent", "--cacert", "/tmp/box.pem", f"https://localhost:{PORT}/", check=False)
    assert refused.returncode == 7  # curl: nobody listens
    assert network.run("systemctl", "is-enabled", SOCKET_UNIT, check=False).stdout.strip() == "disabled"
    network.run("ai-assistant", "ask", "how much memory is free?")


def call(appliance: Container, path: str, interface: str, method: str, user: str) -> subprocess.CompletedProcess[str]:
    return appliance.run(
        "busctl", "call", "--json=short", "--timeout=60", "org.ai_assistant1", path,
        f"org.ai_assistant1.{interface}", method, user=user, check=False,
    )  # fmt: skip


def test_statistics_on_the_bus(appliance: Container) -> None:
    appliance.run("ai-assistant", "ask", "how much memory is free?")
    found = call(appliance, "/org/ai_assistant1", "Manager", "GetStatistics", "nobody")
    assert found.returncode == 0, found.stderr
    models = json.loads(found.stdout)["data"][0]["models"]["data"]
    mine = next(each["data"] for each in models if each["data"]["name"]["data"] == "assistant:1")
    assert mine["state"]["data"] == "loaded"
    assert mine["completion_tokens"]["data"] > 0


def test_who_may_pin_and_drain(appliance: Container, plain: str) -> None:
    appliance.run("ai-assistant", "model", "load", "assistant:1")
    manager = ("org.ai_assistant1", "/org/ai_assistant1", "org.ai_assistant1.Manager")
    found = appliance.run("busctl", "--json=short", "call", *manager, "FindModel", "s", "assistant:1").stdout
    path = json.loads(found)["data"][0]
    try:
        for method in ("Pin", "Unpin", "Drain"):
            for user in ("nobody", plain):
                refused = call(appliance, path, "Model", method, user)
                assert (refused.returncode != 0, "not allowed: unload" in refused.stderr) == (True, True), refused
            allowed = call(appliance, path, "Model", method, "developer")
            assert allowed.returncode == 0, allowed
            if method != "Drain":
                seen = appliance.run("ai-assistant", "model", "show", "assistant:1", "--json").stdout
                assert json.loads(seen)["pinned"] is (method == "Pin")
    finally:
        appliance.run("ai-assistant", "model", "unpin", "assistant:1")
    appliance.run("ai-assistant", "ask", "how much memory is free?")


# Runs inside, where the terminal then is: the driver holds both ends, so that it can look at the settings afterwards.
TOP = r"""
import fcntl, json, os, pty, re, select, signal, struct, subprocess, sys, termios, time
master, slave = pty.openpty()
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
before = termios.tcgetattr(slave)
body = json.dumps({"model": "assistant:1", "prompt": "a", "max_tokens": 100, "ignore_eos": True})
asking = "while curl -s --unix-socket /run/ai-assistant/api.sock --json '%s' " \
    "http://localhost/v1/completions >/dev/null; do :; done"
load = subprocess.Popen(["sh", "-c", asking % body], start_new_session=True)
shown = b""
def terminal():
    # Whoever started this in the background has let the interrupt be ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
top = subprocess.Popen(["ai-assistant", "top", "--interval", "0.2"], stdin=slave, stdout=slave, stderr=slave,
                       preexec_fn=terminal, env={**os.environ, "TERM": "xterm-256color"})
def read(until, end):
    global shown
    while time.monotonic() < end:
        if select.select([master], [], [], 0.1)[0]:
            shown += os.read(master, 65536)
        plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode(errors="replace")
        if until(plain):
            return True
    return False
try:
    # model, state, memory, run, wait, read/s, write/s: something runs, and tokens come.
    row = re.compile(r"assistant:1 +loaded(?: \(pinned\))? +\S+ \S+ +[1-9]\d* +\d+ +\S+ +\d*[1-9]\d*\.\d|"
                     r"assistant:1 +loaded(?: \(pinned\))? +\S+ \S+ +[1-9]\d* +\d+ +\S+ +\d+\.[1-9]")
    seen = read(row.search, time.monotonic() + 60)
    os.write(master, {"q": b"q", "ctrl-c": b"\x03"}[sys.argv[1]])
    read(lambda _: top.poll() is not None, time.monotonic() + 20)
    read(lambda _: False, time.monotonic() + 0.3)
finally:
    os.killpg(load.pid, 15)
    load.wait()
    top.kill()
print(json.dumps({"seen": seen, "status": top.wait(), "restored": termios.tcgetattr(slave) == before,
                  "screen": shown.rfind(b"\x1b[?1049l") > shown.rfind(b"\x1b[?1049h"),
                  "cursor": shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l"),
                  "traceback": b"Traceback" in shown, "tail": shown[-1500:].decode(errors="replace")}))
"""


@pytest.mark.parametrize("leave", ["q", "ctrl-c"])
def test_top_on_a_terminal(appliance: Container, leave: str) -> None:
    found = json.loads(appliance.run("python3", "-c", TOP, leave, user="developer").stdout)
    tail = found.pop("tail")
    wanted = {"seen": True, "status": 0, "restored": True, "screen": True, "cursor": True, "traceback": False}
    assert found == wanted, tail
