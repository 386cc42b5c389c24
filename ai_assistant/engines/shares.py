"""How much of which prompt is read in a step."""

from __future__ import annotations

from collections.abc import Sequence

from ai_assistant.engines.contract import Priority
from ai_assistant.engines.task import Slot

_STEP_S, _STEP_ALONE_S = 0.3, 1.0
"""How long reading prompts may make a step: beside sequences that write, and otherwise. It is also how long a
cancellation or a newcomer waits."""
_LEAST_STEP, _LEAST_STEP_ALONE = 32, 128
"""Prompt tokens of a step however slow the model is; with fewer, reading itself gets slower."""


def step_room(size: int, writing: int, rate: float) -> int:
    """Tokens of a step that prompts may have.

    Args:
        size: tokens of the batch.
        writing: how many of them other sequences need.
        rate: tokens that are read per second; 0 while nobody knows.
    """
    room = size
    if rate:
        seconds, least = (_STEP_S, _LEAST_STEP) if writing else (_STEP_ALONE_S, _LEAST_STEP_ALONE)
        room = max(least, int(rate * seconds))
    return min(room, size - writing)


def prompt_parts(reading: Sequence[Slot], room: int) -> dict[Slot, int]:
    """Tokens for each prompt, all alike. Batch prompts take what interactive ones leave, but an eighth at least:
    they shall end some day."""
    interactive = [each for each in reading if each.task is not None and each.task.priority != Priority.BATCH]
    batch = [each for each in reading if each.task is not None and each.task.priority == Priority.BATCH]
    kept = max(0, min(max(1, room // 8), room - len(interactive))) if batch else 0
    parts: dict[Slot, int] = {}
    for group, spare in ((interactive, kept), (batch, 0)):
        wanted = [len(each.task.prompt) - each.length for each in group if each.task is not None]
        for slot, count in zip(group, shares(wanted, room - spare - sum(parts.values())), strict=True):
            if count > 0:
                parts[slot] = count
    return parts


def shares(wanted: Sequence[int], room: int) -> list[int]:
    """Divide `room` tokens evenly among prompts that want so many each; what one does not need the others get."""
    given = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for position, index in enumerate(order):
        part = room // (len(order) - position)
        given[index] = min(wanted[index], part)
        room -= given[index]
    return given
