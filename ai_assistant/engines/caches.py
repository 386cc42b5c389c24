"""What the sequences of a context remember, and how a prompt's beginning gets into one without being read."""

from __future__ import annotations

from collections.abc import Sequence

from ai_assistant.engines import placement
from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.context import Context
from ai_assistant.engines.spill import SpillStore
from ai_assistant.engines.task import Slot

_WORTH_SPILLING = 16
"""Tokens that would be lost, below which reading them again is as good: a state is saved and restored in the time of
some six (0.5 B, 300 tokens: 8.5 and 1.3 ms)."""


class Caches:
    """Keeps `Slot.cells` and `Slot.length` true to what the context holds. On the scheduler's thread only."""

    def __init__(self, context: Context, slots: Sequence[Slot], spill: SpillStore) -> None:
        self._context = context
        self._slots = slots
        self._spill = spill
        self.prefix_hits = 0
        self.prefix_tokens = 0
        self.restored = 0

    def prepare(self, slot: Slot, prompt: Tokens) -> int:
        """Bring the longest beginning of a prompt that is anywhere into a slot, which keeps nothing else.

        Returns its length in tokens.
        """
        whole = self._context.whole
        own = placement.usable(slot, prompt, whole=whole)
        source = placement.best_source(self._slots, slot, prompt, whole=whole)
        key, spilled = self._spill.find(prompt[:-1], whole=whole)
        # What is lost by making room is put aside first, and that may push out the state that was found.
        state = (
            self._spill.get(key) if key is not None and spilled >= max(own, source.tokens) + placement.WORTH else None
        )
        length = 0 if key is None or state is None else self._spill.length(key)
        self._put_aside(slot, own)
        if state is not None and key is not None and self._restore(slot, prompt, state, length, spilled):
            self.restored += 1
            if spilled == length:
                # The conversation goes on here; its longer state will be put aside in turn.
                self._spill.drop(key)
        elif source.slot is not None and source.tokens >= own + placement.WORTH:
            self._copy(source.slot, slot, source.tokens)
        else:
            self.cut(slot, own)
        kept = slot.length
        if kept:
            self.prefix_hits += 1
            self.prefix_tokens += kept
        return kept

    def cut(self, slot: Slot, length: int) -> None:
        """Forget what a slot has from `length` on; all of it where the cache cannot be cut."""
        if slot.length > length:
            slot.length = self._context.cut(slot.id, length)

    def _copy(self, source: Slot, target: Slot, tokens: int) -> None:
        target.length = 0
        if self._context.copy(source.id, target.id, source.length):
            target.length = source.length
            target.cells[: source.length] = source.cells[: source.length]
            self.cut(target, tokens)

    def _restore(self, slot: Slot, prompt: Tokens, state: bytearray, length: int, tokens: int) -> bool:
        slot.length = 0
        if length > len(slot.cells) or not self._context.restore(slot.id, state, length):
            return False
        slot.length = length
        # Only the beginning is known to be the prompt's, and only that stays.
        slot.cells[:tokens] = prompt[:tokens]
        self.cut(slot, tokens)
        return True

    def _put_aside(self, slot: Slot, kept: int) -> None:
        """Save a slot's state if a conversation of some length is about to lose something."""
        tokens = slot.cells[: slot.length]
        if not self._spill.enabled or slot.length - kept < _WORTH_SPILLING or self._spill.covers(tokens):
            return
        if any(each is not slot and each.common(tokens) == slot.length for each in self._slots):
            return
        state = self._context.save(slot.id)
        if state is not None:
            self._spill.put(tokens.copy(), state)

    def put_all_aside(self) -> None:
        """Move every slot's state to the file, if there is one, before the context goes."""
        if self._spill.on_disk:
            for slot in self._slots:
                self._put_aside(slot, 0)
                self._spill.clear_memory()

    def forget(self) -> None:
        """The context's memory is gone."""
        for slot in self._slots:
            slot.length = 0
