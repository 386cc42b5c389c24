"""The process and the daemon's side of it, over a real socket; and what the daemon makes of a hostile one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.daemon.fetch.client import Event, Fetcher, RemoteFile
from ai_assistant.daemon.fetch.source import parse
from ai_assistant.daemon.worker.frames import encode
from ai_assistant.errors import (
    AIAssistantError,
    DownloadFailed,
    NoSpace,
    NoSuchModel,
    NotAuthorized,
    ServiceUnavailable,
)
from tests.support import hub_server
from tests.support.fetch_unit import Unit
from tests.support.hub_server import Hub

CONTENT = os.urandom(200_000)
CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE = {"attempts": 3, "first_wait_s": 0.0, "stall_s": 20.0}


async def test_from_a_name_to_a_file(unit: Unit, hub: Hub, tmp_path: Path) -> None:
    hub.files["o/n"] = {"m-Q8_0.gguf": CONTENT, "m-Q4_0.gguf": b"other"}
    hub.token, hub.store = "hf_secret", True
    fetcher = Fetcher(unit.path, patience=PATIENCE)
    source = parse("hf:o/n:Q8_0", endpoint=hub.url)
    (file,) = await fetcher.resolve(source, "hf_secret", lambda event: None)
    assert (file.path, file.size_bytes, file.sha256) == (
        "m-Q8_0.gguf",
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
    )
    told: list[Event] = []
    fd = os.open(tmp_path / "part", os.O_RDWR | os.O_CREAT)
    try:
        size = await fetcher.get(source, file, fd, told.append, token="hf_secret", max_bytes=len(CONTENT))
    finally:
        os.close(fd)
    assert size == len(CONTENT)
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert told[-1].bytes == len(CONTENT)
    for each in unit.processes:
        assert each.wait(20) == 0
        assert each.stderr is not None
        assert each.stderr.read() == b""


def public(pid: int) -> bytes:
    """What the kernel shows of a process's start."""
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


async def test_the_token_is_in_no_argument_and_no_variable(unit: Unit, hub: Hub, tmp_path: Path) -> None:
    hub.files["o/n"] = {"m.gguf": CONTENT}
    hub.faults.append(hub_server.paced(100, 0.1))
    fetcher = Fetcher(unit.path, patience=PATIENCE)
    source = parse(f"{hub.url}/o/n/resolve/main/m.gguf", endpoint=hub.url)
    file = RemoteFile("m.gguf", f"{hub.url}/o/n/resolve/main/m.gguf", len(CONTENT), "", "")
    come = asyncio.Event()

    def begun(event: Event) -> None:
        if event.bytes > 0:
            come.set()

    fd = os.open(tmp_path / "part", os.O_RDWR | os.O_CREAT)
    task = asyncio.create_task(fetcher.get(source, file, fd, begun, token="hf_very_secret", max_bytes=1 << 20))
    await asyncio.wait_for(come.wait(), 30)
    shown = public(unit.processes[0].pid)
    assert b"fetch" in shown
    assert b"hf_very_secret" not in shown
    # Giving up ends the process and leaves what has come.
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(fd)
    assert await asyncio.to_thread(unit.processes[0].wait, 20) == 0
    have = (tmp_path / "part").read_bytes()
    assert 0 < len(have) < len(CONTENT)
    assert CONTENT.startswith(have)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda hub: hub.files.clear(), NoSuchModel),
        (lambda hub: setattr(hub, "token", "x"), NotAuthorized),
        (lambda hub: setattr(hub, "listing", b"<html>"), DownloadFailed),
        (lambda hub: setattr(hub, "listing", b"[" * 100_000), DownloadFailed),
        (lambda hub: setattr(hub, "listing", {"siblings": "none"}), DownloadFailed),
        (lambda hub: hub.listing_faults.extend([hub_server.status(503)] * 8), DownloadFailed),
        (lambda hub: hub.listing_faults.extend([hub_server.compressed] * 8), DownloadFailed),
        (lambda hub: hub.listing_faults.extend([hub_server.endless] * 8), DownloadFailed),
    ],
)
async def test_errors_come_back_as_themselves(
    unit: Unit, hub: Hub, change: Callable[[Hub], None], error: type[AIAssistantError]
) -> None:
    hub.files["o/n"] = {"m.gguf": b"x"}
    change(hub)
    with pytest.raises(error) as caught:
        await Fetcher(unit.path, patience=PATIENCE).resolve(parse("hf:o/n", endpoint=hub.url), "", lambda event: None)
    assert caught.value.message
    assert caught.value.message != "internal error"


