"""What the API has beyond plain answers, by both clients and both engines: several answers, ranks, labels, tokens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ai_assistant import (
    AsyncClient,
    AsyncInferenceEngine,
    Client,
    InferenceEngine,
    InvalidArgument,
    NotSupported,
    Ranked,
)
from tests.sdk.served import Served
from tests.support.fake_service import RECORD

DOCUMENTS = ["cold", "a warm fan", "warm"]


class Blocking:
    """The asynchronous client, awaited."""

    def __init__(self) -> None:
        self._client = AsyncClient()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            async def awaited() -> Any:
                return await getattr(self._client, name)(*args, **more)

            return asyncio.run(awaited())

        return call


@pytest.fixture(params=["sync", "async"])
def client(api: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    api.service.records.append(replace(RECORD, name="ranker:1", capabilities=("rerank", "classify")))
    if request.param == "async":
        yield Blocking()
        return
    with Client() as made:
        yield made


def test_several_answers(api: Served, client: Any) -> None:
    answer = client.generate("a b c", n=3, seed=5, model="assistant")
    assert str(answer) == "a b c "
    assert [str(each) for each in answer.choices] == ["a b c "] * 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    assert [each.seed for each in api.service.requests] == [5, 6, 7]
    message = client.chat("how warm is it", n=2, model="assistant")
    assert [each.content for each in message.choices] == ["how warm is it "] * 2
    assert message.choices[0] == message


@pytest.mark.parametrize("n", [0, 9, -1, 2.0, "2"])
def test_a_wrong_number_of_answers_is_refused_before_anything_is_sent(api: Served, client: Any, n: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.chat("x", n=n, model="assistant")
    assert caught.value.param == "n"
    assert api.service.requests == []


def test_every_parameter_arrives(api: Served, client: Any) -> None:
    client.chat(
        "x", model="assistant", typical_p=0.9, repeat_penalty=1.2, repeat_last_n=16, mirostat=2, mirostat_tau=3.0,
        mirostat_eta=0.2, logit_bias={"5": -100}, priority="batch", ignore_eos=True, regex="[a-z]+", keep_alive="5m",
    )  # fmt: skip
    request = api.service.requests[0]
    assert (request.typical_p, request.repeat_penalty, request.repeat_last_n) == (0.9, 1.2, 16)
    assert (request.mirostat, request.mirostat_tau, request.mirostat_eta) == (2, 3.0, 0.2)
    assert (request.logit_bias, request.priority, request.ignore_eos) == ({"5": -100.0}, "batch", True)
    assert request.response_regex == "[a-z]+"
    assert api.service.kept == [300.0]
    client.generate("x", model="assistant", regex="[a-z]+", keep_alive=-1)
    assert api.service.requests[1].response_regex == "[a-z]+"
    assert api.service.kept[1] == math.inf


def test_rerank_classify_and_tokens(client: Any) -> None:
    ranked = client.rerank("warm fan", DOCUMENTS, model="ranker")
    assert ranked == [Ranked(1, 1.0), Ranked(2, 0.5), Ranked(0, 0.0)]
    assert client.rerank("warm fan", DOCUMENTS, model="ranker", top_n=1) == ranked[:1]
    assert client.classify(["a", "b"], model="ranker") == [[("long", 0.75), ("short", 0.25)]] * 2
    assert client.tokenize("one three", model="assistant") == [3, 5]
    assert client.detokenize([3, 5], model="assistant") == "xxx xxxxx"
    with pytest.raises(NotSupported):
        client.rerank("x", ["y"], model="assistant")
    with pytest.raises(InvalidArgument) as caught:
        client.detokenize([-1], model="assistant")
    assert caught.value.param == "tokens[0]"


def test_the_engine_has_the_same(api: Served) -> None:
    api.service.records.append(replace(RECORD, name="ranker:1", capabilities=("rerank", "classify")))
    with InferenceEngine("assistant") as engine:
        assert len(engine.generate("a b", n=2).choices) == 2
        assert len(engine.chat("a b", n=2, keep_alive=0).choices) == 2
        assert api.service.kept[-1] == 0.0
        assert engine.detokenize(engine.tokenize("one three")) == "xxx xxxxx"
    with InferenceEngine("ranker") as engine:
        assert engine.rerank("warm fan", DOCUMENTS, top_n=1) == [Ranked(1, 1.0)]
        assert engine.classify(["a"])[0][0] == ("long", 0.75)


async def test_the_asynchronous_engine_has_the_same(api: Served) -> None:
    api.service.records.append(replace(RECORD, name="ranker:1", capabilities=("rerank", "classify")))
    async with AsyncInferenceEngine("assistant") as engine:
        assert len((await engine.generate("a b", n=2)).choices) == 2
        assert await engine.detokenize(await engine.tokenize("one three")) == "xxx xxxxx"
    async with AsyncInferenceEngine("ranker") as engine:
        assert await engine.rerank("warm fan", DOCUMENTS, top_n=1) == [Ranked(1, 1.0)]
        assert (await engine.classify(["a"]))[0][0] == ("long", 0.75)
