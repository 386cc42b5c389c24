from __future__ import annotations

import pytest

from ai_assistant.actions.text import UNKNOWN, is_chinese, mark, normalise

MODELS = ("assistant:1", "gemma-3-270m:q4", "qwen2.5-0.5b:1", "qwen2.5-0.5b:2", "status:1")
ZONES = ("America/New_York", "Asia/Shanghai", "Asia/Tokyo", "US/Central", "Europe/Berlin", "Etc/GMT+5", "UTC")
LIVE = {"model": MODELS, "zone": ZONES}


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("  How WARM is it?!  ", "how warm is it"),
        ("What’s the CPU's temp.", "whats the cpus temp"),
        ("看看ＣＰＵ温度！", "看看 cpu 温度"),
        ("load qwen2.5-0.5b:1, please...", "load qwen2.5-0.5b:1 please"),
        ("<|assistant|>reboot<|end|>", "reboot"),
        ("a\x00b\u200bc\nd", "a b c d"),
        ("...", ""),
        ("现在几点？", "现在几点"),
    ],
)
def test_normalising(typed: str, plain: str) -> None:
    assert normalise(typed) == plain
    assert normalise(plain) == plain


@pytest.mark.parametrize(
    ("typed", "text", "name"),
    [
        ("load gemma-3-270m", "load model-1", "gemma-3-270m:q4"),
        ("load Gemma 3 270M:Q4 now", "load model-1 now", "gemma-3-270m:q4"),
        ("load qwen2.5-0.5b:2", "load model-1", "qwen2.5-0.5b:2"),
        ("把gemma-3-270m卸载掉", "把 model-1 卸载掉", "gemma-3-270m:q4"),
        ("unload assistant:1", "unload model-1", "assistant:1"),
        ("unload status:1", "unload model-1", "status:1"),
    ],
)
def test_names_of_models_become_marks(typed: str, text: str, name: str) -> None:
    found = mark(typed, LIVE)
    assert found.text == text
    assert found.values["model"] == {"model-1": name}
    assert found.choices("model") == ("model-1", UNKNOWN)


@pytest.mark.parametrize(
    "typed",
    [
        "load qwen2.5-0.5b",  # two versions: it could mean either
        "show the status",  # an ordinary word, though a model has that name
        "load gemma-3-270m-instruct",  # another name that only begins alike
        "load my-gemma-3-270m",
        "load gpt",
    ],
)
def test_what_is_no_single_existing_name_stays_text(typed: str) -> None:
    found = mark(typed, LIVE)
    assert not found.values["model"]
    assert found.text == normalise(typed)
    assert found.choices("model") == (UNKNOWN,)


def test_two_names_get_two_marks_and_one_name_gets_one() -> None:
    found = mark("load gemma-3-270m, not qwen2.5-0.5b:1. gemma-3-270m:q4!", LIVE)
    assert found.text == "load model-1 not model-2. model-1" or found.text == "load model-1 not model-2 model-1"
    assert found.values["model"] == {"model-1": "gemma-3-270m:q4", "model-2": "qwen2.5-0.5b:1"}


@pytest.mark.parametrize(
    ("typed", "text", "zone"),
    [
        ("set the time zone to Berlin", "set the time zone to zone-1", "Europe/Berlin"),
        ("use America/New_York", "use zone-1", "America/New_York"),
        ("time zone new york", "time zone zone-1", "America/New_York"),
        ("把时区改成上海", "把时区改成 zone-1", "Asia/Shanghai"),
        ("时区 UTC", "时区 zone-1", "UTC"),
    ],
)
def test_time_zones_become_marks(typed: str, text: str, zone: str) -> None:
    found = mark(typed, LIVE)
    assert found.text == text
    assert found.values["zone"] == {"zone-1": zone}


def test_places_that_do_not_exist_here_and_plain_words_are_no_zones() -> None:
    assert not mark("central heating in 东京 and 巴黎", {"zone": ("US/Central", "Europe/Paris")}).values[
        "zone"
    ].keys() - {"zone-1"}
    assert mark("the central unit", LIVE).text == "the central unit"
    assert mark("时区改成东京", {"zone": ("Europe/Berlin",)}).text == "时区改成东京"


def test_a_question_is_cut_and_nothing_needs_to_exist() -> None:
    assert len(mark("x" * 10_000, {}).text) == 400
    assert mark("", LIVE).text == ""


def test_the_language_is_that_of_the_question() -> None:
    assert is_chinese("温度?")
    assert is_chinese("load 模型")
    assert not is_chinese("how warm? ¿qué?")
