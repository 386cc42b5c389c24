"""What a sentence can make the appliance do: the catalogue of actions, and the way from a question to an answer.

    async with SystemBus() as bus:
        asker = Asker(complete, bus)
        proposal = await asker.propose("how warm is it?")     # asks the built-in model
        print(await asker.perform(proposal))                  # does it over D-Bus

`complete` is an async callable: it takes the body of a POST /v1/chat/completions (messages, tools,
tool_choice "required", logprobs) and returns ``choices[0]`` of the answer: ``{"message": {"tool_calls":
[{"function": {"name", "arguments"}}]}, "logprobs": {"content": [{"token", "logprob"}, …]}}``.

`Asker.propose` raises `Unsure`, with what it could have meant in the hint, rather than guess. A `Proposal`
with `changes` needs a person's consent: show `Proposal.description`, then `perform(proposal, confirm=True)`.
"""

from __future__ import annotations

from ai_assistant.actions.ask import Asker, Complete, Proposal
from ai_assistant.actions.bus import Bus, BusFailure, SystemBus
from ai_assistant.actions.catalogue import ACTIONS, Action, Effect

__all__ = ["ACTIONS", "Action", "Asker", "Bus", "BusFailure", "Complete", "Effect", "Proposal", "SystemBus"]
