"""From a question to a proposal, and from a proposal to an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai_assistant.actions.bus import Bus, BusFailure
from ai_assistant.actions.catalogue import ACTIONS, BY_NAME, CLOCK, MANAGER, NONE, Action, Effect
from ai_assistant.actions.caution import forbidden
from ai_assistant.actions.confidence import confidence, sure
from ai_assistant.actions.perform import perform_action
from ai_assistant.actions.text import UNKNOWN, Marked, is_chinese, mark
from ai_assistant.actions.tools import tools_for, values_of
from ai_assistant.errors import InternalError, InvalidArgument, NotAuthorized, Unsure

BUILT_IN = "assistant:1"
MAX_TOKENS = 64

Complete = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]
"""Sends the body of a POST /v1/chat/completions and returns ``choices[0]`` of the answer."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the model wants to do, before it is done.

    `confidence` is 0 to 1, see `confidence.py`. `description` says in the question's language what would be
    done, as an order ("restart the machine"). With `changes`, a person has to agree first.
    """

    action: str
    arguments: Mapping[str, str]
    confidence: float
    changes: bool
    chinese: bool
    description: str


# What every refusal tells a person to type: it must work whatever the model thinks.
_HELP = frozenset({"help", "帮助"})


class Asker:
    """Answers questions with the appliance's own actions.

    Args:
        complete: reaches the built-in model.
        bus: reaches the services that do the work.
        model: the name of the model to ask.
    """

    def __init__(self, complete: Complete, bus: Bus, *, model: str = BUILT_IN) -> None:
        self._complete = complete
        self._bus = bus
        self._model = model

    async def propose(self, question: str) -> Proposal:
        """The action that answers the question.

        Raises:
            InvalidArgument: the question is empty.
            Unsure: no action fits, two fit alike, or a name in it does not exist; the hint says what is possible.
            Any error of reaching the model or the appliance.
        """
        chinese = is_chinese(question)
        asked = mark(question, await self._live())
        if not asked.text:
            raise InvalidArgument("the question is empty", param="question")
        answer: tuple[str, dict[str, str], float] = ("help", {}, 1.0)
        if question.strip().casefold() not in _HELP:
            answer = await self._answer(asked)
        name, said, certainty = answer
        if name == NONE:
            raise _out_of_scope(chinese)
        action = BY_NAME[name]
        changes = action.effect is Effect.CHANGE
        if not sure(certainty, changes=changes) or (changes and forbidden(name, asked.text)):
            other, _, _ = await self._answer(asked, without=frozenset({name}))
            raise _torn(action, BY_NAME.get(other), chinese)
        for parameter in action.parameters:
            if said[parameter.name] == UNKNOWN:
                raise await self._nameless(parameter.live, chinese)
        arguments = {key: asked.values.get(key, {}).get(value, value) for key, value in said.items()}
        return Proposal(name, arguments, certainty, changes, chinese, action.describe(arguments, chinese=chinese))

    async def perform(self, proposal: Proposal, *, confirm: bool = False) -> str:
        """Do what was proposed and say how it went, in the question's language.

        Args:
            confirm: that a person agreed; needed when the proposal changes something.

        Raises:
            NotAuthorized: it changes something and nobody agreed, or the service refuses this user.
            NotSupported: this image has no service that can do it.
            Any error of the service.
        """
        if proposal.changes and not confirm:
            raise NotAuthorized(f"this needs your consent: {proposal.description}", hint="confirm it")
        return await perform_action(self._bus, BY_NAME[proposal.action], proposal.arguments, chinese=proposal.chinese)

    async def _live(self) -> dict[str, Sequence[str]]:
        """The names that exist right now. Whoever is not there names nothing."""
        models, zones = await asyncio.gather(self._model_names(), self._zone_names())
        return {"model": models, "zone": zones}

    async def _model_names(self) -> Sequence[str]:
        try:
            (status,) = await self._bus.call(MANAGER.name, MANAGER.path, f"{MANAGER.name}.Manager", "GetStatus")
        except BusFailure as failure:
            if failure.nobody_there:
                return ()
            raise failure.as_error(MANAGER.english) from failure
        found = status.get("models") if isinstance(status, Mapping) else None
        return [each["name"] for each in found or () if isinstance(each, Mapping) and isinstance(each.get("name"), str)]

    async def _zone_names(self) -> Sequence[str]:
        try:
            (zones,) = await self._bus.call(CLOCK.name, CLOCK.path, CLOCK.name, "ListTimezones")
        except BusFailure:
            # Then there is no setting one either, and that is said when it is asked for.
            return ()
        return [each for each in zones if isinstance(each, str)]

    async def _answer(
        self, asked: Marked, *, without: frozenset[str] = frozenset()
    ) -> tuple[str, dict[str, str], float]:
        """The model's call: name, arguments as marks, and confidence."""
        choice = await self._complete({
            "model": self._model,
            "messages": [{"role": "user", "content": asked.text}],
            "tools": tools_for(asked, without=without),
            "tool_choice": "required",
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "logprobs": True,
            "top_logprobs": 0,
        })  # fmt: skip
        try:
            function = choice["message"]["tool_calls"][0]["function"]
            name, arguments = function["name"], json.loads(function["arguments"])
            logprobs = [float(each["logprob"]) for each in choice["logprobs"]["content"]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InternalError(f"the model {self._model} answered no call with probabilities") from error
        if not logprobs or not _allowed(name, arguments, asked):
            raise InternalError(f"the model {self._model} answered a call that does not exist")
        return name, arguments, confidence(logprobs)

    async def _nameless(self, kind: str, chinese: bool) -> Unsure:
        if kind == "zone":
            return Unsure(
                "没有这个时区" if chinese else "I do not know that time zone",
                hint="请说出城市，例如 Asia/Shanghai" if chinese else "name a city, as in Europe/Berlin",
            )
        names = ", ".join(await self._model_names())
        return Unsure(
            "不知道是哪个模型" if chinese else "I do not know which model you mean",
            hint=f"现有模型：{names}" if chinese else f"there are: {names}",
        )


def _allowed(name: Any, arguments: Any, asked: Marked) -> bool:
    """The grammar has seen to it; but an answer that makes the machine act is checked here, not trusted."""
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return False
    if name == NONE:
        return not arguments
    action = BY_NAME.get(name)
    if action is None or arguments.keys() != {each.name for each in action.parameters}:
        return False
    return all(arguments[each.name] in values_of(each, asked) for each in action.parameters)


def _out_of_scope(chinese: bool) -> Unsure:
    some = [BY_NAME[each] for each in ("status", "temperature", "list_models", "log")]
    shown = [each.describe({"priority": "all"}, chinese=chinese) for each in some]
    if chinese:
        return Unsure("这不是我能做的事", hint=f"我能{'、'.join(shown)}等共 {len(ACTIONS)} 件事；说“帮助”看全部")
    others = len(ACTIONS) - len(some)
    return Unsure(
        "that is nothing I can do here",
        hint=f"I can {', '.join(shown)} and {others} other things; say “help” for all",
    )


def _torn(first: Action, second: Action | None, chinese: bool) -> Unsure:
    likely = [each.describe({}, chinese=chinese) for each in (first, second) if each is not None]
    if chinese:
        return Unsure("我不确定你的意思", hint=f"是不是：{'；或者 '.join(likely)}？")
    return Unsure("I am not sure what you mean", hint=f"did you mean: {'; or '.join(likely)}?")
