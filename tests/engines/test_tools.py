"""Tool definitions, and calls in what a model writes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ai_assistant.engines.contract import ToolCall
from ai_assistant.engines.output import AutoCalls, ForcedCall
from ai_assistant.engines.tools import MAX_CALLS, ToolReader, check_tools, forced_grammar, parse_calls
from ai_assistant.errors import InvalidArgument

_NAMES = frozenset({"warm", "reboot"})
_WARM = '{"name": "warm", "arguments": {"unit": "C"}}'
_CALL = ToolCall("warm", '{"unit": "C"}')
_REBOOT = ToolCall("reboot", "{}")


def _tool(name: Any, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_checked_tools() -> None:
    tools = [_tool("warm"), _tool("reboot", {"type": "object"})]
    assert [each["name"] for each in check_tools(tools, "auto")] == ["warm", "reboot"]
    assert check_tools(tools, "none") == []
    required = forced_grammar(check_tools(tools, "required"), "required", parallel=False)
    assert "warm" in required
    assert "reboot" in required
    assert "warm" not in forced_grammar(check_tools(tools, "reboot"), "reboot", parallel=True)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([{"type": "magic"}], "auto", "tools[0]"),
        ([_tool(5)], "auto", "tools[0]"),
        ([_tool("")], "auto", "tools[0]"),
        ([_tool("x" * 65)], "auto", "tools[0]"),
        ([_tool("a"), _tool("a")], "auto", "tools[1]"),
        ([_tool("a", [1])], "auto", "tools[0]"),
        ([_tool("a")], "b", "tool_choice"),
        ([], "required", "tool_choice"),
        ([_tool(f"t{n}") for n in range(129)], "auto", "tools"),
    ],
)
def test_wrong_tools(tools: list[Any], choice: str, param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_tools(tools, choice)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("plain text", "plain text", ()),
        (f"<tool_call>\n{_WARM}\n</tool_call>", "", (_CALL,)),
        (f"<tool_call>{_WARM}</tool_call>\n<tool_call>{_WARM}</tool_call>\n", "", (_CALL, _CALL)),
        (f"Let me see. <tool_call>{_WARM}</tool_call>", "Let me see. ", (_CALL,)),
        (f"<tool_call>{_WARM}", "", (_CALL,)),
        (f"<tool_call>{_WARM}</tool_call> Done.", "Done.", (_CALL,)),
        (_WARM, "", (_CALL,)),
        (f"  \n{_WARM}\n", "", (_CALL,)),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', ()),
        ('{"answer": 5}', '{"answer": 5}', ()),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", ()),
        ("a < b and <tool_calm>", "a < b and <tool_calm>", ()),
        (f"I say {_WARM}", f"I say {_WARM}", ()),
        ('{"name": "warm", "arguments": "{\\"unit\\": \\"C\\"}"}', "", (_CALL,)),
        ('{"type":"function","function":{"name":"warm","parameters":{"unit":"C"}}}', "", (_CALL,)),
        ('{"name": "warm", "arg', '{"name": "warm", "arg', ()),
        # Mistral's, with the mark written out and without.
        (f"[TOOL_CALLS] [{_WARM}, {_WARM}]", "", (_CALL, _CALL)),
        (f"[{_WARM}]", "", (_CALL,)),
        ('[TOOL_CALLS]warm[ARGS]{"unit": "C"}[TOOL_CALLS]reboot{}', "", (_CALL, _REBOOT)),
        ('[TOOL_CALLS]warm[CALL_ID]a1b2[ARGS]{"unit": "C"}', "", (_CALL,)),
        ('[TOOL_CALLS]other[ARGS]{"unit": "C"}', '[TOOL_CALLS]other[ARGS]{"unit": "C"}', ()),
        # Llama's.
        ('{"name": "warm", "parameters": {"unit": "C"}}; {"name": "reboot", "parameters": {}}', "", (_CALL, _REBOOT)),
        ('<|python_tag|>{"type": "function", "name": "warm", "parameters": {"unit": "C"}}', "", (_CALL,)),
        (f"{_WARM}\n{_WARM}\n", "", (_CALL, _CALL)),
        (f"{_WARM} and that is all", f"{_WARM} and that is all", ()),
        ("[1, 2, 3]", "[1, 2, 3]", ()),
        (f"[{_WARM}, 5]", f"[{_WARM}, 5]", ()),
        (f"<tool_call>[{_WARM}, {_WARM}]</tool_call>", "", (_CALL, _CALL)),
        ("", "", ()),
    ],
)
def test_calls_in_text_wherever_it_is_cut(text: str, shown: str, calls: tuple[ToolCall, ...]) -> None:
    rng = random.Random(5)
    for _ in range(100):
        reader = ToolReader(_NAMES)
        rest, out = text, ""
        while rest:
            size = rng.randint(1, 7)
            out += reader.feed(rest[:size])
            assert shown.startswith(out)
            rest = rest[size:]
        tail, found = reader.finish()
        assert (out + tail, found) == (shown, calls)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Well. <tool_call>{_WARM}</tool_call>\n<tool_call>{_WARM}</tool_call> more", "Well. "),
        (f"[TOOL_CALLS] [{_WARM}, {_WARM}]", ""),
        (f"{_WARM}; {_WARM}", ""),
    ],
)
def test_one_call_where_only_one_may_be(text: str, shown: str) -> None:
    for size in (1, 5, 1000):
        auto = AutoCalls((), _NAMES, parallel=False)
        out = ""
        for at in range(0, len(text), size):
            out += auto.feed(text[at : at + size].encode())
            if auto.complete:
                break
        rest, calls = auto.finish()
        assert (out + rest, calls) == (shown, (_CALL,))


def test_a_model_that_calls_without_end() -> None:
    auto = AutoCalls((), _NAMES)
    for _ in range(MAX_CALLS + 5):
        auto.feed(f"<tool_call>{_WARM}</tool_call>".encode())
    assert len(auto.finish()[1]) == MAX_CALLS
    assert parse_calls(f"{_WARM};" * (MAX_CALLS + 1), _NAMES) == ()


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = ToolReader(_NAMES)
    assert reader.feed("Hello") == "Hello"
    assert reader.feed(" <") == " "
    assert reader.feed("b>") == "<b>"
    other = ToolReader(_NAMES)
    assert other.feed('{"na') == ""
    assert other.feed('tion": 1') == '{"nation": 1'


def test_a_call_that_never_ends_is_shown() -> None:
    reader = ToolReader(_NAMES)
    out = reader.feed("<tool_call>" + "x" * (300 << 10))
    assert len(out) == (300 << 10) + 11


def test_outputs() -> None:
    forced = ForcedCall(_NAMES)
    assert [forced.feed(bytes([each])) for each in _WARM.encode()] == [""] * len(_WARM)
    assert forced.complete
    assert forced.finish() == ("", (_CALL,))
    several = ForcedCall(_NAMES)
    ends = [bool(several.feed(each.encode()) or several.complete) for each in (f"[{_WARM}, ", f"{_WARM}]")]
    assert ends == [False, True]
    assert several.finish() == ("", (_CALL, _CALL))
    auto = AutoCalls(("STOP",), _NAMES)
    assert auto.feed(b"Hi STOP there") == "Hi "
    assert auto.stopped
    assert auto.finish() == ("", ())


@pytest.mark.parametrize(
    "text", ["", "5", "[]", "{", '{"name": ["warm"]}', '{"name": "warm", "arguments": [1]}', "[" * 9999]
)
def test_what_is_no_call(text: str) -> None:
    assert parse_calls(text, _NAMES) == ()


def test_arguments_come_out_as_json() -> None:
    (call,) = parse_calls('{"name": "warm", "arguments": {"text": "温度", "n": [1, {"a": null}]}}', _NAMES)
    assert json.loads(call.arguments) == {"text": "温度", "n": [1, {"a": None}]}
