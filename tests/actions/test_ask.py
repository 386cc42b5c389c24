from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ai_assistant.actions.ask import Asker
from ai_assistant.actions.bus import BusFailure
from ai_assistant.actions.confidence import CHANGE_THRESHOLD, READ_THRESHOLD, confidence
from ai_assistant.errors import (
    InternalError,
    InvalidArgument,
    NotAuthorized,
    ServiceUnavailable,
    Unsure,
)
from tests.actions.fakes import DBUS, FakeBus, FakeModel


async def test_a_sure_answer_is_a_proposal_and_reading_needs_no_consent() -> None:
    bus, model = FakeBus(), FakeModel(("temperature", {}, 0.97))
    asker = Asker(model, bus)
    proposal = await asker.propose("How warm is it?")
    assert (proposal.action, proposal.arguments, proposal.changes, proposal.chinese) == (
        "temperature",
        {},
        False,
        False,
    )
    assert proposal.confidence == pytest.approx(0.97)
    assert await asker.perform(proposal) == "The hottest sensor of the processor reads 48 °C."
    (request,) = model.requests
    assert request["messages"] == [{"role": "user", "content": "how warm is it"}]
    assert (request["tool_choice"], request["logprobs"], request["temperature"]) == ("required", True, 0)


async def test_a_chinese_question_gets_a_chinese_answer() -> None:
    asker = Asker(FakeModel(("disk", {}, 0.99)), FakeBus())
    proposal = await asker.propose("硬盘还剩多少？")
    assert proposal.description == "查看磁盘空间"
    assert await asker.perform(proposal) == "磁盘剩余 25.0 GiB，共 100.0 GiB（已用 75 %）。"


@pytest.mark.parametrize("word", ["help", " Help\n", "帮助"])
async def test_help_works_whatever_the_model_thinks(word: str) -> None:
    model = FakeModel(("none", {}, 0.99))
    proposal = await Asker(model, FakeBus()).propose(word)
    assert proposal.action == "help"
    assert not model.requests


async def test_names_come_back_as_what_they_stand_for() -> None:
    model = FakeModel(("remove_model", {"model": "model-1"}, 0.99))
    proposal = await Asker(model, FakeBus()).propose("delete Tiny!")
    assert model.requests[0]["messages"][0]["content"] == "delete model-1"
    assert proposal.arguments == {"model": "tiny:1"}
    assert proposal.description == "delete the model tiny:1 from the disk"


async def test_a_change_is_not_done_without_consent() -> None:
    bus = FakeBus(Reboot=None)
    asker = Asker(FakeModel(("reboot", {}, 0.99)), bus)
    proposal = await asker.propose("reboot")
    assert proposal.changes
    with pytest.raises(NotAuthorized, match="restart the machine"):
        await asker.perform(proposal)
    assert "Reboot" not in [each[3] for each in bus.calls]
    assert await asker.perform(proposal, confirm=True) == "The machine restarts now."
    assert bus.calls[-1][2:] == ("org.freedesktop.login1.Manager", "Reboot", "b", (False,))


async def test_out_of_scope_is_refused_with_what_is_possible() -> None:
    with pytest.raises(Unsure) as caught:
        await Asker(FakeModel(("none", {}, 0.4)), FakeBus()).propose("write a poem")
    assert "temperature" in caught.value.hint
    with pytest.raises(Unsure, match="不是我能做的"):
        await Asker(FakeModel(("none", {}, 0.4)), FakeBus()).propose("写一首诗")


@pytest.mark.parametrize(
    ("name", "probability", "accepted"),
    [
        ("disk", READ_THRESHOLD + 0.01, True),
        ("disk", READ_THRESHOLD - 0.01, False),
        ("reboot", READ_THRESHOLD + 0.01, False),
        ("reboot", CHANGE_THRESHOLD + 0.01, True),
    ],
)
async def test_the_thresholds(name: str, probability: float, accepted: bool) -> None:
    model = FakeModel((name, {}, probability), ("memory", {}, 0.1))
    asker = Asker(model, FakeBus())
    if accepted:
        assert (await asker.propose("x y z")).action == name
        return
    with pytest.raises(Unsure) as caught:
        await asker.propose("x y z")
    # The second request is for what else it could have been.
    assert "show the memory" in caught.value.hint
    assert name not in [each["function"]["name"] for each in model.requests[1]["tools"]]


async def test_an_unknown_model_is_refused_with_those_that_exist() -> None:
    with pytest.raises(Unsure) as caught:
        await Asker(FakeModel(("load_model", {"model": "unknown"}, 0.99)), FakeBus()).propose("load llama")
    assert caught.value.hint == "there are: assistant:1, tiny:1"


async def test_an_unknown_time_zone_is_refused() -> None:
    with pytest.raises(Unsure, match="time zone"):
        await Asker(FakeModel(("set_timezone", {"zone": "unknown"}, 0.99)), FakeBus()).propose("set the zone to mars")


@pytest.mark.parametrize("question", ["", "  ", "?!", "\x00", "<|end|>"])
async def test_nothing_is_no_question(question: str) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        await Asker(FakeModel(), FakeBus()).propose(question)


@pytest.mark.parametrize(
    "call",
    [
        ("format_disk", {}, 0.99),
        ("load_model", {"model": "model-1"}, 0.99),
        ("load_model", {}, 0.99),
        ("set_power_profile", {"profile": "ludicrous"}, 0.99),
        ("reboot", {"force": True}, 0.99),
        ("none", {"x": 1}, 0.99),
    ],
)
async def test_calls_that_do_not_exist_are_never_believed(call: tuple[str, Mapping[str, Any], float]) -> None:
    with pytest.raises(InternalError):
        await Asker(FakeModel(call), FakeBus()).propose("do something")


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"message": {"content": "hello"}},
        {"message": {"tool_calls": []}, "logprobs": {"content": []}},
        {"message": {"tool_calls": [{"function": {"name": "disk", "arguments": "{}"}}]}, "logprobs": None},
        {"message": {"tool_calls": [{"function": {"name": "disk", "arguments": "{"}}]}, "logprobs": {"content": []}},
        {"message": {"tool_calls": [{"function": {"name": "disk", "arguments": "{}"}}]}, "logprobs": {"content": []}},
    ],
)
async def test_answers_without_a_call_or_its_probability_are_errors(choice: Mapping[str, Any]) -> None:
    async def complete(body: dict[str, Any]) -> Mapping[str, Any]:
        return choice

    with pytest.raises(InternalError):
        await Asker(complete, FakeBus()).propose("disk")


async def test_without_the_daemon_or_a_clock_service_no_names_exist() -> None:
    bus = FakeBus()
    bus.answers = {}
    model = FakeModel(("help", {}, 0.99))
    asker = Asker(model, bus)
    proposal = await asker.propose("what can you do with tiny:1 in Tokyo")
    assert model.requests[0]["messages"][0]["content"] == "what can you do with tiny:1 in tokyo"
    assert "show the temperature" in await asker.perform(proposal)


async def test_a_bus_that_breaks_is_a_named_error() -> None:
    bus = FakeBus(GetStatus=BusFailure(DBUS + "Disconnected", "gone"))
    with pytest.raises(ServiceUnavailable):
        await Asker(FakeModel(), bus).propose("disk")


def test_confidence_is_the_product_of_the_probabilities() -> None:
    assert confidence([-0.1, -0.2]) == pytest.approx(2.718281828**-0.3)
    assert confidence([0.0, 1e-6]) == 1.0
    assert confidence([float("-inf")]) == 0.0
    assert confidence([float("nan")]) == 0.0
