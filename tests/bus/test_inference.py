"""Answers over the bus and the socket from the real engine in real workers, and what goes wrong with those."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from dbus_fast import Message, Variant

from tests.bus import world as worlds
from tests.bus.client import ROOT, Client, Refused, connected
from tests.bus.world import World

pytestmark = pytest.mark.engine
MODEL = "assistant:1"
LONG = {"max_tokens": Variant("u", 3000), "chat": Variant("b", False), "temperature": Variant("d", 0.0)}
SHORT = {**LONG, "max_tokens": Variant("u", 8)}


@pytest_asyncio.fixture
async def client(serving: World) -> AsyncIterator[Client]:
    async with connected(serving.address) as made:
        yield made


@pytest_asyncio.fixture
async def endless(client: Client) -> str:
    """A prompt whose greedy answer does not end by itself: random weights usually run into a circle."""
    for prompt in "abcdefghijklmnop":
        options = {**LONG, "max_tokens": Variant("u", 300)}
        _, usage = await client.call("Inference", "Generate", "ssa{sv}", MODEL, prompt, options)
        if usage["finish_reason"].value == "length":
            return prompt
    pytest.fail("every answer ends")


async def until(check: Callable[[], Any], timeout_s: float = 20) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


async def running(client: Client) -> int:
    return int((await client.call("Manager", "GetStatus"))["running"].value)


async def model_state(client: Client, name: str = MODEL) -> str:
    path = await client.call("Manager", "FindModel", "s", name)
    return str(await client.get(path, "Model", "State"))


def test_busctl_gets_an_answer(serving: World) -> None:
    answer = serving.call(
        "Generate", "ssa{sv}", MODEL, "hello", "2", "max_tokens", "u", "8", "seed", "u", "1", interface="Inference"
    )
    assert answer.startswith("sa{sv} "), answer
    assert '"completion_tokens" x 8' in answer
    assert '"finish_reason" s "length"' in answer


async def test_greedy_answers_repeat(client: Client) -> None:
    first, usage = await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT)
    second, _ = await client.call("Inference", "Generate", "ssa{sv}", "assistant", "abc", SHORT)
    assert first == second
    assert usage["completion_tokens"].value == 8
    assert usage["decode_s"].value >= 0


async def test_wrong_requests(client: Client) -> None:
    wrong: list[tuple[str, str, dict[str, Variant], str]] = [
        ("nope", "x", {}, "NoSuchModel"),
        (MODEL, "x", {"temperature": Variant("d", 9.0)}, "InvalidArgument"),
        (MODEL, "x", {"nope": Variant("d", 9.0)}, "InvalidArgument"),
        (MODEL, "x", {"max_tokens": Variant("s", "many")}, "InvalidArgument"),
        (MODEL, "x", {"messages": Variant("s", "[")}, "InvalidArgument"),
        (MODEL, "x", {"messages": Variant("s", "[]")}, "InvalidArgument"),
        (MODEL, "", {"messages": Variant("s", '[{"role":"nobody","content":"x"}]')}, "InvalidArgument"),
        (MODEL, "", {"response_schema": Variant("s", "[1]")}, "InvalidArgument"),
        (MODEL, "", {"tools": Variant("s", "[" * 100_000)}, "InvalidArgument"),
        (MODEL, "word " * 5000, {}, "ContextOverflow"),
        (MODEL, "\x01" * 100_000, {"chat": Variant("b", False)}, "ContextOverflow"),
    ]
    for model, prompt, options, error in wrong:
        with pytest.raises(Refused) as caught:
            await client.call("Inference", "Generate", "ssa{sv}", model, prompt, options)
        assert caught.value.name == f"org.ai_assistant1.Error.{error}", (options, caught.value)
    await client.call("Inference", "Generate", "ssa{sv}", MODEL, "x", SHORT)


async def test_one_load_for_many(serving: World, client: Client) -> None:
    path = await client.call("Manager", "FindModel", "s", MODEL)
    await client.call("Model", "Unload", path=path)
    await until(lambda: not serving.worker_pids())
    await asyncio.sleep(0.6)  # changes within a quarter of a second are one signal: unloaded and loaded again were none
    await client.listen()
    calls = [client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT) for _ in range(4)]
    answers = await asyncio.gather(*calls)
    assert len({text for text, _ in answers}) == 1
    assert len(serving.worker_pids()) == 1
    await asyncio.sleep(0.5)
    states = [
        each.body[1]["State"].value
        for each in client.signals
        if each.path == path and each.member == "PropertiesChanged" and "State" in each.body[1]
    ]
    assert states[-1] == "loaded"


async def test_load_is_a_job_and_unload_ends_the_worker(serving: World, client: Client) -> None:
    path = await client.call("Manager", "FindModel", "s", MODEL)
    await client.call("Model", "Unload", path=path)
    await until(lambda: not serving.worker_pids())
    assert await client.get(path, "Model", "State") == "unloaded"
    values = await client.job(await client.call("Model", "Load", "a{sv}", {}, path=path))
    assert (values["State"], values["Kind"]) == ("done", "load")
    assert values["Result"]["model"].value == path
    assert await client.get(path, "Model", "State") == "loaded"
    with pytest.raises(Refused, match="InvalidArgument"):
        await client.call("Model", "Load", "a{sv}", {"x": Variant("u", 1)}, path=path)
    with pytest.raises(Refused, match="NotSupported"):
        await client.call("Model", "Remove", path=path)


def read_all(fd: int) -> bytes:
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(60)
        pieces = []
        while piece := sock.recv(65_536):
            pieces.append(piece)
    return b"".join(pieces)


def chat(**more: Any) -> str:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **more})


async def test_a_stream_has_the_bytes_of_the_socket_api(serving: World, client: Client) -> None:
    reply = await client.raw(ROOT, "org.ai_assistant1.Inference", "OpenStream", "s", chat(max_tokens=8))
    over_bus = await asyncio.to_thread(read_all, reply.unix_fds[0])
    status, over_socket = await asyncio.to_thread(post, serving, chat(max_tokens=8, stream=True))
    assert status == 200

    def said(data: bytes) -> dict[str, Any]:
        """What all pieces say together: how many tokens come in each is a matter of time."""
        events = [each.removeprefix("data: ") for each in data.decode().split("\n\n") if each]
        assert events[-1] == "[DONE]"
        choices = [choice for each in events[:-1] for choice in json.loads(each)["choices"]]
        deltas = [choice["delta"] for choice in choices]
        return {
            "role": [each["role"] for each in deltas if "role" in each],
            "content": "".join(each.get("content") or "" for each in deltas),
            "fields": {key for each in deltas for key in each} | {key for each in choices for key in each},
            "end": [each["finish_reason"] for each in choices if each["finish_reason"]],
        }

    assert said(over_bus)["content"]
    assert said(over_bus) == said(over_socket)


async def test_stream_errors_come_with_the_call(client: Client) -> None:
    for body, error in (
        ("{", "InvalidArgument"),
        ("[]", "InvalidArgument"),
        (chat(temperature=7), "InvalidArgument"),
        (chat(nope=1), "InvalidArgument"),
        (json.dumps({"model": "nope", "messages": [{"role": "user", "content": "x"}]}), "NoSuchModel"),
    ):
        with pytest.raises(Refused) as caught:
            await client.call("Inference", "OpenStream", "s", body)
        assert caught.value.name == f"org.ai_assistant1.Error.{error}", (body, caught.value)


async def test_closing_a_stream_cancels(serving: World, client: Client) -> None:
    fds = serving.descriptors()
    for _ in range(3):
        reply = await client.raw(ROOT, "org.ai_assistant1.Inference", "OpenStream", "s", chat())
        os.close(reply.unix_fds[0])

    async def idle() -> bool:
        return await running(client) == 0

    await until(idle)
    await until(lambda: serving.descriptors() <= fds)


async def test_open_streams_are_limited(serving: World) -> None:
    async with connected(serving.address) as other:
        interface = "org.ai_assistant1.Inference"
        calls = [other.raw(ROOT, interface, "OpenStream", "s", chat(logprobs=True)) for _ in range(40)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        opened = [fd for each in results if isinstance(each, Message) for fd in each.unix_fds]
        for fd in opened:
            os.close(fd)
    assert any(isinstance(each, Refused) and "too many open streams" in each.text for each in results)
    assert len(opened) >= 4


async def test_a_caller_that_leaves_frees_its_place(serving: World, client: Client, endless: str) -> None:
    for _ in range(3):
        async with connected(serving.address) as other:
            await other.bus.send(
                Message(
                    "org.ai_assistant1",
                    ROOT,
                    "org.ai_assistant1.Inference",
                    "Generate",
                    signature="ssa{sv}",
                    body=[MODEL, endless, LONG],
                )
            )
            await asyncio.sleep(0.1)

    async def idle() -> bool:
        return await running(client) == 0

    await until(idle, 10)


async def test_transient_models_answer_and_go(serving: World, client: Client, tiny_model: Path) -> None:
    before = len(serving.worker_pids())
    async with connected(serving.address) as other:
        with tiny_model.open("rb") as file:
            _, name = await other.call("Manager", "OpenModel", "ha{sv}", 0, {}, fds=(file.fileno(),))
        text, _ = await other.call("Inference", "Generate", "ssa{sv}", name, "abc", SHORT)
        assert text == (await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT))[0]
    await until(lambda: len(serving.worker_pids()) <= max(1, before))
    with pytest.raises(Refused, match="NoSuchModel"):
        await client.call("Manager", "FindModel", "s", name)


async def test_embeddings(client: Client) -> None:
    vectors, tokens = await client.call("Inference", "Embed", "sas", MODEL, ["one", "two", "one"])
    assert len(vectors) == 3
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
    assert sum(each * each for each in vectors[0]) == pytest.approx(1, abs=1e-3)
    assert tokens >= 3


async def test_self_test(client: Client) -> None:
    results = await client.call("Manager", "SelfTest")
    assert {name: passed for name, passed, _ in results} == {
        "disk": True,
        "memory": True,
        "state directory": True,
        "inference": True,
    }


def request(world: World, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    connection.sock.connect(str(world.api))
    connection.request(method, path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data


def post(world: World, body: str) -> tuple[int, bytes]:
    return request(world, "POST", "/v1/chat/completions", body)


def test_the_socket_answers(serving: World) -> None:
    assert request(serving, "GET", "/health")[0] == 200
    status, data = request(serving, "GET", "/v1/models")
    assert status == 200
    assert MODEL in [each["id"] for each in json.loads(data)["data"]]
    status, data = post(serving, chat(max_tokens=4))
    assert status == 200, data
    assert json.loads(data)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(("user", "status"), [("outsider", 403), ("member", 200), ("admin", 200)])
def test_groups_decide_on_the_socket_too(serving: World, user: str, status: int) -> None:
    script = (
        # In one piece: the refusal needs the headers only, and may come before a second piece is sent.
        "import socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); body = sys.argv[2].encode()\n"
        "head = 'POST /v1/chat/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-type: application/json\\r\\n'\n"
        "sock.sendall((head + f'content-length: {len(body)}\\r\\n\\r\\n').encode() + body)\n"
        "print(sock.recv(100).split()[1].decode())\n"
    )
    command = [sys.executable, "-c", script, str(serving.api), chat(max_tokens=2)]
    uid = worlds.USERS[user]
    done = subprocess.run(serving.inside(command, user=uid), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(status), done.stderr


async def test_a_crash_is_an_error_and_then_it_serves_again(serving: World, client: Client, endless: str) -> None:
    await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT)
    # More than run at once, so that some have not ended however long the signal takes to get there.
    waiting = [
        asyncio.ensure_future(client.call("Inference", "Generate", "ssa{sv}", MODEL, endless, LONG)) for _ in range(24)
    ]
    await asyncio.sleep(0.05)
    for pid in serving.worker_pids():
        os.kill(pid, signal.SIGKILL)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    refused = [each for each in ends if isinstance(each, BaseException)]
    assert refused
    for each in refused:
        assert isinstance(each, Refused)
        assert each.name == "org.ai_assistant1.Error.WorkerCrashed"
    # The restart is near, so this waits for it.
    await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT)

    async def loaded() -> bool:
        return await model_state(client) == "loaded"

    await until(loaded)
    await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT)
    status, metrics = request(serving, "GET", "/metrics")
    assert status == 200
    assert b"restarts" in metrics


async def test_too_little_memory_is_said_with_numbers(serving: World) -> None:
    serving.stop_daemon()
    serving.configure("[models]\nmemory_reserve_bytes = 1000000000000000\n")
    serving.start_daemon()
    try:
        async with connected(serving.address) as client:
            with pytest.raises(Refused) as caught:
                await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT)
            assert caught.value.name == "org.ai_assistant1.Error.OutOfMemory"
            assert "1000000000000000 stay free" in caught.value.text
            assert await client.get(ROOT, "Manager", "State") == "degraded"
    finally:
        serving.stop_daemon()
        serving.configure("[models]\nidle_unload_s = 1\n")
        serving.start_daemon()


async def test_idle_models_are_unloaded(serving: World, client: Client) -> None:
    await client.call("Inference", "Generate", "ssa{sv}", MODEL, "abc", SHORT)
    assert await model_state(client) == "loaded"
    await asyncio.sleep(1.2)

    async def unloaded() -> bool:
        return await model_state(client) == "unloaded"

    await until(unloaded, 3)
    await until(lambda: not serving.worker_pids())


async def test_stopping_lets_running_answers_finish(serving: World, endless: str) -> None:
    async with connected(serving.address) as client:
        whole, _ = await client.call("Inference", "Generate", "ssa{sv}", MODEL, endless, LONG)
        answer = asyncio.ensure_future(client.call("Inference", "Generate", "ssa{sv}", MODEL, endless, LONG))
        await asyncio.sleep(0.05)
        stopped = asyncio.ensure_future(asyncio.to_thread(serving.stop_daemon))
        text, _ = await answer
        assert text == whole
        assert await stopped == 0
    serving.start_daemon()


async def test_nothing_is_left_over(serving: World, client: Client) -> None:
    """After all of the above."""
    assert serving.alive
    assert "Traceback" not in serving.log
    assert serving.memory() < 60_000_000
