"""Hostile files, clients and users: a named error each, the daemon stays up, and the next request works."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from image.container import Container

pytestmark = pytest.mark.appliance

MODEL = "/usr/lib/ai-assistant/models/assistant/1/model.gguf"
BAD_FILES = {
    "empty": "true >{file}",
    "truncated": f"head -c 3000 {MODEL} >{{file}}",
    "without-its-end": f"head -c 300000 {MODEL} >{{file}}",
    "wrong-magic": f"(printf XXXX; tail -c +5 {MODEL}) >{{file}}",
    "absurd-counts": (
        f"(head -c 8 {MODEL}; printf '\\377\\377\\377\\377\\377\\377\\377\\177%.0s' 1 2; tail -c +25 {MODEL}) >{{file}}"
    ),
    "wrong-architecture": f"sed 's/llama/lamma/g' {MODEL} >{{file}}",
    "sparse-100-gb": "truncate -s 100G {file}",
    "text": "echo 'this is no model' >{file}",
}


def daemon(appliance: Container) -> tuple[int, int, int]:
    """Process id, open descriptors, resident bytes."""
    pid = int(appliance.run("systemctl", "show", "--property=MainPID", "--value", "ai-assistantd").stdout)
    descriptors = len(appliance.run("ls", f"/proc/{pid}/fd").stdout.split())
    resident = int(appliance.run("awk", "/^VmRSS:/ {print $2}", f"/proc/{pid}/status").stdout) * 1024
    return pid, descriptors, resident


@pytest.fixture(autouse=True)
def _the_daemon_survives(appliance: Container) -> Iterator[None]:
    appliance.run("ai-assistant", "ask", "how much memory is free?")
    pid, descriptors, resident = daemon(appliance)
    yield
    appliance.run("ai-assistant", "ask", "how much memory is free?")
    after = daemon(appliance)
    assert after[0] == pid, "the daemon was restarted"
    assert after[1] <= descriptors + 4
    assert after[2] <= resident + 16 * 2**20


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_model_is_refused_by_name(appliance: Container, kind: str) -> None:
    appliance.run("bash", "-c", BAD_FILES[kind].format(file="/tmp/bad.gguf"))
    refused = appliance.run(
        "ai-assistant", "--json", "model", "import", "/tmp/bad.gguf", "--name", "bad:1", check=False, timeout_s=60
    )
    assert refused.returncode == 1, refused
    assert json.loads(refused.stderr)["error"]["name"] in ("InvalidModel", "NoSpace"), refused.stderr
    assert "bad:1" not in appliance.run("ai-assistant", "model", "list").stdout


def test_an_unreadable_file(appliance: Container) -> None:
    appliance.run("install", "-m", "000", MODEL, "/tmp/secret.gguf")
    refused = appliance.run("ai-assistant", "model", "import", "/tmp/secret.gguf", user="developer", check=False)
    assert refused.returncode == 2  # a wrong argument
    assert "not readable" in refused.stderr


def test_a_good_model_is_imported_used_and_removed(appliance: Container) -> None:
    appliance.run("ai-assistant", "model", "import", MODEL, "--name", "copy:1")
    again = appliance.run("ai-assistant", "model", "import", MODEL, "--name", "copy:1")
    assert "Traceback" not in again.stderr
    assert appliance.run("ai-assistant", "run", "copy:1", "how warm is it?").stdout.strip()
    appliance.run("ai-assistant", "model", "remove", "copy:1", "--yes")
    assert "copy:1" not in appliance.run("ai-assistant", "model", "list").stdout


def test_who_may_do_what(appliance: Container) -> None:
    appliance.run("ai-assistant", "status", user="nobody")
    for refused in (
        appliance.run("ai-assistant", "run", "assistant:1", "hi", user="nobody", check=False),
        appliance.run("ai-assistant", "model", "remove", "assistant:1", "--yes", user="nobody", check=False),
    ):
        assert refused.returncode == 3, refused
        assert "Traceback" not in refused.stderr


KILL_IN_MID_REQUEST = """
import json, os, signal, socket, subprocess, time
body = json.dumps({"model": "assistant:1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}).encode()
# A regular expression that does not match itself, since it stands in this process's own arguments.
workers = subprocess.run(["pgrep", "-f", "[d]aemon.worker"], capture_output=True, text=True, check=True).stdout.split()
for worker in workers:
    os.kill(int(worker), signal.SIGSTOP)  # stopped, it cannot finish before it is killed
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(30)
    client.connect("/run/ai-assistant/api.sock")
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
                   b"Connection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    time.sleep(0.5)
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    answer = b""
    while piece := client.recv(65536):
        answer += piece
print(answer.decode())
"""


def test_a_killed_worker_is_a_named_error_and_then_works_again(appliance: Container) -> None:
    answer = appliance.run("python3", "-c", KILL_IN_MID_REQUEST).stdout
    assert "WorkerCrashed" in answer, answer


def test_a_client_that_vanishes_frees_its_slot(appliance: Container) -> None:
    body = json.dumps({"model": "assistant:1", "prompt": "a", "max_tokens": 400, "temperature": 1.5, "stream": True})
    for _ in range(8):
        appliance.run(
            "timeout",
            "0.2",
            "curl",
            "-sN",
            "--unix-socket",
            "/run/ai-assistant/api.sock",
            "--json",
            body,
            "http://localhost/v1/completions",
            check=False,
        )
    status = json.loads(appliance.run("ai-assistant", "status", "--json").stdout)
    assert status["running"] == 0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", "InvalidArgument"),
        ('{"model": "assistant:1"}', "InvalidArgument"),
        ('{"model": "assistant:1", "messages": "hi"}', "InvalidArgument"),
        ('{"model": "assistant:1", "messages": [{"role": "user", "content": "hi"}], "wings": 2}', "InvalidArgument"),
        ('{"model": "nobody:1", "messages": [{"role": "user", "content": "hi"}]}', "NoSuchModel"),
        (
            '{"model": "assistant:1", "messages": [{"role": "user", "content": "' + "hi " * 20000 + '"}]}',
            "ContextOverflow",
        ),
        ("[" * 20000, "InvalidArgument"),
    ],
    ids=["invalid", "incomplete", "wrong-type", "unknown-parameter", "unknown-model", "overflow", "deep"],
)
def test_bad_bodies(appliance: Container, body: str, code: str) -> None:
    answer = appliance.run(
        "curl",
        "--silent",
        "--unix-socket",
        "/run/ai-assistant/api.sock",
        "--json",
        "@-",
        "http://localhost/v1/chat/completions",
        stdin=body,
    ).stdout
    assert json.loads(answer)["error"]["code"] == code, answer


def test_a_huge_body(appliance: Container) -> None:
    answer = appliance.run(
        "sh",
        "-c",
        "head -c 100M /dev/zero | curl --silent --unix-socket /run/ai-assistant/api.sock --data-binary @- "
        "-H 'Content-Type: application/json' http://localhost/v1/chat/completions",
        check=False,
    ).stdout
    assert not answer or json.loads(answer)["error"]["code"] == "InvalidArgument"


def test_a_full_disk(appliance: Container) -> None:
    appliance.run("mount", "-t", "tmpfs", "-o", "size=1M,mode=0755,uid=ai-assistant", "tmpfs", "/var/lib/ai-assistant")
    try:
        # The daemon has the old folder open by its path alone, so it sees the small one.
        pid = appliance.run("systemctl", "show", "--property=MainPID", "--value", "ai-assistantd").stdout.strip()
        appliance.run(
            "nsenter",
            f"--target={pid}",
            "--mount",
            "mount",
            "-t",
            "tmpfs",
            "-o",
            "size=1M,mode=0755,uid=ai-assistant",
            "tmpfs",
            "/var/lib/ai-assistant",
        )
        refused = appliance.run("ai-assistant", "--json", "model", "import", MODEL, "--name", "full:1", check=False)
        assert refused.returncode == 1
        assert json.loads(refused.stderr)["error"]["name"] == "NoSpace", refused.stderr
        appliance.run("nsenter", f"--target={pid}", "--mount", "umount", "/var/lib/ai-assistant")
    finally:
        appliance.run("umount", "/var/lib/ai-assistant")


def test_workers_are_different_users(appliance: Container) -> None:
    appliance.run("ai-assistant", "model", "import", MODEL, "--name", "other:1")
    appliance.run("ai-assistant", "model", "load", "other:1")
    try:
        workers = appliance.run("pgrep", "-f", "[d]aemon.worker").stdout.split()
        users = [appliance.run("stat", "-c", "%u", f"/proc/{worker}").stdout for worker in workers]
        assert len(set(users)) == len(users) >= 2
    finally:
        appliance.run("ai-assistant", "model", "remove", "other:1", "--yes")
