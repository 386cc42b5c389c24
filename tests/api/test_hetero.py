"""`hetero_compute` in the bodies of every endpoint: what is refused, what reaches the service, what the answer says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ai_assistant.daemon.api import openai, texts
from ai_assistant.daemon.api.rendering import usage_dict
from ai_assistant.daemon.bus.inference import parse_options
from ai_assistant.engines.contract import GenerateRequest, Usage
from ai_assistant.engines.hetero import Wish
from ai_assistant.engines.usage import together
from ai_assistant.errors import InvalidArgument
from tests.api.conftest import Api

NONSENSE = ["", " ", "on,off", "cpu,cpu", "../cpu", "x" * 1001, ",".join(f"d{n}" for n in range(17)), "cpu\0"]
OTHER: list[Any] = [True, 0, 3, 1.5, ["cpu"], {"devices": ["cpu"]}]


def _chat(value: Any) -> str | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "hetero_compute": value}
    return openai.parse_chat(body)[1].hetero_compute


def _completion(value: Any) -> str | None:
    return openai.parse_completion({"model": "m", "prompt": "x", "hetero_compute": value})[1].hetero_compute


def _text(wish: Wish | None) -> str | None:
    return None if wish is None else wish.text


PARSERS: list[Callable[[Any], str | None]] = [
    _chat,
    _completion,
    lambda value: _text(openai.parse_embeddings({"model": "m", "input": "x", "hetero_compute": value}).wish),
    lambda value: _text(
        texts.parse_rerank({"model": "m", "query": "x", "documents": ["y"], "hetero_compute": value}).wish
    ),
    lambda value: _text(texts.parse_classify({"model": "m", "input": "x", "hetero_compute": value}).wish),
]


@pytest.mark.parametrize("parse", PARSERS, ids=["chat", "completion", "embeddings", "rerank", "classify"])
def test_every_endpoint_judges_it_alike(parse: Callable[[Any], str | None]) -> None:
    for value in (*NONSENSE, *OTHER):
        with pytest.raises(InvalidArgument) as caught:
            parse(value)
        assert caught.value.param == "hetero_compute", value
    for text in ("ON", "off", "latency", "cpu,onnxruntime", "npu:0"):
        assert parse(text) == text
    assert parse(None) is None


def test_the_bus_takes_it_as_an_option() -> None:
    assert parse_options("x", {"hetero_compute": "ON"}, chat_default=True).hetero_compute == "ON"
    for value in (*NONSENSE, *OTHER):
        with pytest.raises(InvalidArgument) as caught:
            parse_options("x", {"hetero_compute": value}, chat_default=True)
        assert caught.value.param == "hetero_compute"


def test_a_request_keeps_it_on_its_way() -> None:
    request = GenerateRequest(prompt="x", hetero_compute="cpu")
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert "hetero_compute" not in GenerateRequest(prompt="x").to_dict()


def test_usage_names_devices_only_where_that_was_asked() -> None:
    assert "devices" not in usage_dict(Usage(1, 2))
    both = together([Usage(1, 2, devices=("npu", "cpu")), Usage(1, 3, devices=("npu",))])
    assert usage_dict(both)["devices"] == ["npu", "cpu"]


async def test_answers_say_what_ran(api: Api) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": "one two"}),
        ("/v1/rerank", {"query": "one", "documents": ["one"]}),
        ("/v1/classify", {"input": "one"}),
    ):
        if path != "/v1/embeddings":
            api.service.records[0] = _able(api, path.removeprefix("/v1/"))
        plain = (await api.client.post(path, json={"model": "assistant", **body})).json()
        assert "devices" not in plain["usage"]
        asked = {"model": "assistant", **body, "hetero_compute": "npu,cpu"}
        answer = await api.client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"] == {**plain["usage"], "devices": ["npu", "cpu"]}
        assert api.service.wishes[-2:] == [None, "npu,cpu"]
        wrong = await api.client.post(path, json=asked | {"hetero_compute": "on,off"})
        error = wrong.json()["error"]
        assert (wrong.status_code, error["code"], error["param"]) == (400, "InvalidArgument", "hetero_compute")
        assert error["hint"]
        assert len(api.service.wishes) % 2 == 0


async def test_a_generation_says_it_in_its_usage(api: Api) -> None:
    body = {"model": "assistant", "prompt": "one two", "hetero_compute": "ON"}
    answer = (await api.client.post("/v1/completions", json=body)).json()
    assert answer["usage"]["devices"] == ["cpu"]
    assert api.service.requests[-1].hetero_compute == "ON"
    streamed = await api.client.post(
        "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert '"devices":["cpu"]' in streamed.text.replace(" ", "")


def test_the_daemon_starts_without_the_planner() -> None:
    """Only what understands the words is there; the planner would be in every boot's time."""
    code = (
        "import sys\n"
        "from ai_assistant.daemon import app, config, service\n"
        "from ai_assistant.daemon.api import openai, texts\n"
        "from ai_assistant.daemon.bus import inference\n"
        "print([name for name in sys.modules if name.startswith('ai_assistant.hal.hetero.') or name == 'numpy'])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(json.loads(found.replace("'", '"'))) <= {"ai_assistant.hal.hetero.intent"}


def _able(api: Api, what: str) -> Any:
    from dataclasses import replace

    return replace(api.service.records[0], capabilities=(what,))
