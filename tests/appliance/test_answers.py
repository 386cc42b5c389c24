"""Every way that a client has of asking the booted appliance gives an answer."""

from __future__ import annotations

import json
import subprocess

import pytest

from image.container import Container
from tests.appliance.conftest import OVERLAY

pytestmark = pytest.mark.appliance

MODEL = "assistant:1"
OPENAI = f"""
import sys
sys.path.insert(0, "{OVERLAY}")
import httpx, openai
client = openai.OpenAI(base_url="http://localhost/v1", api_key="unused", http_client=httpx.Client(
    transport=httpx.HTTPTransport(uds="/run/ai-assistant/api.sock")))
assert "{MODEL}" in [each.id for each in client.models.list()]
whole = client.chat.completions.create(
    model="{MODEL}", messages=[{{"role": "user", "content": "how warm is it?"}}], temperature=0, max_tokens=40)
assert whole.choices[0].message.content and whole.usage.completion_tokens > 0, whole
pieces = list(client.chat.completions.create(
    model="{MODEL}", messages=[{{"role": "user", "content": "how warm is it?"}}], temperature=0, max_tokens=40,
    stream=True))
streamed = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
assert streamed == whole.choices[0].message.content, (streamed, whole)
schema = {{
    "type": "object", "properties": {{"sure": {{"type": "boolean"}}}}, "required": ["sure"],
    "additionalProperties": False}}
shaped = client.chat.completions.create(
    model="{MODEL}", messages=[{{"role": "user", "content": "are you sure?"}}], max_tokens=40,
    response_format={{"type": "json_schema", "json_schema": {{"name": "sure", "schema": schema}}}})
import json
assert isinstance(json.loads(shaped.choices[0].message.content)["sure"], bool)
try:
    client.chat.completions.create(model="nobody:1", messages=[{{"role": "user", "content": "hi"}}])
except openai.NotFoundError as error:
    assert error.code == "NoSuchModel", error.body
else:
    raise SystemExit("an unknown model answered")
print(streamed)
"""
SDK = f"""
from ai_assistant import InferenceEngine
with InferenceEngine("{MODEL}") as engine:
    assert engine.backend == "daemon"
    answer = engine.generate("how warm is it?", max_tokens=40, temperature=0)
    pieces = list(engine.stream("how warm is it?", max_tokens=40, temperature=0))
with InferenceEngine(model_path="/usr/lib/ai-assistant/models/assistant/1/model.gguf") as engine:
    assert engine.backend == "daemon"
    transient = engine.generate("how warm is it?", max_tokens=40, temperature=0)
assert answer.text and "".join(pieces) == answer.text == transient.text, (answer, pieces, transient)
print(answer.text)
"""


def test_busctl_shows_the_tree(appliance: Container) -> None:
    tree = appliance.run("busctl", "tree", "--list", "org.ai_assistant1").stdout
    assert "/org/ai_assistant1/models/" in tree


def test_busctl_generates(appliance: Container) -> None:
    answer = appliance.run(
        "busctl",
        "call",
        "--json=short",
        "--timeout=60",
        "org.ai_assistant1",
        "/org/ai_assistant1",
        "org.ai_assistant1.Inference",
        "Generate",
        "ssa{sv}",
        MODEL,
        "how warm is it?",
        "2",
        "max_tokens",
        "i",
        "40",
        "temperature",
        "d",
        "0",
        user="developer",
    ).stdout
    text, usage = json.loads(answer)["data"]
    assert text.strip()
    assert usage["completion_tokens"]["data"] > 0


def test_curl_on_the_socket(appliance: Container) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "how warm is it?"}], "max_tokens": 40})
    answer = appliance.run(
        "curl",
        "--silent",
        "--fail-with-body",
        "--unix-socket",
        "/run/ai-assistant/api.sock",
        "--json",
        body,
        "http://localhost/v1/chat/completions",
        user="developer",
    ).stdout
    assert json.loads(answer)["choices"][0]["message"]["content"]


def test_curl_from_the_host(appliance: Container) -> None:
    done = subprocess.run(
        ["curl", "--silent", "--fail", "--unix-socket", appliance.api_socket, "http://localhost/health"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["status"] == "ok"


def test_the_bus_from_the_host(appliance: Container) -> None:
    done = subprocess.run(
        [
            "busctl",
            f"--address={appliance.bus_address}",
            "get-property",
            "org.ai_assistant1",
            "/org/ai_assistant1",
            "org.ai_assistant1.Manager",
            "State",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == 's "running"'


def test_the_openai_client(appliance: Container) -> None:
    assert appliance.run("python3", "-c", OPENAI, user="developer").stdout.strip()


def test_the_sdk(appliance: Container) -> None:
    assert appliance.run("python3", "-c", SDK, user="developer").stdout.strip()


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("how much memory is free?", ("memory", "B")),
        ("还有多少磁盘空间？", ("磁盘", "B")),
        ("which models are there?", (MODEL,)),
    ],
)
def test_ask_performs_the_action_over_the_bus(appliance: Container, question: str, words: tuple[str, ...]) -> None:
    answer = appliance.run("ai-assistant", "ask", question, user="developer").stdout
    for word in words:
        assert word in answer


def test_ask_does_not_change_the_system_without_a_yes(appliance: Container) -> None:
    refused = appliance.run("ai-assistant", "ask", "reboot now", user="developer", check=False)
    assert refused.returncode != 0
    assert "--yes" in refused.stderr
    appliance.run("ai-assistant", "status")


def test_ask_refuses_what_is_not_its_business(appliance: Container) -> None:
    refused = appliance.run(
        "ai-assistant", "ask", "who won the football world cup in 1998?", user="developer", check=False
    )
    assert refused.returncode != 0
    assert refused.stderr.strip()


def test_status_as_json(appliance: Container) -> None:
    status = json.loads(appliance.run("ai-assistant", "status", "--json").stdout)
    assert status["state"] == "running"
    assert status["profile"] == "developer"
    assert status["memory_total_bytes"] > 2**28
