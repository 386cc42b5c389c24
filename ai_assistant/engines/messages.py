"""Chat messages of the OpenAI kind, checked and made plain for templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ai_assistant.errors import InvalidArgument

_SEEN = {
    "image_url": "an image", "input_image": "an image", "image": "an image", "input_audio": "sound", "audio": "sound",
    "video_url": "a video", "video": "a video", "file": "a file", "input_file": "a file",
}  # fmt: skip


def plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as templates know it: content is text, tool arguments are objects.

    Raises:
        InvalidArgument: it is none, or has parts that are no text, with the place.
    """
    where = f"messages[{index}]"
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise InvalidArgument(f"{where}.role must be system, user, assistant or tool", param=f"{where}.role")
    out = {key: value for key, value in message.items() if value is not None}
    out["role"] = role
    out["content"] = _content(message.get("content"), where)
    for key in ("name", "tool_call_id"):
        if not isinstance(out.get(key, ""), str):
            raise InvalidArgument(f"{where}.{key} must be text", param=f"{where}.{key}")
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidArgument(f"{where}.tool_calls must be a list", param=f"{where}.tool_calls")
        out["tool_calls"] = [_call(each, where) for each in calls]
    return out


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    param = f"{where}.content"
    if not isinstance(content, Sequence):
        raise InvalidArgument(f"{param} must be text or a list of text parts", param=param)
    texts: list[str] = []
    for index, part in enumerate(content):
        place = f"{param}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind in _SEEN:
            raise InvalidArgument(
                f"{place} is {_SEEN[kind]}, and this model reads text only",
                hint="describe it in words, or load a model that takes it",
                param=place,
            )
        text = part.get("text") if kind in ("text", "input_text") else None
        if not isinstance(text, str):
            raise InvalidArgument(f'{place} must be a text part, as in {{"type": "text", "text": "…"}}', param=place)
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidArgument(f"{where}.tool_calls has an entry without a function", param=f"{where}.tool_calls")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InvalidArgument(f"{where}.tool_calls has arguments that are no JSON", param=where) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
