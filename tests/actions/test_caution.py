from __future__ import annotations

import pytest

from ai_assistant.actions.ask import Asker
from ai_assistant.actions.catalogue import BY_NAME, Effect
from ai_assistant.actions.caution import forbidden
from ai_assistant.actions.text import normalise
from ai_assistant.errors import Unsure
from ai_assistant.models.recipe.cases import SETS, marked, read_cases
from tests.actions.fakes import FakeBus, FakeModel


@pytest.mark.parametrize(
    "question",
    [
        "Don't reboot!", "please do not restart", "you must never shut down", "I'd rather not reboot", "不要重启",
        "请别关机", "千万别删除它", "切勿断电", "what would happen if you rebooted?", "why reboot",
        "should I restart it", "how do I reboot", "如果重启会怎样", "怎么关机", "要不要重启", "did you reboot",
        "reboot instead of shutting down",
    ],
)  # fmt: skip
def test_forbidding_and_asking_are_no_orders(question: str) -> None:
    assert forbidden("reboot", normalise(question))


@pytest.mark.parametrize(
    "question",
    [
        "reboot", "restart the machine now", "can you reboot yourself now", "重启一下", "特别慢，重启吧",
        "不需要它了，关机", "I don't need it any more, switch off", "notify nobody and reboot", "识别不了，重启",
    ],
)  # fmt: skip
def test_orders_are_not_forbidden(question: str) -> None:
    assert not forbidden("reboot", normalise(question))


def test_what_leaves_memory_is_not_deleted() -> None:
    assert forbidden("remove_model", "remove model-1 from memory")
    assert forbidden("remove_model", "把 model-1 从内存里移除")
    assert not forbidden("remove_model", "remove model-1 from disk")
    assert not forbidden("unload_model", "remove model-1 from memory")


def test_it_stands_in_the_way_of_few_real_orders() -> None:
    changes = [
        (case, forbidden(case.action, marked(case).text))
        for name in SETS
        for case in read_cases(name)
        if case.action in BY_NAME and BY_NAME[case.action].effect is Effect.CHANGE
    ]
    assert len(changes) > 50
    assert sum(stopped for _, stopped in changes) <= len(changes) // 20


async def test_a_certain_model_is_overruled() -> None:
    model = FakeModel(("reboot", {}, 0.999), ("uptime", {}, 0.1))
    with pytest.raises(Unsure):
        await Asker(model, FakeBus()).propose("do not reboot")


async def test_reading_is_never_forbidden() -> None:
    asker = Asker(FakeModel(("failed_units", {}, 0.99)), FakeBus())
    assert (await asker.propose("why don't the services start")).action == "failed_units"
