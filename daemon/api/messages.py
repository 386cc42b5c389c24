"""Chat messages: checked, and reduced to what a chat template reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ai_assistant.errors import InvalidArgument, NotSupported

MAX_MESSAGES = 10_000

# `developer` is the newer word for the same thing; templates know `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_COMMON = frozenset({"role", "content", "name"})
_BY_ROLE = {
    "assistant": _COMMON | {"tool_calls"},
    "tool": _COMMON | {"tool_call_id"},
}
# A client that sends an answer back as it came has these in it, mostly null.
_ECHOED = frozenset({"refusal", "annotations"})


def messages(value: object) -> list[dict[str, Any]]:
    """Check `messages`.

    Text parts are joined, null members left out and `developer` written as `system`, so that every
    template sees the oldest and plainest form.

    Raises:
        InvalidArgument, NotSupported: with the path, as in messages[2].content.
    """
    if value is None:
        raise InvalidArgument("messages is missing", param="messages")
    if not isinstance(value, list):
        raise InvalidArgument("messages must be a list", param="messages")
    if not value:
        raise InvalidArgument("messages is empty", param="messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidArgument(f"messages takes at most {MAX_MESSAGES} messages", param="messages")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def _message(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} must be an object", param=path)
    role = value.get("role")
    if role == "function":
        raise NotSupported("the role function is not supported", hint="use the role tool", param=f"{path}.role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidArgument(f"{path}.role must be one of {', '.join(_ROLES)}", param=f"{path}.role")
    known = _BY_ROLE.get(role, _COMMON)
    for name, member in value.items():
        if name in known or member is None or (name in _ECHOED and not member):
            continue
        if name in ("audio", "function_call"):
            raise NotSupported(f"{path}.{name} is not supported", param=f"{path}.{name}")
        if name in _ECHOED:
            continue
        raise InvalidArgument(f"unknown parameter {path}.{name[:80]}", param=f"{path}.{name[:80]}")
    made: dict[str, Any] = {"role": _ROLES[role]}
    calls = _tool_calls(value.get("tool_calls"), path) if role == "assistant" else []
    content = value.get("content")
    if content is None:
        if not calls and not (role == "assistant" and value.get("refusal")):
            raise InvalidArgument(f"{path}.content is missing", param=f"{path}.content")
        content = value.get("refusal") or ""
    made["content"] = _content(content, f"{path}.content")
    if calls:
        made["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if value.get(name) is not None:
            if not isinstance(value[name], str):
                raise InvalidArgument(f"{path}.{name} must be a string", param=f"{path}.{name}")
            made[name] = value[name]
    if role == "tool" and "tool_call_id" not in made:
        raise InvalidArgument(f"{path}.tool_call_id is missing", param=f"{path}.tool_call_id")
    return made


def _content(value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidArgument(f"{path} must be a string or a list of parts", param=path)
    return "".join(_part(each, f"{path}[{index}]") for index, each in enumerate(value))


def _part(value: object, path: str) -> str:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} must be an object", param=path)
    kind = value.get("type")
    if kind not in ("text", "refusal"):
        if kind in ("image_url", "input_audio", "file"):
            raise NotSupported(f"{path}: models here read text, not {kind}", param=f"{path}.type")
        raise InvalidArgument(f"{path}.type must be text", param=f"{path}.type")
    return _string(value, kind, path)


def _tool_calls(value: object, path: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    path += ".tool_calls"
    if not isinstance(value, list):
        raise InvalidArgument(f"{path} must be a list", param=path)
    return [_tool_call(each, f"{path}[{index}]") for index, each in enumerate(value)]


def _tool_call(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} must be an object", param=path)
    if value.get("type", "function") != "function":
        raise NotSupported(f"{path}.type must be function", param=f"{path}.type")
    function = value.get("function")
    if not isinstance(function, dict):
        raise InvalidArgument(f"{path}.function must be an object", param=f"{path}.function")
    return {
        "id": _string(value, "id", path),
        "type": "function",
        "function": {
            "name": _string(function, "name", f"{path}.function"),
            "arguments": _string(function, "arguments", f"{path}.function"),
        },
    }


def _string(value: Mapping[str, Any], name: str, path: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise InvalidArgument(f"{path}.{name} must be a string", param=f"{path}.{name}")
    return found
