"""The catalogue as OpenAI `tools`, from which the engine makes the grammar of the answer."""

from __future__ import annotations

from typing import Any

from ai_assistant.actions.catalogue import ACTIONS, NONE, Action, Parameter
from ai_assistant.actions.text import Marked


def tools_for(question: Marked, *, without: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Tool definitions for one question.

    Live parameters take the marks that stand in the question, and `unknown`; so whatever the model
    writes, it is a name that exists, or says that none does.

    Args:
        without: names of actions to leave out.
    """
    tools = [_tool(each.name, each.describe({}, chinese=False), _schema(each, question)) for each in ACTIONS]
    tools.append(_tool(NONE, "nothing of the above", _object({})))
    return [each for each in tools if each["function"]["name"] not in without]


def values_of(parameter: Parameter, question: Marked) -> tuple[str, ...]:
    """What the model may say for this parameter."""
    return parameter.values or question.choices(parameter.live)


def _schema(action: Action, question: Marked) -> dict[str, Any]:
    return _object({each.name: {"enum": list(values_of(each, question))} for each in action.parameters})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _tool(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
