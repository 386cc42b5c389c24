"""The exported file in llama.cpp is the network that was trained: same tokens, same probabilities."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from ai_assistant.engines.contract import Chunk, Engine, GenerateRequest
from ai_assistant.models.recipe.cases import SETS, marked, read_cases
from tests.models.world import MODEL, engine

pytestmark = pytest.mark.engine
PARITY = MODEL.with_suffix(".parity.jsonl")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Engine]:
    with engine() as one:
        yield one


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PARITY.read_text("utf-8").splitlines()]


def test_every_hand_written_question_is_in_the_parity_file(expected: list[dict[str, Any]]) -> None:
    assert [each["text"] for each in expected] == [marked(one).text for name in SETS for one in read_cases(name)]


def test_llama_cpp_splits_every_question_as_the_tokenizer_of_the_training_did(
    loaded: Engine, expected: list[dict[str, Any]]
) -> None:
    for each in expected:
        # <|user|> question <|end|> <|assistant|>: the question alone is what can be split differently.
        assert loaded.tokenize(each["text"]) == each["tokens"][1:-2], each["text"]


def test_llama_cpp_finds_the_same_calls_as_likely(loaded: Engine, expected: list[dict[str, Any]]) -> None:
    differences: list[float] = []
    for each in expected:
        request = GenerateRequest(
            messages=({"role": "user", "content": each["text"]},), max_tokens=1, temperature=0, logprobs=20
        )
        found: dict[str, float] = {}
        for event in loaded.generate(request):
            if isinstance(event, Chunk):
                for token in event.logprobs:
                    found |= {one.token: one.logprob for one in (token, *token.top)}
        for name, logprob in each["calls"].items():
            wanted = math.exp(logprob)
            if wanted > 0.01:
                differences.append(abs(math.exp(found[f'{{"name": "{name}", "arguments": {{']) - wanted))
    assert len(differences) >= len(expected)
    # The weights were rounded to 8 bits, so single values move a little; a wrong layout would move them all.
    assert sum(differences) / len(differences) < 0.01
    assert max(differences) < 0.2