async def test_a_listing_that_fails_at_first(unit: Unit, hub: Hub) -> None:
    hub.files["o/n"] = {"m.gguf": b"x"}
    hub.listing_faults.extend([hub_server.status(502), hub_server.status(429, {"Retry-After": "0"})])
    told: list[Event] = []
    found = await Fetcher(unit.path, patience=PATIENCE).resolve(parse("hf:o/n", endpoint=hub.url), "", told.append)
    assert found[0].path == "m.gguf"
    assert [each.retry.partition(" ")[2] for each in told] == [
        "cannot answer now (status 502)",
        "has too many requests (status 429)",
    ]


async def test_it_cannot_write_more_than_it_was_given(unit: Unit, hub: Hub, tmp_path: Path) -> None:
    hub.files["o/n"] = {"m.gguf": CONTENT}
    url = f"{hub.url}/o/n/resolve/main/m.gguf"
    fd = os.open(tmp_path / "part", os.O_RDWR | os.O_CREAT)
    hub.faults.append(hub_server.endless)
    with pytest.raises(NoSpace):
        await Fetcher(unit.path, patience=PATIENCE).get(
            parse(url, endpoint=hub.url), RemoteFile("m", url, -1, "", ""), fd, lambda event: None, max_bytes=70_000
        )
    os.close(fd)
    assert (tmp_path / "part").stat().st_size <= 70_000


async def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable) as caught:
        await Fetcher(tmp_path / "none").resolve(parse("hf:o/n", endpoint="https://h"), "", lambda event: None)
    assert "ai-assistant-fetch.socket" in caught.value.hint


async def answered(tmp_path: Path, reply: bytes) -> Any:
    """What the daemon makes of these bytes from the process."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4)
        writer.write(reply)
        await writer.drain()
        writer.close()

    path = tmp_path / "hostile.sock"
    server = await asyncio.start_unix_server(serve, path)
    try:
        return await Fetcher(path).resolve(parse("hf:o/n", endpoint="https://h"), "", lambda event: None)
    finally:
        server.close()


def result(**values: Any) -> bytes:
    row = {"path": "p", "url": "https://h/p", "size_bytes": 1, "sha256": "", "git_sha1": "", **values}
    return encode({"event": "result", "value": {"revision": "", "files": [row]}})


@pytest.mark.parametrize(
    "reply",
    [
        b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", encode({}), encode({"event": "result"}),
        encode({"event": "result", "value": []}), encode({"event": "result", "value": {"files": []}}),
        encode({"event": "result", "value": {"files": [3]}}), encode({"event": "error"}),
        encode({"event": "progress", "value": {"bytes": -2}}), encode({"event": "progress", "value": {"bytes": 1.5}}),
        encode({"event": "progress", "value": {"wait_s": -1}}), encode({"event": "progress", "value": {"x": 1}}),
        encode({"event": "progress", "value": {"retry": "x" * 700}}),
        b"\x00\x00\x00\x40" + b'{"event":"progress","value":{"wait_s":NaN}}'.ljust(64),
        result(size_bytes=-2), result(size_bytes="1"), result(size_bytes=True), result(sha256="x" * 65),
        result(path="a\nb"), result(path=3), result(url="x" * 9000), result(more=1),
        encode({"event": "result", "value": {"files": [{}] * 100}}),
    ],
)  # fmt: skip
async def test_a_hostile_process(tmp_path: Path, reply: bytes) -> None:
    with pytest.raises(DownloadFailed):
        await answered(tmp_path, reply)


async def test_a_result_is_taken(tmp_path: Path) -> None:
    assert (await answered(tmp_path, result()))[0] == RemoteFile("p", "https://h/p", 1, "", "")


@pytest.mark.parametrize(
    "request_",
    [{}, {"op": "get"}, {"op": "remove"}, {"op": "resolve", "source": None}, {"op": "resolve", "token": 3},
     {"op": "resolve", "source": {"kind": "url", "url": "http://192.0.2.1/x"}},
     {"op": "resolve", "source": {"kind": "url", "url": "https://h/x"}, "patience": {"attempts": -1}},
     {"op": "resolve", "source": {"kind": "url", "url": "https://h/x"}, "patience": {"x": 1}}],
)  # fmt: skip
async def test_strange_requests(unit: Unit, request_: dict[str, Any]) -> None:
    reader, writer = await asyncio.open_unix_connection(unit.path)
    writer.write(encode(request_))
    reply = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    assert json.loads(reply[4:])["name"] == "InvalidArgument"


async def test_it_must_be_started_by_its_socket() -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "ai_assistant.daemon.fetch"], cwd=CHECKOUT, capture_output=True
    )
    assert done.returncode == 2
    assert b"socket unit" in done.stderr
