"""The data that the model is trained on: what the phrase files say fits the catalogue, and never the test set."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from ai_assistant.actions.catalogue import ACTIONS, BY_NAME, NONE
from ai_assistant.actions.text import UNKNOWN, normalise
from ai_assistant.models.recipe.cases import LIVE, SETS, Answer, Case, Score, marked, read_cases, refused
from ai_assistant.models.recipe.data import Generator, sections, target
from ai_assistant.models.recipe.phrases import FOLDER, Expander, parse, read_sections, read_slots

SAMPLES = 20_000


@pytest.fixture(scope="module")
def samples() -> list[tuple[str, dict[str, object]]]:
    return [(each.text, json.loads(each.answer)) for each in itertools.islice(Generator(3), SAMPLES)]


def expanded(pattern: str, seed: int = 0, **slots: str) -> str:
    expander = Expander(random.Random(seed), {key: [parse(value)] for key, value in slots.items()})
    return expander.expand(parse(pattern))


def test_a_pattern_picks_parts_and_fills_slots() -> None:
    found = {expanded("a (b|c (d|)) {x}|e", seed, x="1") for seed in range(60)}
    assert found == {"a b 1|e", "a c d 1|e", "a c 1|e"}


@pytest.mark.parametrize("pattern", ["a (b", "a b) c", "((a)"])
def test_unbalanced_patterns_are_errors(pattern: str) -> None:
    with pytest.raises(ValueError, match="unbalanced"):
        parse(pattern)


def test_a_line_that_is_no_phrase_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("@ status\nq: fine\nx: what\n")
    with pytest.raises(ValueError, match=r"x\.txt:3"):
        read_sections(path)


def test_every_slot_that_is_used_exists() -> None:
    expander = Expander(random.Random(1), read_slots(FOLDER / "slots.txt"))
    for section in sections():
        for _, pattern in section.lines:
            for _ in range(20):
                expander.expand(pattern)


def test_every_action_and_every_fixed_value_has_phrases_in_both_languages() -> None:
    told: dict[tuple[str, str], set[bool]] = {}
    for section in sections():
        key = (section.action, json.dumps(section.arguments))
        told.setdefault(key, set()).update(kind.startswith("z") for kind, _ in section.lines)
    wanted = {(NONE, "{}")}
    for action in ACTIONS:
        if not action.parameters:
            wanted.add((action.name, "{}"))
        for parameter in action.parameters:
            wanted |= {(action.name, json.dumps({parameter.name: each})) for each in parameter.values or ("?",)}
    assert told.keys() == wanted
    assert all(languages == {True, False} for languages in told.values())


def test_a_seed_gives_the_same_sentences() -> None:
    first, again, other = (list(itertools.islice(Generator(seed), 200)) for seed in (8, 8, 9))
    assert first == again != other


def test_answers_are_calls_of_the_catalogue(samples: list[tuple[str, dict[str, object]]]) -> None:
    for _, call in samples:
        assert list(call) == ["name", "arguments"]
        arguments = call["arguments"]
        assert isinstance(arguments, dict)
        action = BY_NAME.get(str(call["name"]))
        parameters = action.parameters if action else ()
        assert arguments.keys() == {each.name for each in parameters}
        for each in parameters:
            assert arguments[each.name] in (each.values or (f"{each.live}-1", UNKNOWN))


def test_a_named_model_is_in_the_sentence(samples: list[tuple[str, dict[str, object]]]) -> None:
    for text, call in samples:
        if call["arguments"] == {"model": "model-1"}:
            assert "model-1" in text.lower()


def test_no_held_out_question_is_trained_on(samples: list[tuple[str, dict[str, object]]]) -> None:
    questions = {normalise(each.text) for name in SETS for each in read_cases(name)}
    assert not questions & {normalise(text) for text, _ in samples}


def test_sentences_vary_and_refusals_are_a_good_part(samples: list[tuple[str, dict[str, object]]]) -> None:
    assert len({text for text, _ in samples}) > 0.95 * SAMPLES
    counts = Counter(str(call["name"]) for _, call in samples)
    assert 0.3 < counts[NONE] / SAMPLES < 0.45
    assert min(counts[each.name] for each in ACTIONS) > SAMPLES / 200


def test_targets_have_the_spacing_of_the_grammar() -> None:
    assert target("log", {"priority": "err"}) == '{"name": "log", "arguments": {"priority": "err"}}'


def test_the_test_set_is_large_and_broad() -> None:
    cases = read_cases("test")
    assert len(cases) >= 150
    assert sum(each.action == NONE for each in cases) >= 40
    assert {each.language for each in cases} == {"en", "zh"}
    assert {each.action for each in cases} == {NONE, *BY_NAME}
    assert not {normalise(each.text) for each in cases} & {normalise(each.text) for each in read_cases("dev")}


def test_the_wanted_answers_exist() -> None:
    for case in (one for name in SETS for one in read_cases(name)):
        for parameter in BY_NAME[case.action].parameters if case.action != NONE else ():
            assert case.arguments[parameter.name] in (*parameter.values, *LIVE.get(parameter.live, ()), UNKNOWN)
        for kind in ("model", "zone"):
            if case.arguments.get(kind) not in (None, UNKNOWN):
                assert case.arguments[kind] in marked(case).values[kind].values(), case.text


def test_scores_tell_wrong_from_refused() -> None:
    asked = Case("how warm is it", "en", "temperature", {})
    other = Case("write a poem", "en", NONE, {})
    score = Score()
    for case, answer in (
        (asked, Answer("temperature", {}, 0.99)),
        (asked, Answer("temperature", {}, 0.3)),
        (asked, Answer("reboot", {}, 0.999)),
        (other, Answer(NONE, {}, 0.5)),
        (other, Answer("disk", {}, 0.99)),
    ):
        score.add(case, answer, declined=refused(answer, case.text))
    assert score.summary() == {
        "questions": 5, "accuracy": 0.3333, "refused_in_scope": 0.3333, "refused_out_of_scope": 0.5, "wrong": 0.4,
        "wrong_changes": 1,
    }  # fmt: skip


def test_a_change_needs_more_certainty_and_a_name_that_exists() -> None:
    assert not refused(Answer("disk", {}, 0.82), "disk")
    assert refused(Answer("reboot", {}, 0.82), "reboot")
    assert refused(Answer("load_model", {"model": UNKNOWN}, 1.0), "load it")
    assert refused(Answer("reboot", {}, 1.0), "do not reboot")
