from __future__ import annotations

import string
import zlib

import pytest

from ai_assistant.actions import catalogue
from ai_assistant.actions.catalogue import ACTIONS, BY_NAME, NONE, Action, Effect, Typed, Value
from ai_assistant.actions.text import UNKNOWN, mark
from ai_assistant.actions.tools import tools_for


def values_in(arguments: object) -> list[Value]:
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, Typed):
        return values_in(arguments.value)
    if isinstance(arguments, tuple):
        return [one for each in arguments for one in values_in(each)]
    return []


def test_there_are_enough_actions_with_names_of_their_own() -> None:
    assert len(ACTIONS) >= 28
    assert len(BY_NAME) == len(ACTIONS)
    assert NONE not in BY_NAME
    assert {each.name for each in ACTIONS if each.effect is Effect.CHANGE} == {
        "load_model", "unload_model", "remove_model", "set_power_profile", "set_timezone", "set_clock_sync", "reboot",
        "power_off",
    }  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS, ids=lambda each: each.name)
def test_descriptions_and_calls_use_exactly_the_parameters(action: Action) -> None:
    names = {each.name for each in action.parameters}
    for text in (action.english, action.chinese):
        assert {field for _, field, _, _ in string.Formatter().parse(text) if field} == names
    for parameter in action.parameters:
        assert bool(parameter.values) != bool(parameter.live)
    if action.call is None:
        assert action.name == "help"
        return
    used = {each.parameter for each in values_in(action.call.arguments)} | ({action.call.model} - {""})
    assert used == names
    for value in values_in(action.call.arguments):
        (parameter,) = (each for each in action.parameters if each.name == value.parameter)
        assert set(value.words) <= set(parameter.values)


@pytest.mark.parametrize("action", [each for each in ACTIONS if each.call], ids=lambda each: each.name)
def test_calls_are_valid_messages(action: Action) -> None:
    from dbus_fast import Message
    from dbus_fast.signature import get_signature_tree

    from ai_assistant.actions.bus import _packed
    from ai_assistant.actions.perform import _filled

    call = action.call
    assert call is not None
    arguments = {each.name: (each.values or ("x",))[0] for each in action.parameters}
    body = [_packed(_filled(each, arguments)) for each in call.arguments]
    message = Message(
        destination=call.service.name, path=call.service.path, interface=call.interface, member=call.member,
        signature=call.signature, body=body,
    )  # fmt: skip
    assert len(get_signature_tree(call.signature).types) == len(body)
    # Marshalling checks every value against the signature.
    assert zlib.crc32(message._marshall(False))


def test_the_fingerprint_sees_names_and_values_but_not_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    before = catalogue.fingerprint()
    first = ACTIONS[0]
    reworded = Action(first.name, "other words", "别的话", first.render, first.call)
    monkeypatch.setattr(catalogue, "ACTIONS", (reworded, *ACTIONS[1:]))
    assert catalogue.fingerprint() == before
    monkeypatch.setattr(catalogue, "ACTIONS", ACTIONS[1:])
    assert catalogue.fingerprint() != before


def test_tools_carry_only_names_that_are_in_the_question() -> None:
    question = mark("load small:1", {"model": ("small:1", "other:1"), "zone": ("Asia/Tokyo",)})
    tools = {each["function"]["name"]: each["function"]["parameters"] for each in tools_for(question)}
    assert list(tools) == [*(each.name for each in ACTIONS), NONE]
    assert tools["load_model"]["properties"] == {"model": {"enum": ["model-1", UNKNOWN]}}
    assert tools["set_timezone"]["properties"] == {"zone": {"enum": [UNKNOWN]}}
    assert tools["set_power_profile"]["properties"]["profile"]["enum"] == ["power-saver", "balanced", "performance"]
    for schema in tools.values():
        assert schema["required"] == list(schema["properties"])
        assert schema["additionalProperties"] is False


def test_tools_can_be_left_out() -> None:
    names = {each["function"]["name"] for each in tools_for(mark("x", {}), without=frozenset({"disk"}))}
    assert names == {*BY_NAME, NONE} - {"disk"}
