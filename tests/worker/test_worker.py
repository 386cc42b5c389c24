"""A real worker process with a tiny model, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from ai_assistant.daemon.worker.frames import FrameReader, encode
from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.engines.contract import Chunk, Finished, FinishReason, GenerateRequest, LoadOptions
from ai_assistant.errors import ContextOverflow, InvalidModel, OutOfMemory, WorkerCrashed
from tests.support import gguf_writer

pytestmark = pytest.mark.engine

_LONG = GenerateRequest(prompt="run", temperature=1.0, seed=1, max_tokens=480)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_writer.write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "ai_assistant.daemon.worker", "--fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )  # fmt: skip
    theirs.close()
    return process, ours


@contextlib.asynccontextmanager
async def _worker(
    model: Path | None, options: LoadOptions | None = None
) -> AsyncIterator[tuple[WorkerClient, subprocess.Popen[bytes]]]:
    process, sock = _spawn()
    client = WorkerClient(sock)
    try:
        if model is not None:
            with model.open("rb") as file:
                await client.load(file.fileno(), options or LoadOptions(sequences=2, threads=1))
        yield client, process
    finally:
        await client.close()
        try:
            await asyncio.to_thread(process.wait, 10)
        finally:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


async def _text(client: WorkerClient, request: GenerateRequest) -> tuple[str, Finished]:
    text, last = "", None
    async with aclosing(client.generate(request)) as events:
        async for event in events:
            if isinstance(event, Chunk):
                text += event.text
            elif isinstance(event, Finished):
                last = event
    assert last is not None
    return text, last


async def test_the_whole_life_of_a_worker(tiny: Path) -> None:
    async with _worker(tiny) as (client, process):
        request = GenerateRequest(prompt="hello", temperature=0.0, max_tokens=20, logprobs=1)
        text, last = await _text(client, request)
        assert last.usage.completion_tokens == 20
        assert (await _text(client, request))[0] == text
        vectors, tokens = await client.embed(["one", "two"])
        assert (len(vectors), len(vectors[0])) == (2, 256)
        assert tokens > 0
        assert await client.tokenize("hello")
        await client.ping()
        with pytest.raises(ContextOverflow):
            await _text(client, GenerateRequest(prompt="x " * 2000))
        many = await asyncio.gather(*(_text(client, request) for _ in range(8)))
        assert all(each[1].usage.completion_tokens == 20 for each in many)
    assert process.returncode == 0


async def test_cancelling_frees_the_slot(tiny: Path) -> None:
    async with _worker(tiny, LoadOptions(sequences=1, threads=1)) as (client, _):
        for _ in range(5):
            async with aclosing(client.generate(_LONG)) as events:
                await anext(events)
        start = time.monotonic()
        await _text(client, GenerateRequest(prompt="next", max_tokens=2))
        assert time.monotonic() - start < 3


async def test_a_killed_worker_is_an_error_to_the_caller(tiny: Path) -> None:
    async with _worker(tiny) as (client, process):
        async with aclosing(client.generate(_LONG)) as events:
            await anext(events)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(WorkerCrashed):
                async for _ in events:
                    pass
        assert await asyncio.wait_for(client.died, 5)


async def test_models_that_are_none(tmp_path: Path, tiny: Path) -> None:
    whole = await asyncio.to_thread(tiny.read_bytes)
    for content in (b"", b"GGUF", whole[:100_000]):
        with tempfile.TemporaryFile(dir=tmp_path) as file:
            file.write(content)
            file.flush()
            async with _worker(None) as (client, _):
                with pytest.raises(InvalidModel):
                    await client.load(file.fileno(), LoadOptions())


async def test_the_memory_limit_is_refused_with_numbers_and_enforced(tiny: Path) -> None:
    async with _worker(None) as (client, _):
        with tiny.open("rb") as file, pytest.raises(OutOfMemory, match="MiB"):
            await client.load(file.fileno(), LoadOptions(memory_limit_bytes=10 << 20))
    limit = 256 << 20
    async with _worker(tiny, LoadOptions(sequences=1, threads=1, memory_limit_bytes=limit)) as (_, process):
        limits = _proc(process.pid, "limits").splitlines()
        data = next(line for line in limits if line.startswith("Max data size")).split()[3]
        core = next(line for line in limits if line.startswith("Max core file size")).split()[4]
        assert limit < int(data) < limit + (1 << 30)
        assert core == "0"


async def test_a_daemon_that_does_not_read_costs_the_worker_nothing(tiny: Path) -> None:
    async with _worker(tiny, LoadOptions(sequences=4, threads=1)) as (client, process):

        def resident() -> int:
            return int(_proc(process.pid, "statm").split()[1]) * 4096

        await _text(client, _LONG)
        before = resident()
        assert client._transport is not None
        client._transport.pause_reading()
        request = GenerateRequest(prompt="run", temperature=1.0, seed=1, max_tokens=480, logprobs=20)
        tasks = [asyncio.create_task(_text(client, request)) for _ in range(8)]
        await asyncio.sleep(1.5)
        assert resident() - before < 48 << 20
        client._transport.resume_reading()
        ends = await asyncio.gather(*tasks)
        assert all(each[1].reason in (FinishReason.LENGTH, FinishReason.STOP) for each in ends)


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def _answers(sock: socket.socket, count: int) -> list[dict[str, object]]:
    reader = FrameReader()
    found: list[dict[str, object]] = []
    sock.settimeout(20)
    while len(found) < count:
        data = sock.recv(1 << 16)
        if not data:
            break
        found += list(reader.feed(data))
    return found


def test_nothing_is_done_before_a_model_is_loaded(tiny: Path) -> None:
    process, sock = _spawn()
    with sock, process:
        for message in (
            {"op": "generate", "id": 1, "request": {"prompt": "x"}}, {"op": "tokenize", "id": 2, "text": "x"},
            {"op": "ping", "id": 3}, {"op": "dance", "id": 4}, {"op": "load", "id": 0, "options": {}},
            {"op": "load", "id": 7, "options": {}},
        ):  # fmt: skip
            sock.sendall(encode(message))
        found = _answers(sock, 6)
        assert [(each["id"], each["event"], each["name"]) for each in found] == [
            (number, "error", "InvalidArgument") for number in (1, 2, 3, 4, 0, 7)
        ]
        # Descriptors that nobody asked for are closed, not collected.
        with tiny.open("rb") as file:
            for number in range(50):
                socket.send_fds(sock, [encode({"op": "ping", "id": number})], [file.fileno()] * 2)
            _answers(sock, 50)
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 20
        sock.shutdown(socket.SHUT_RDWR)
        assert process.wait(10) == 0


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x02{}"])
def test_a_broken_frame_ends_the_process(data: bytes) -> None:
    process, sock = _spawn()
    with sock, process:
        sock.sendall(data)
        assert process.wait(20) == 1
        assert process.stderr is not None
        message = process.stderr.read().decode()
        assert message.startswith("ai-assistant-worker: ")
        assert "Traceback" not in message


def test_started_by_hand_it_says_how_it_is_started() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("LISTEN_")}
    env["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "ai_assistant.daemon.worker"], env=env, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "socket unit" in done.stderr
