"""Tools: how a model is told of them, how a call is enforced, and how one is found in what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ai_assistant.engines.contract import ToolCall
from ai_assistant.engines.grammar import call_grammar
from ai_assistant.errors import InvalidArgument

MAX_TOOLS = 128
MAX_NAME = 64
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_OBJECTS = ('{"name":', '{"arguments":', '{"parameters":', '{"function":', '{"type":"function"')
_MARKS = ("[TOOL_CALLS]", "<|python_tag|>")
"""What Mistral's and Llama's models write before calls; where these are control tokens they are not seen at all."""
_BARE = (*_OBJECTS, *(f"[{each}" for each in _OBJECTS), *_MARKS)
_BETWEEN = re.compile(r"(?:[\s,;]|\[TOOL_CALLS\]|<\|python_tag\|>)*")
_NAMED = re.compile(r"([A-Za-z_][\w.-]{0,63})\s*(?:\[CALL_ID\]\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
MAX_CALLS = 64
"""In one answer; more is a model that repeats itself."""
_MAX_CALL = 256 << 10
"""Text that is still no call after this much is shown as text."""


def check_tools(tools: Sequence[Mapping[str, Any]], choice: str) -> list[Mapping[str, Any]]:
    """The `function` objects of OpenAI tool definitions; [] when `choice` is "none".

    Raises:
        InvalidArgument: a definition or the choice is wrong, with its place.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidArgument(f"there are {len(tools)} tools, more than {MAX_TOOLS}", param="tools")
    functions: list[Mapping[str, Any]] = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise InvalidArgument(f"{where} is not of type function", param=where)
        name = function.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise InvalidArgument(f"{where}.function.name must be 1 to {MAX_NAME} characters", param=where)
        if name in names:
            raise InvalidArgument(f"two tools are called {name!r}", param=where)
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise InvalidArgument(f"{where}.function.parameters must be a JSON schema", param=where)
        names.add(name)
        functions.append(function)
    if choice == "none":
        return []
    if choice == "required" and not functions:
        raise InvalidArgument("tool_choice is required, but there are no tools", param="tool_choice")
    if choice not in ("auto", "required") and choice not in names:
        raise InvalidArgument(f"tool_choice names the unknown tool {choice[:80]!r}", param="tool_choice")
    return functions


def forced_grammar(functions: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool) -> str:
    """The grammar of what `choice` forces: one call of a named function; of any, or a list of such, for "required"."""
    wanted = [each for each in functions if choice in ("required", each["name"])]
    return call_grammar(wanted, parallel=parallel and choice == "required")


def describe(functions: Sequence[Mapping[str, Any]]) -> str:
    """System text that tells of the tools, for templates that do not do it themselves."""
    lines = [json.dumps({"type": "function", "function": each}, ensure_ascii=False) for each in functions]
    return (
        "You may call one or more of these functions to help with the user's request:\n<tools>\n"
        + "\n".join(lines)
        + "\n</tools>\nTo call a function, write its name and arguments as a JSON object inside tags:\n"
        '<tool_call>\n{"name": "<function name>", "arguments": {<arguments>}}\n</tool_call>'
    )


def parse_calls(text: str, names: frozenset[str]) -> tuple[ToolCall, ...]:
    """The calls that a text consists of; () if it is anything else as well.

    Known are JSON objects with a name and arguments or parameters, alone, one after the other, or in a list; behind
    `[TOOL_CALLS]` or `<|python_tag|>`; and `name[ARGS]{…}`.
    """
    calls: list[ToolCall] = []
    decoder = json.JSONDecoder()
    at = 0
    while found := _BETWEEN.match(text, at):
        at = found.end()
        if at == len(text):
            return tuple(calls)
        name = _NAMED.match(text, at)
        if name is not None:
            at = name.end()
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return ()
        entries = value if isinstance(value, list) and name is None else [value]
        for entry in entries:
            call = _call_of({"name": name[1], "arguments": entry} if name is not None else entry, names)
            if call is None:
                return ()
            calls.append(call)
        if not entries or len(calls) > MAX_CALLS:
            return ()
    return ()


def _call_of(value: Any, names: frozenset[str]) -> ToolCall | None:
    """The call that an object describes, or None if it is none of a known tool."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        # Some models quote the object once more.
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None


class ToolReader:
    """Finds calls in text that arrives in pieces, and lets everything else through as early as possible."""

    def __init__(self, names: frozenset[str], *, parallel: bool = True) -> None:
        self._names = names
        self._parallel = parallel
        self._held = ""
        self._calls: list[ToolCall] = []
        self._begun = False
        """Something was shown, so a bare object no longer counts as a call."""
        self._after_call = False
        """Blank space that follows a call belongs to it."""

    @property
    def complete(self) -> bool:
        """The one call that may be there is; what follows it does not count."""
        return bool(self._calls) and not self._parallel

    def feed(self, text: str) -> str:
        """What may be shown now."""
        if self.complete:
            return ""
        self._held += text
        shown = ""
        while self._held:
            piece, wait = self._next()
            shown += piece
            if wait:
                break
        if shown.strip():
            self._begun = True
        return shown

    def _next(self) -> tuple[str, bool]:
        """The next piece to show, and whether more text is needed to go on."""
        if self._after_call:
            self._held = self._held.lstrip()
        held = self._held
        at = held.find(_OPEN)
        if at == 0:
            end = held.find(_CLOSE)
            if end < 0:
                return ("", True) if len(held) <= _MAX_CALL else (self._take(len(held)), False)
            calls = parse_calls(held[len(_OPEN) : end], self._names)
            whole = self._take(end + len(_CLOSE))
            if not calls or len(self._calls) + len(calls) > MAX_CALLS:
                return whole, False
            self._keep(calls)
            self._after_call = True
            return "", self.complete
        if not self._begun and not self._calls and _may_be_bare(held):
            return "", len(held) <= _MAX_CALL
        if at > 0:
            return self._take(at), False
        return self._take(len(held) - _partial_tag(held)), True

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._after_call = self._after_call and not taken
        return taken

    def _keep(self, calls: tuple[ToolCall, ...]) -> None:
        self._calls += calls if self._parallel else calls[:1]
        if self.complete:
            self._held = ""

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest of the text, and all calls."""
        rest = self._held
        self._held = ""
        # A model that was stopped at its end-of-turn token may leave out the closing tag.
        body = rest[len(_OPEN) :] if rest.startswith(_OPEN) else rest if not self._begun and not self._calls else ""
        calls = parse_calls(body, self._names) if body.strip() else ()
        if calls:
            self._keep(calls)
            rest = ""
        if self._calls and not rest.strip():
            rest = ""
        return rest, tuple(self._calls)


def _may_be_bare(text: str) -> bool:
    head = "".join(text[:200].split())
    return any(head.startswith(each) or each.startswith(head) for each in _BARE)


def _partial_tag(text: str) -> int:
    for length in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-length:]):
            return length
    return 0
