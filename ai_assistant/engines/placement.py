"""Which sequence a prompt gets, and where the beginning of it comes from. Pure: nothing is moved here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.contract import Priority
from ai_assistant.engines.task import Slot, Task, common

WORTH = 12
"""Tokens that copying must save before it is done; it costs about as much as reading some ten."""
_WORTH_KEEPING = 16
"""Tokens of a shared prefix below which a slot is as good as any other."""


def usable(slot: Slot, prompt: Tokens, *, whole: bool) -> int:
    """Tokens in the slot's cache that the prompt begins with. At least one is left, since only a decoded token
    has logits to sample from.

    Args:
        whole: the cache can only be continued, not cut.
    """
    shared = min(slot.common(prompt), len(prompt) - 1)
    return 0 if whole and shared < slot.length else shared


def pick(slots: Sequence[Slot], prompt: Tokens, *, whole: bool) -> Slot:
    """The free slot for a prompt; there must be one.

    First the one of which it keeps most, if it throws next to nothing away, or less than it keeps and no slot is
    empty: a conversation goes on. A beginning that many share, such as a system prompt, is rather copied. Then a
    slot beside a running sequence, since the library decodes neighbours in one pass; then an empty one; then the
    one that was idle longest.
    """

    free = [each for each in slots if each.task is None]
    empty = any(each.length == 0 for each in free)

    def fitness(slot: Slot) -> tuple[int, bool, bool, float]:
        kept = usable(slot, prompt, whole=whole)
        beside = any(each.task is not None and abs(each.id - slot.id) == 1 for each in slots)
        lost = slot.length - kept
        goes_on = kept >= _WORTH_KEEPING and (lost <= WORTH or (lost <= kept and not empty))
        return kept if goes_on else 0, beside, slot.length == 0, -slot.used

    return max(free, key=fitness)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the longest part of a prompt is: `tokens` of it in `slot`."""

    slot: Slot | None
    tokens: int


def best_source(slots: Sequence[Slot], target: Slot, prompt: Tokens, *, whole: bool) -> Source:
    """The other slot whose cache has the longest beginning of the prompt."""
    best = Source(None, 0)
    if whole:
        return best
    for each in slots:
        if each is not target and each.length:
            shared = usable(each, prompt, whole=False)
            if shared > best.tokens:
                best = Source(each, shared)
    return best


@dataclass(frozen=True, slots=True)
class Leader:
    """Somebody who will have read `tokens` of a prompt soon."""

    task: Task
    tokens: int


def leader_of(slots: Sequence[Slot], task: Task) -> Leader | None:
    """Who reads, or waits to read, the longest beginning of the same prompt, and came first."""
    best: Leader | None = None
    for each in slots:
        other = each.task
        if other is None or other is task or other.last_token >= 0 or other.order >= task.order:
            continue
        # Nobody in a hurry waits for somebody who gets little of each step.
        if other.priority == Priority.BATCH and task.priority != Priority.BATCH:
            continue
        shared = min(common(other.prompt, task.prompt), len(task.prompt) - 1)
        if shared > (each.length if each.leader is None else 0) and (best is None or shared > best.tokens):
            best = Leader(other, shared)
    return best
