"""The network: TLS, keys, limits for each, and bounds that hold before anybody has logged in."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from ai_assistant.daemon.api.keys import KeyStore
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.api.network import Network
from ai_assistant.daemon.api.tls import certificate, context
from ai_assistant.daemon.contract import Scope
from tests.api.conftest import Api, Start, chat_body, until

USER: Any = [{"role": "user", "content": "how warm is it"}]


@dataclass
class Net:
    api: Api
    network: Network
    port: int
    trust: ssl.SSLContext

    def key(self, name: str = "test", **more: Any) -> str:
        return self.network.keys.add({"name": name, **more})[1]

    def http(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(
            base_url=f"https://localhost:{self.port}", verify=self.trust, headers=headers, timeout=10
        )

    async def raw(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.trust, server_hostname="localhost"
        )
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        return answer


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    sock.setblocking(False)
    return sock


async def begin(start: Start, tmp_path: Path, limits: Limits | None = None) -> Net:
    made = certificate(tmp_path / "tls", "box", ["127.0.0.1"])
    sock = listening()
    network = Network(keys=KeyStore(tmp_path / "keys.json"), sockets=[sock], context=context(made), certificate=made)
    port = sock.getsockname()[1]
    api = await start(limits=limits, network=network)
    return Net(api, network, port, ssl.create_default_context(cafile=str(made.path)))


@pytest.fixture
async def net(start: Start, tmp_path: Path) -> AsyncIterator[Net]:
    found = await begin(start, tmp_path)
    yield found
    await found.api.still_answers()


async def test_the_official_client_with_a_key(net: Net) -> None:
    http: Any = httpx.AsyncClient(verify=net.trust)
    async with AsyncOpenAI(
        base_url=f"https://localhost:{net.port}/v1", api_key=net.key(), http_client=http, max_retries=0
    ) as client:
        answer = await client.chat.completions.create(model="assistant", messages=USER)
        assert answer.choices[0].message.content == "how warm is it "
        stream = await client.chat.completions.create(model="assistant", messages=USER, stream=True)
        assert "".join([each.choices[0].delta.content or "" async for each in stream]) == "how warm is it "
        assert [each.id async for each in client.models.list()] == ["assistant:1", "writer:2"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/network", "/metrics"])
async def test_without_a_key_there_is_nothing(net: Net, path: str) -> None:
    async with net.http() as client:
        answer = await client.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="ai-assistant"'
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("NotAuthorized", "authentication_error")


async def test_a_wrong_key_is_refused_and_not_logged(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good = net.key()
    for wrong in (good[:-1], "aia_nonsense", "x y", "é"):
        async with net.http() as client:
            answer = await client.post(
                "/v1/chat/completions", json=chat_body("x"), headers={b"authorization": f"Bearer {wrong}".encode()}
            )
        assert answer.status_code == 401
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    async with net.http(good) as client:
        assert (await client.get("/health")).status_code == 200
        basic = await client.get("/health", headers={"authorization": f"Basic {good}"})
        assert basic.status_code == 401
    assert net.api.service.begun == 0
    assert "failed" in caplog.text
    assert good[4:20] not in caplog.text


async def test_scopes(net: Net) -> None:
    async with net.http(net.key("watcher", scopes=["read"])) as client:
        assert (await client.get("/v1/models")).status_code == 200
        denied = await client.post("/v1/chat/completions", json=chat_body("x"))
    assert denied.status_code == 403
    assert "not for infer" in denied.json()["error"]["message"]
    async with net.http(net.key("worker", scopes=["infer"])) as client:
        assert (await client.post("/v1/chat/completions", json=chat_body("x"))).status_code == 200
        assert (await client.get("/v1/models")).status_code == 403


async def test_no_key_looks_after_keys(net: Net) -> None:
    async with net.http(net.key()) as client:
        assert (await client.get("/network/keys")).status_code == 403
        assert (await client.post("/network/keys", json={"name": "more"})).status_code == 403
        assert (await client.delete("/network/keys/test")).status_code == 403
        assert (await client.get("/network")).status_code == 200
    assert len(net.network.keys.all()) == 1


async def test_a_removed_key_is_refused_on_the_connection_that_is_open(net: Net) -> None:
    async with net.http(net.key()) as client:
        assert (await client.get("/health")).status_code == 200
        net.network.keys.remove("test")
        assert (await client.get("/health")).status_code == 401


async def test_requests_per_minute(net: Net) -> None:
    async with net.http(net.key(requests_per_minute=2)) as client:
        assert [(await client.get("/health")).status_code for _ in range(3)] == [200, 200, 429]
        refused = await client.get("/health")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    async with net.http(net.key("other")) as client:
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_per_minute(net: Net, stream: bool) -> None:
    async with net.http(net.key(tokens_per_minute=10)) as client:
        first = await client.post("/v1/chat/completions", json=chat_body("a b c d e f g h", stream=stream, n=2))
        assert first.status_code == 200
        refused = await client.post("/v1/chat/completions", json=chat_body("a", stream=stream))
    assert refused.status_code == 429
    # 8 of the prompt and 8 of each answer were used, of 10.
    assert 80 <= int(refused.headers["retry-after"]) <= 90


async def test_who_leaves_early_pays_for_what_was_made(net: Net) -> None:
    async with net.http(net.key(tokens_per_minute=1)) as client:
        async with client.stream("POST", "/v1/chat/completions", json=chat_body("!forever", stream=True)) as answer:
            pieces = answer.aiter_text()
            for _ in range(5):
                await anext(pieces)
        await net.api.settled()
        assert (await client.get("/health")).status_code == 429


async def test_plain_http_gets_nothing(net: Net) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", net.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    assert b"HTTP" not in answer


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_old_tls_is_refused(net: Net) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", net.port, ssl=old)


async def test_a_second_key_header_is_refused(net: Net) -> None:
    key = net.key().encode()
    twice = b"Authorization: Bearer aia_x\r\nAuthorization: Bearer " + key
    answer = await net.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n" + twice + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"authorization is given twice" in answer


async def test_handshakes_that_never_end_are_bounded_and_cut(start: Start, tmp_path: Path) -> None:
    net = await begin(start, tmp_path, Limits(header_s=0.5, connections_per_source=5, network_connections=10))
    silent = [await asyncio.open_connection("127.0.0.1", net.port) for _ in range(20)]
    # Those beyond the bound are closed at once, the others when their time is over; then there is room again.
    async with asyncio.timeout(5):
        assert [await reader.read() for reader, _ in silent] == [b""] * 20
    async with net.http(net.key()) as client:
        assert (await client.get("/health")).status_code == 200
    for _, writer in silent:
        writer.close()
    await net.api.still_answers()


async def test_the_network_cannot_keep_local_users_out(start: Start, tmp_path: Path) -> None:
    net = await begin(start, tmp_path, Limits(connections_per_source=5))
    key = net.key()
    busy = [net.http(key) for _ in range(5)]

    async def ask(client: httpx.AsyncClient) -> None:
        await client.post("/v1/chat/completions", json=chat_body("!stuck"))

    asking = [asyncio.create_task(ask(each)) for each in busy]
    await until(lambda: net.api.service.begun == 5)
    async with net.http(key) as sixth:
        with pytest.raises(httpx.TransportError):
            await sixth.get("/health")
    await net.api.still_answers()
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for client in busy:
        await client.aclose()
    await net.api.settled()


async def test_a_client_that_goes_away_frees_its_slot(net: Net) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", net.port, ssl=net.trust, server_hostname="localhost")
    body = b'{"model":"assistant","stream":true,"messages":[{"role":"user","content":"!forever"}]}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + net.key().encode()
        + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip
    await reader.readuntil(b"tick")
    writer.transport.abort()
    async with asyncio.timeout(3):
        await net.api.service.closed.wait()


async def test_a_reader_that_stops_is_cut(start: Start, tmp_path: Path) -> None:
    net = await begin(start, tmp_path, Limits(write_s=0.3))
    _, writer = await asyncio.open_connection(
        "127.0.0.1", net.port, ssl=net.trust, server_hostname="localhost", limit=1024
    )
    body = b'{"model":"assistant","stream":true,"messages":[{"role":"user","content":"!long"}]}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + net.key().encode()
        + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )  # fmt: skip
    async with asyncio.timeout(5):
        await net.api.service.closed.wait()
    # A few buffers of the kernel's and TLS's, at 64 KiB a piece.
    assert net.api.service.sent < 200
    writer.transport.abort()
    await net.api.settled()


async def test_looking_after_keys_over_the_unix_socket(net: Net) -> None:
    api = net.api
    made = await api.client.post("/network/keys", json={"name": "laptop", "scopes": ["infer"], "expires_s": 3600})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    secret = made.json()["key"]
    async with net.http(secret) as client:
        assert (await client.post("/v1/chat/completions", json=chat_body("x"))).status_code == 200
    rows = (await api.client.get("/network/keys")).json()["data"]
    assert [(each["name"], each["scopes"]) for each in rows] == [("laptop", ["infer"])]
    assert secret not in str(rows)
    assert "digest" not in rows[0]
    again = await api.client.post("/network/keys", json={"name": "laptop"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "AlreadyExists")
    odd = await api.client.post("/network/keys", json={"name": "x", "admin": True})
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "admin")
    assert (await api.client.delete("/network/keys/laptop")).status_code == 200
    assert (await api.client.delete("/network/keys/laptop")).status_code == 404


async def test_the_state_of_the_network(net: Net) -> None:
    state = (await net.api.client.get("/network")).json()
    assert net.network.certificate is not None
    assert state["enabled"] is True
    assert state["listening"] == [f"127.0.0.1:{net.port}"]
    assert state["certificate"]["fingerprint_sha256"] == net.network.certificate.fingerprint
    assert (state["keys"], state["problem"]) == (0, "")


async def test_only_administrators_look_after_keys(start: Start, tmp_path: Path) -> None:
    api = await start(
        allowed=lambda _peer, scope: scope is not Scope.NETWORK_API,
        network=Network(keys=KeyStore(tmp_path / "keys.json")),
    )
    denied = await api.client.post("/network/keys", json={"name": "x"})
    assert denied.status_code == 403
    assert "ai-assistant-admin" in denied.json()["error"]["hint"]
    state = (await api.client.get("/network")).json()
    assert state == {"enabled": False, "listening": [], "certificate": None, "keys": 0, "problem": ""}


async def test_at_a_stop_nothing_listens(start: Start, tmp_path: Path) -> None:
    net = await begin(start, tmp_path)
    _, half = await asyncio.open_connection("127.0.0.1", net.port)
    await asyncio.sleep(0.05)
    net.api.stop.set()
    async with asyncio.timeout(5):
        await net.api.task
    half.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", net.port)


async def test_openai_reads_a_refused_key_as_that(net: Net) -> None:
    http: Any = httpx.AsyncClient(verify=net.trust)
    async with AsyncOpenAI(
        base_url=f"https://localhost:{net.port}/v1", api_key="aia_no", http_client=http, max_retries=0
    ) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


def test_a_certificate_that_cannot_be_used_keeps_nobody_local_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ai-assistant.tls.cert").write_text("nonsense")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    sock = listening()
    network = Network.open(tmp_path, [sock], "box", [])
    assert sock.fileno() == -1
    assert network.context is None
    assert "credstore" in network.state()["problem"]
    assert network.state()["enabled"] is True


def test_the_network_is_opened_with_what_the_manager_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert Network.open(tmp_path, [], "box", []).state()["enabled"] is False
    assert not (tmp_path / "tls").exists()
    with listening() as sock:
        state = Network.open(tmp_path, [sock], "box", ["192.0.2.1"]).state()
    assert "box.local" in state["certificate"]["names"]
    assert state["listening"][0].startswith("127.0.0.1:")
