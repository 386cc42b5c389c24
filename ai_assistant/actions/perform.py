"""Does an action: the call and what surrounds it, and the reply as a sentence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from ai_assistant.actions.bus import Bus, BusFailure
from ai_assistant.actions.catalogue import ACTIONS, MANAGER, OURS, PROPERTIES, Action, Call, Typed, Value
from ai_assistant.errors import Cancelled, InternalError, NotSupported, ServiceUnavailable, Timeout, from_name

JOB_LIMIT_S = 600.0
JOB_POLL_S = 0.2


async def perform_action(bus: Bus, action: Action, arguments: Mapping[str, str], *, chinese: bool) -> str:
    """Call, wait where there is something to wait for, and render.

    Raises:
        NotSupported: nobody on this machine provides the service.
        ServiceUnavailable: our own daemon is not there.
        Any other error of the tree, as the service named it.
    """
    if action.call is None:
        return action.render([each.describe({}, chinese=chinese) for each in ACTIONS], arguments, chinese)
    try:
        reply = await _reply(bus, action.call, arguments)
    except BusFailure as failure:
        if failure.nobody_there:
            raise _missing(action.call, chinese) from failure
        raise failure.as_error(action.call.service.english) from failure
    try:
        return action.render(reply, arguments, chinese)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        # A foreign service answered in a shape that it does not document.
        raise InternalError(f"the {action.call.service.english} gave an answer that is not understood") from error


def _missing(call: Call, chinese: bool) -> NotSupported | ServiceUnavailable:
    if call.service is MANAGER:
        return ServiceUnavailable(
            "AI 助手服务没有运行" if chinese else "the AI Assistant service is not running",
            hint="systemctl status ai-assistantd",
        )
    return NotSupported(
        f"这个镜像没有{call.service.chinese}" if chinese else f"this image has no {call.service.english}"
    )


async def _reply(bus: Bus, call: Call, arguments: Mapping[str, str]) -> Any:
    path = call.service.path
    if call.model:
        (path,) = await bus.call(OURS, MANAGER.path, f"{OURS}.Manager", "FindModel", "s", (arguments[call.model],))
    body = tuple(_filled(each, arguments) for each in call.arguments)
    values = await bus.call(call.service.name, path, call.interface, call.member, call.signature, body)
    reply = values[0] if values else None
    if call.each:
        return [await _properties(bus, call.service.name, each, call.each) for each in reply or ()]
    if call.job:
        return await _finished(bus, str(reply))
    return reply


def _filled(argument: Any, arguments: Mapping[str, str]) -> Any:
    if isinstance(argument, Value):
        said = arguments[argument.parameter]
        return argument.words.get(said, said)
    if isinstance(argument, Typed):
        return Typed(argument.signature, _filled(argument.value, arguments))
    return argument


async def _properties(bus: Bus, name: str, path: str, interface: str) -> Mapping[str, Any]:
    (found,) = await bus.call(name, path, PROPERTIES, "GetAll", "s", (interface,))
    if not isinstance(found, Mapping):
        raise InternalError(f"{path} has no properties")
    return found


async def _finished(bus: Bus, path: str) -> Mapping[str, Any]:
    """The properties of a job once it is done; its own error if it failed."""
    until = time.monotonic() + JOB_LIMIT_S
    while True:
        job = await _properties(bus, OURS, path, f"{OURS}.Job")
        state = job.get("State")
        if state == "done":
            return job
        if state == "cancelled":
            raise Cancelled("the job was cancelled")
        if state == "failed":
            name, message = (str(each) for each in job.get("Error") or ("InternalError", "the job failed"))
            raise from_name(name, message)
        if time.monotonic() > until:
            raise Timeout(f"it is still not finished after {JOB_LIMIT_S:.0f} s", hint="it goes on in the background")
        await asyncio.sleep(JOB_POLL_S)
