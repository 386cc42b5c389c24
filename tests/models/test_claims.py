"""The claims of the model card, measured on the committed file through the engine, the grammar and the Asker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ai_assistant.actions.catalogue import NONE
from ai_assistant.engines.contract import Engine
from ai_assistant.errors import InvalidArgument, Unsure
from ai_assistant.models.recipe.cases import SETS, Answer, Score, read_cases
from tests.models.card import claims
from tests.models.world import asker, engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def loaded() -> Iterator[Engine]:
    with engine() as one:
        yield one


async def measured(loaded: Engine, name: str) -> Score:
    score, one = Score(), asker(loaded)
    for case in read_cases(name):
        try:
            proposal = await one.propose(case.text)
        except Unsure:
            score.add(case, Answer(NONE, {}, 1.0), declined=True)
        else:
            answer = Answer(proposal.action, proposal.arguments, proposal.confidence)
            score.add(case, answer, declined=False)
    return score


@pytest.mark.parametrize("name", SETS)
def test_the_figures_of_the_card_hold(loaded: Engine, name: str) -> None:
    summary = asyncio.run(measured(loaded, name)).summary()
    print(name, json.dumps(summary))
    claimed = claims(name)
    assert summary["questions"] == claimed["questions"]
    # Rounding differs between processors' kernels: one question more or less is no broken claim.
    slack = 1.5 / float(claimed["questions"])
    assert summary["accuracy"] >= claimed["accuracy"] - 1.5 * slack
    assert summary["refused_out_of_scope"] >= claimed["refused_out_of_scope"] - 2 * slack
    assert summary["wrong"] <= claimed["wrong"] + slack
    assert summary["wrong_changes"] <= claimed["wrong_changes"]


def test_wrong_actions_are_rare_whatever_the_card_says(loaded: Engine) -> None:
    score = asyncio.run(measured(loaded, "test"))
    assert score.wrong / score.questions <= 0.02, score.mistakes
    assert score.wrong_changes == 0, score.mistakes
    assert score.right / score.in_scope >= 0.90


@pytest.mark.parametrize(
    ("question", "action", "arguments"),
    [
        ("how warm is it?", "temperature", {}),
        ("现在温度是多少？", "temperature", {}),
        ("load qwen2.5-0.5b", "load_model", {"model": "qwen2.5-0.5b:1"}),
        ("加载 QWEN2.5-0.5B:1", "load_model", {"model": "qwen2.5-0.5b:1"}),
        ("set the time zone to Berlin", "set_timezone", {"zone": "Europe/Berlin"}),
        ("switch to performance mode", "set_power_profile", {"profile": "performance"}),
    ],
)
def test_known_questions_become_the_right_call(
    loaded: Engine, question: str, action: str, arguments: dict[str, Any]
) -> None:
    proposal = asyncio.run(asker(loaded).propose(question))
    assert (proposal.action, proposal.arguments) == (action, arguments)


@pytest.mark.parametrize("question", ["load llama-9000", "delete the model", "加载那个模型", "unload gpt-5"])
def test_a_name_that_does_not_exist_is_never_invented(loaded: Engine, question: str) -> None:
    with pytest.raises(Unsure):
        asyncio.run(asker(loaded).propose(question))


@pytest.mark.parametrize("question", ["x" * 100_000, "🙂" * 500, "<|assistant|>" * 50 + "hi", "\x00\x01 \udc80", "¿?!"])
def test_odd_questions_end_in_a_named_refusal(loaded: Engine, question: str) -> None:
    with pytest.raises((Unsure, InvalidArgument)):
        asyncio.run(asker(loaded).propose(question))
