"""Single parameters of the OpenAI interface: what is refused, what does nothing here, and how the rest reads.

Every function takes the value from the body and returns what `GenerateRequest` wants, or raises
`InvalidArgument` or `NotSupported` with the parameter's path. None means "not given" throughout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ai_assistant.errors import InvalidArgument, NotSupported

MAX_TOOLS = 128
MAX_CHOICES = 8
"""Answers to one request."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|m|h|d)?")
_UNITS_S = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_S = 1e9
# `GenerateRequest.tool_choice` holds either one of these words or a function's name.
_CHOICES = ("none", "auto", "required")

HARMLESS: dict[str, tuple[tuple[type, ...], str]] = {
    "user": ((str,), "names the caller's own user; nothing is kept per user"),
    "safety_identifier": ((str,), "as user"),
    "metadata": ((dict,), "labels for stored answers; nothing is stored"),
    "store": ((bool,), "nothing is stored on this device, whatever it says"),
    "service_tier": ((str,), "there is one tier; `priority` says who waits for whom"),
    "prompt_cache_key": ((str,), "prefixes are shared by content"),
    "prompt_cache_retention": ((str,), "as prompt_cache_key"),
    "prompt_cache_options": ((dict,), "as prompt_cache_key"),
    "prediction": ((dict,), "a hint for speed; the answer is the same without it"),
}
"""Parameters that official clients send and that change no answer here: accepted types, and why."""

DEFAULT_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "ask for n answers and choose one"),
    "echo": ((False,), "the prompt is what you sent"),
    "suffix": (("",), "no model here fills in the middle"),
    "modalities": ((["text"],), "models here answer in text"),
    "reasoning_effort": (("none",), ""),
    "verbosity": (("medium",), "say in the prompt how long the answer should be"),
    "audio": ((), "models here answer in text"),
    "functions": (([],), "use tools"),
    "function_call": (("none",), "use tools and tool_choice"),
    "web_search_options": ((), "nothing here searches the web"),
    "moderation": ((), ""),
}
"""Parameters that would change the answer and cannot: only these values, which mean the default, pass."""


def check_names(body: Mapping[str, Any], known: frozenset[str], beside: frozenset[str]) -> None:
    """Every name is known, harmless, or at its default; `beside` are the other names the endpoint has."""
    for name, value in body.items():
        if name in known:
            continue
        if name not in beside:
            raise InvalidArgument(f"unknown parameter {name[:80]!r}", param=name[:80])
        if value is None:
            continue
        if name in HARMLESS:
            if not isinstance(value, HARMLESS[name][0]):
                raise InvalidArgument(f"{name} must be {_kind(HARMLESS[name][0][0])}", param=name)
            continue
        allowed, hint = DEFAULT_ONLY[name]
        # Types too: True == 1 in Python, and n=true is a mistake.
        if not any(value == each and type(value) is type(each) for each in allowed):
            raise NotSupported(f"{name} is not supported", hint=hint, param=name)


def text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if value is None:
        raise InvalidArgument(f"{name} is missing", param=name)
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} must be a string", param=name)
    if not value:
        raise InvalidArgument(f"{name} is empty", param=name)
    return value


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be true or false", param=name)
    return value


def integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer", param=name)
    return value


def choices(body: Mapping[str, Any]) -> int:
    """`n`: how many answers."""
    value = body.get("n")
    if value is None:
        return 1
    if not 1 <= integer(value, "n") <= MAX_CHOICES:
        raise InvalidArgument(f"n must be between 1 and {MAX_CHOICES}", param="n")
    return integer(value, "n")


def keep_alive(body: Mapping[str, Any]) -> float | None:
    """`keep_alive`: seconds, or a text such as "5m"; 0 unloads after the answer, -1 keeps until memory is needed."""
    value = body.get("keep_alive")
    wrong = InvalidArgument(
        "keep_alive must be seconds, a text such as 30s, 5m, 2h or 1d, 0, or -1 for ever", param="keep_alive"
    )
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if text == "-1":
            return math.inf
        found = _DURATION.fullmatch(text) if text.isascii() else None
        if found is None:
            raise wrong
        value = float(found[1]) * _UNITS_S[found[2]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    if value == -1:
        return math.inf
    # NaN compares false with everything, so the test is for being inside.
    if not 0 <= value <= _LONGEST_S:
        raise wrong
    return float(value)


def stop(value: object) -> list[Any]:
    """A string or a list of strings; `GenerateRequest` checks the elements."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidArgument("stop must be a string or a list of strings", param="stop")
    return value


def include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    """`stream_options.include_usage`; obfuscation pads chunks against eavesdroppers and is harmless to leave out."""
    options = body.get("stream_options")
    if options is None:
        return False
    _object(options, "stream_options")
    if not stream:
        raise InvalidArgument("stream_options needs stream to be true", param="stream_options")
    _known(options, ("include_usage", "include_obfuscation"), "stream_options")
    flag(options, "include_obfuscation")
    return flag(options, "include_usage")


def max_tokens(body: Mapping[str, Any]) -> Any:
    """`max_completion_tokens`, or its older name."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidArgument(
            "max_tokens and max_completion_tokens differ", hint="give one of them", param="max_completion_tokens"
        )
    if new is not None:
        return integer(new, "max_completion_tokens")
    return old


def chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = body.get("top_logprobs")
    if not flag(body, "logprobs"):
        if top is not None and top != 0:
            raise InvalidArgument("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return 0 if top is None else integer(top, "top_logprobs")


def response_format(value: object) -> dict[str, Any]:
    """The fields of `GenerateRequest` that it becomes: none for free text, a schema ({} is any object), a regex."""
    if value is None:
        return {}
    given = _object(value, "response_format")
    kind = given.get("type")
    if kind in ("text", "json_object"):
        _known(given, ("type",), "response_format")
        return {} if kind == "text" else {"response_schema": {}}
    if kind == "regex":
        _known(given, ("type", "regex"), "response_format")
        pattern = given.get("regex")
        if not isinstance(pattern, str) or not pattern:
            raise InvalidArgument("response_format.regex must be a regular expression", param="response_format.regex")
        return {"response_regex": pattern}
    if kind != "json_schema":
        raise InvalidArgument(
            "response_format.type must be text, json_object, json_schema or regex", param="response_format.type"
        )
    _known(given, ("type", "json_schema"), "response_format")
    wrapper = _object(given.get("json_schema"), "response_format.json_schema")
    _known(wrapper, ("name", "description", "schema", "strict"), "response_format.json_schema")
    return {"response_schema": _object(wrapper.get("schema"), "response_format.json_schema.schema")}


def tools(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument("tools must be a list", param="tools")
    if len(value) > MAX_TOOLS:
        raise InvalidArgument(f"tools takes at most {MAX_TOOLS} functions", param="tools")
    found = [_tool(each, f"tools[{index}]") for index, each in enumerate(value)]
    names = [each["function"]["name"] for each in found]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidArgument(f"two tools are named {name!r}", param=f"tools[{index}].function.name")
    return found


def tool_choice(value: object, names: Sequence[str]) -> str:
    if value is None:
        return "auto"
    if isinstance(value, str):
        if value not in _CHOICES:
            raise InvalidArgument("tool_choice must be none, auto, required or a function", param="tool_choice")
        if value == "required" and not names:
            raise InvalidArgument("tool_choice is required, but there are no tools", param="tool_choice")
        return value
    given = _object(value, "tool_choice")
    if given.get("type") != "function":
        raise NotSupported(
            "tool_choice takes an object of type function only", hint="name one function", param="tool_choice.type"
        )
    _known(given, ("type", "function"), "tool_choice")
    function = _object(given.get("function"), "tool_choice.function")
    _known(function, ("name",), "tool_choice.function")
    name = text(function, "name")
    if name not in names:
        raise InvalidArgument(f"tool_choice names {name[:80]!r}, which is no tool", param="tool_choice.function.name")
    if name in _CHOICES:  # inside, a choice is one word: this one is taken
        raise NotSupported(f"a function named {name!r} cannot be chosen by name", param="tool_choice.function.name")
    return name


def _tool(value: object, path: str) -> dict[str, Any]:
    given = _object(value, path)
    if given.get("type") != "function":
        raise NotSupported(f"{path}.type must be function", param=f"{path}.type")
    _known(given, ("type", "function"), path)
    function = _object(given.get("function"), f"{path}.function")
    # `strict` holds in any case: calls are made under a grammar.
    _known(function, ("name", "description", "parameters", "strict"), f"{path}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise InvalidArgument("a function's name has 1 to 64 letters, digits, _ or -", param=f"{path}.function.name")
    made: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        if not isinstance(function["description"], str):
            raise InvalidArgument("a description must be a string", param=f"{path}.function.description")
        made["description"] = function["description"]
    if function.get("parameters") is not None:
        made["parameters"] = _object(function["parameters"], f"{path}.function.parameters")
    return {"type": "function", "function": made}


def _object(value: object, path: str) -> dict[str, Any]:
    if value is None:
        raise InvalidArgument(f"{path} is missing", param=path)
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} must be an object", param=path)
    return value


def _known(value: Mapping[str, Any], names: Sequence[str], path: str) -> None:
    for name in value:
        if name not in names:
            raise InvalidArgument(f"unknown parameter {path}.{name[:80]}", param=f"{path}.{name[:80]}")


def _kind(kind: type) -> str:
    return {str: "a string", dict: "an object", bool: "true or false"}[kind]
