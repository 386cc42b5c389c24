"""Time and number are bounded: slow, silent and many clients cost what `Limits` says; nobody costs nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import socket
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from ai_assistant.daemon.api.limits import Limits
from tests.api.conftest import Api, Start, chat_body, request_bytes, until

QUICK = Limits(header_s=0.2, body_s=0.2, keep_alive_s=0.2, write_s=0.3, grace_s=0.2)


async def test_a_connection_that_says_nothing_is_closed(start: Start) -> None:
    api = await start(limits=QUICK)
    begin = time.monotonic()
    assert await api.send(b"") == b""
    assert time.monotonic() - begin < 1
    await api.still_answers()


async def test_headers_that_drip_are_cut(start: Start) -> None:
    api = await start(limits=QUICK)
    reader, writer = await api.raw()

    async def drip() -> None:
        writer.write(b"GET /health HTTP/1.1\r\n")
        while not writer.is_closing():
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(1):
        answer = await reader.read()
    dripping.cancel()
    writer.close()
    assert b"408" in answer
    assert b'"Timeout"' in answer
    await api.still_answers()


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"],
    ids=["length", "chunked"],
)
async def test_a_body_that_does_not_end_is_cut(start: Start, head: bytes) -> None:
    api = await start(limits=QUICK)
    answer = await api.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head)
    assert b"408" in answer
    assert b"body did not come" in answer
    await api.still_answers()
    assert api.service.begun == 1


async def test_an_endless_body_where_none_is_read_is_cut(start: Start) -> None:
    api = await start(limits=QUICK)
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer, sent = await api.push(head, *[b"1\r\nx\r\n"] * 100, pause_s=0.01)
    assert answer.startswith(b"HTTP/1.1 404")
    assert sent < 20


async def test_an_idle_connection_is_closed_after_its_time(start: Start) -> None:
    api = await start(limits=QUICK)
    reader, writer = await api.raw()
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(1):
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_slow_reader_stops_the_work_and_is_cut(start: Start) -> None:
    api = await start(limits=QUICK)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(api.path))
    sock.send(request_bytes(chat_body("!long", stream=True)))
    await asyncio.sleep(0.15)
    # The buffers are full: the generation is not asked for more.
    sent = api.service.sent
    assert sent < 16
    await asyncio.sleep(0.05)
    assert api.service.sent == sent
    async with asyncio.timeout(2):
        await api.service.closed.wait()
    await api.settled()
    sock.close()
    await api.still_answers()


async def test_a_reader_that_only_pauses_gets_everything(start: Start) -> None:
    api = await start(limits=QUICK)
    reader, writer = await api.raw()
    writer.write(request_bytes(chat_body("word " * 20_000, stream=True), close=True))
    await writer.drain()
    await asyncio.sleep(0.1)
    answer = await reader.read()
    writer.close()
    assert answer.count(b'"content":"word "') == 20_000
    assert b"[DONE]" in answer


async def test_a_whole_answer_that_nobody_takes_is_dropped(start: Start) -> None:
    api = await start(limits=QUICK)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(api.path))
    sock.send(request_bytes(chat_body("!big"), close=True))
    await asyncio.sleep(0.2)
    await api.settled()
    before = _server_side(api)
    assert before == 2
    await until(lambda: _server_side(api) == 1)
    sock.close()


def _server_side(api: Api) -> int:
    """Connected sockets of this process that belong to the server."""
    lines = subprocess.run(["cat", "/proc/self/net/unix"], capture_output=True, text=True, check=True).stdout
    return sum(line.endswith(str(api.path)) for line in lines.splitlines())


async def test_connections_are_bounded_and_old_idle_ones_make_room(start: Start) -> None:
    api = await start(limits=Limits(connections=20, connections_per_user=10))
    many = [await api.raw() for _ in range(10)]
    await asyncio.sleep(0.05)
    # All of them are young: they may be about to ask, so the next one is told to come back.
    refused = await api.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in refused.lower()
    assert b'"Busy"' in refused
    await asyncio.sleep(1.1)
    await api.still_answers()
    reader, _ = many[0]
    assert await reader.read() == b""
    for _, writer in many:
        writer.close()


async def test_busy_connections_are_never_sacrificed(start: Start) -> None:
    api = await start(limits=Limits(connections=20, connections_per_user=3))
    streams = []
    for _ in range(3):
        reader, writer = await api.raw()
        writer.write(request_bytes(chat_body("!forever", stream=True)))
        await reader.readuntil(b"tick")
        streams.append((reader, writer))
    await asyncio.sleep(1.1)
    assert (await api.send(b"")).startswith(b"HTTP/1.1 503")
    assert api.service.closed_early == 0
    for reader, writer in streams:
        await reader.readuntil(b"tick")
        writer.close()
    await api.settled()
    await api.still_answers()


async def test_five_hundred_idle_connections_are_bounded(start: Start) -> None:
    api = await start()
    await api.still_answers()
    socks = []
    for _ in range(500):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(api.path))
        socks.append(sock)
        if len(socks) % 50 == 0:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    # The listener, and on the server's side no more than one user may have.
    assert _server_side(api) <= 1 + Limits().connections_per_user
    await asyncio.sleep(1)
    await api.still_answers()
    for sock in socks:
        sock.close()
    await api.settled()
    await api.still_answers()


async def test_ten_thousand_idle_connections(start: Start) -> None:
    """As many as the process may have descriptors for, where that is less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 11_000) if hard != resource.RLIM_INFINITY else 11_000, hard))
    try:
        count = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 600)
        api = await start()
        await api.still_answers()
        socks = []
        try:
            for _ in range(count):
                sock = socket.socket(socket.AF_UNIX)
                socks.append(sock)
                sock.connect(str(api.path))
                if len(socks) % 50 == 0:
                    await until(lambda: _server_side(api) <= 200, 10)
            await until(lambda: _server_side(api) <= 1 + Limits().connections_per_user, 10)
            await asyncio.sleep(1.1)
            # Old idle ones make room, however many there were.
            await api.still_answers()
        finally:
            for sock in socks:
                sock.close()
        await api.settled()
        await api.still_answers()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_bodies_are_bounded_together(start: Start) -> None:
    api = await start(limits=Limits(bodies_bytes=300_000))
    _, writer = await api.raw()
    writer.write(request_bytes(b" " * 250_000)[:-1000])
    await writer.drain()
    await asyncio.sleep(0.05)
    busy = await api.chat("x" * 100_000)
    assert busy.status_code == 429
    assert busy.headers["retry-after"] == "1"
    writer.close()
    await api.settled()
    assert (await api.chat("x" * 100_000)).status_code == 200


