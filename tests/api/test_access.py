"""Who asks, and who may: credentials are the kernel's, and strangers read but do not work."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ai_assistant.daemon.api.auth import peer_of
from ai_assistant.daemon.contract import Peer, Scope
from ai_assistant.errors import ServiceUnavailable
from tests.api.conftest import Api, Start, chat_body, request_bytes

WORK = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/classify",
    "/tokenize", "/detokenize",
)  # fmt: skip
READ = ("/health", "/v1/models", "/v1/models/assistant:1", "/metrics")


def test_the_peer_of_a_socket_is_its_process() -> None:
    one, two = socket.socketpair(socket.AF_UNIX)
    with one, two:
        peer = peer_of(one)
    assert peer == Peer(os.getuid(), os.getgid(), frozenset({os.getgid(), *os.getgroups()}), os.getpid())


def test_a_tcp_peer_is_nobody() -> None:
    with socket.socket(socket.AF_INET) as one:
        assert peer_of(one) is None


async def test_strangers_read_but_do_not_work(start: Start) -> None:
    seen: list[tuple[Peer, Scope]] = []

    def readers_only(peer: Peer, scope: Scope) -> bool:
        seen.append((peer, scope))
        return scope is Scope.READ

    api = await start(allowed=readers_only)
    for path in READ:
        assert (await api.client.get(path)).status_code == 200
    for path in WORK:
        # Not even the body's mistakes are told.
        response = await api.client.post(path, content=b"{")
        assert response.status_code == 403
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("NotAuthorized", "permission_error")
        assert "ai-assistant" in error["hint"]
    assert api.service.begun == 0
    assert {scope for _, scope in seen} == {Scope.READ, Scope.INFER}
    assert {peer.uid for peer, _ in seen} == {os.getuid()}


async def test_a_stranger_cannot_send_a_large_body(start: Start) -> None:
    api = await start(allowed=lambda _peer, _scope: False)
    answer = await api.send(request_bytes(b"x" * 1_000_000))
    assert answer.startswith(b"HTTP/1.1 403") or answer == b""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="api-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


ASK = """
import os, socket, sys
os.setgroups([int(each) for each in sys.argv[2:]]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(sys.stdin.buffer.read())
out = b""
while piece := s.recv(65536): out += piece
print(out.decode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root to become somebody else")
async def test_groups_of_another_user_decide(start: Start, open_folder: Path) -> None:
    members = 4242
    api = await start(allowed=lambda peer, scope: scope is Scope.READ or members in peer.groups, folder=open_folder)

    def ask(groups: list[int]) -> str:
        return subprocess.run(
            [sys.executable, "-c", ASK, str(api.path), *map(str, groups)],
            input=request_bytes(chat_body("hello"), close=True),
            capture_output=True,
            check=True,
        ).stdout.decode()

    assert "HTTP/1.1 200" in await asyncio.to_thread(ask, [4241, members])
    assert "HTTP/1.1 403" in await asyncio.to_thread(ask, [4241])
    # More groups than can be read: less is allowed, not more.
    assert "HTTP/1.1 403" in await asyncio.to_thread(ask, [members, *range(5000, 5400)])


async def test_health(api: Api) -> None:
    fine = await api.client.get("/health")
    assert (fine.status_code, fine.json()) == (200, {"status": "ok", "version": "0.0-test"})
    api.service.state["state"] = "starting"
    early = await api.client.get("/health")
    assert early.status_code == 503
    assert early.json()["reason"] == "the daemon is starting"
    assert "retry-after" in early.headers
    api.service.state["state"] = "degraded"
    api.service.problem = "the built-in model is missing"
    worse = await api.client.get("/health")
    assert worse.status_code == 200
    assert worse.json()["reason"] == "the built-in model is missing"


async def test_metrics(api: Api) -> None:
    api.service.counters.requests = 7
    api.service.counters.decode_s = 1.5
    response = await api.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert samples["ai_assistant_requests_total"] == "7"
    assert samples["ai_assistant_decode_seconds_total"] == "1.5"
    assert samples['ai_assistant_models{state="loaded"}'] == "1"
    assert samples['ai_assistant_models{state="failed"}'] == "0"
    assert int(samples["ai_assistant_process_resident_memory_bytes"]) > 1_000_000
    assert int(samples["ai_assistant_process_open_fds"]) > 3
    names = {line.split()[2] for line in response.text.splitlines() if line.startswith("# TYPE")}
    assert {name.partition("{")[0] for name in samples} == names


async def test_tokenize(api: Api) -> None:
    response = await api.post("/tokenize", {"model": "assistant", "content": "one three"})
    assert response.json() == {"tokens": [3, 5], "count": 2}


async def test_errors_of_the_service_elsewhere(api: Api) -> None:
    api.service.errors["X"] = ServiceUnavailable("no worker")
    response = await api.post("/v1/embeddings", {"model": "assistant", "input": "!raise X"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"


async def test_many_vectors_let_others_in(api: Api) -> None:
    asked = asyncio.create_task(api.post("/v1/embeddings", {"model": "assistant", "input": ["x"] * 2048}))
    await asyncio.sleep(0)
    await api.still_answers()
    body = json.loads((await asked).text)
    assert [each["index"] for each in body["data"]] == list(range(2048))