class Rounds:
    """Counts how often the loop wakes up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        select = selector.select

        def counted(timeout: float | None = None) -> Any:
            self.count += 1
            return select(timeout)

        monkeypatch.setattr(selector, "select", counted)


async def test_an_idle_server_sleeps(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await api.still_answers()
    keep = await api.raw()
    await asyncio.sleep(0.05)
    rounds = Rounds(monkeypatch)
    await asyncio.sleep(2.5)
    # The sleep of the test itself is one of them.
    assert rounds.count <= 2
    keep[1].close()


async def test_a_token_costs_no_task_and_no_timer(api: Api) -> None:
    loop: Any = asyncio.get_running_loop()
    reader, writer = await api.raw()
    writer.write(request_bytes(chat_body("!forever", stream=True)))
    await reader.readuntil(b"tick")
    tasks, timers = len(asyncio.all_tasks()), len(loop._scheduled)
    for _ in range(50):
        await reader.readuntil(b"tick")
    assert len(asyncio.all_tasks()) == tasks
    assert len(loop._scheduled) <= timers + 1
    writer.close()
    await api.settled()


async def test_the_date_is_right(api: Api) -> None:
    await api.still_answers()
    await asyncio.sleep(1.1)
    response = await api.chat("x")
    sent = parsedate_to_datetime(response.headers["date"]).timestamp()
    assert abs(time.time() - sent) < 2
    assert "server" not in response.headers


async def test_at_a_stop_running_answers_may_end(start: Start) -> None:
    api = await start(limits=Limits(grace_s=2))
    api.service.pause_s = 0.05
    asked = asyncio.create_task(api.chat("a b c d e f"))
    await asyncio.sleep(0.1)
    api.stop.set()
    response = await asked
    assert response.json()["choices"][0]["message"]["content"] == "a b c d e f "
    async with asyncio.timeout(2):
        await api.task
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        await api.raw()


@pytest.mark.parametrize("stream", [True, False])
async def test_at_a_stop_endless_answers_are_told(start: Start, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = await start(limits=QUICK)
    reader, writer = await api.raw()
    writer.write(request_bytes(chat_body("!forever", stream=stream)))
    await asyncio.sleep(0.1)
    api.stop.set()
    async with asyncio.timeout(3):
        answer = await reader.read()
        await api.task
    writer.close()
    assert b'"ServiceUnavailable"' in answer
    assert answer.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert api.service.closed_early == 1
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_bad_clients_leave_no_warnings(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await api.send(b"nonsense\r\n\r\n")
    await api.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n")
    await api.send(request_bytes(b"{", close=True))
    _, writer = await api.raw()
    writer.write(request_bytes(chat_body("!forever", stream=True)))
    await asyncio.sleep(0.05)
    writer.close()
    await api.settled()
    gc.collect()
    assert not caplog.records


def test_the_server_imports_nothing_heavy() -> None:
    code = (
        "import sys, ai_assistant.daemon.api.server\n"
        "print(*sorted({'numpy', 'pydantic', 'jinja2', 'httpx', 'rich', 'typer', 'llama_cpp', 'uvloop', 'websockets',"
        " 'multipart', 'python_multipart'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


async def test_an_answer_that_is_not_streamed_is_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai_assistant.daemon.api.answers.MAX_COLLECTED", 1 << 20)
    async with asyncio.timeout(10):
        response = await api.chat("!long")
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("InvalidArgument", "stream")
    assert "1 MiB" in error["message"]
    await api.settled()
    await api.still_answers()
