"""Guesses by a smaller model with the same vocabulary, greedily; it follows each conversation in a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ai_assistant.engines import gguf_rules
from ai_assistant.engines.batch import Batch, Tokens
from ai_assistant.engines.context import Context, ContextShape, NativeContext
from ai_assistant.engines.gguf import read_gguf
from ai_assistant.engines.native import load_model
from ai_assistant.engines.task import common
from ai_assistant.engines.vocabulary import Vocabulary
from ai_assistant.errors import AIAssistantError, InvalidModel


class DraftModel:
    """Owns its context. On the scheduler's thread only.

    Args:
        free: frees the model; called once, by `close`.
    """

    def __init__(
        self, context: Context, *, context_length: int, batch_tokens: int, free: Callable[[], None] = lambda: None
    ) -> None:
        self._context = context
        self._free = free
        self._length = context_length
        self._batch = Batch(batch_tokens)
        self._cells: dict[int, Tokens] = {}
        self._broken = False

    def propose(self, wanted: Sequence[tuple[int, Tokens]], count: int) -> list[Tokens]:
        """Up to `count` tokens for each sequence; nothing while it still reads what it has not seen."""
        if self._broken or any(len(history) + count > self._length for _, history in wanted):
            return []
        try:
            self._context.open()
        except AIAssistantError:
            self._broken = True
            return []
        pending = [(sequence, history, self._kept(sequence, history)) for sequence, history in wanted]
        unread = sum(len(history) - kept for _, history, kept in pending)
        if unread > self._batch.size:
            self._read(pending)
            return []
        rows: list[list[int]] = [[] for _ in wanted]
        parts = [(sequence, history[kept:], kept) for sequence, history, kept in pending]
        for _ in range(count):
            tokens = self._step(parts)
            if tokens is None:
                return []
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            parts = [
                (sequence, np.array([token], dtype=np.int32), start + len(part))
                for (sequence, part, start), token in zip(parts, tokens, strict=True)
            ]
        guesses = [np.array(row, dtype=np.int32) for row in rows]
        for (sequence, history), guess in zip(wanted, guesses, strict=True):
            self._cells[sequence] = np.concatenate([history, guess[:-1]])
        return guesses

    def _kept(self, sequence: int, history: Tokens) -> int:
        """Cut the cache to what it shares with the history, one token less at least."""
        cells = self._cells.get(sequence)
        if cells is None:
            return 0
        keep = min(common(cells, history), len(history) - 1)
        if keep < len(cells):
            keep = self._context.cut(sequence, keep)
            self._cells[sequence] = cells[:keep]
        return keep

    def _read(self, pending: Sequence[tuple[int, Tokens, int]]) -> None:
        """One batch of what is unread, first sequence first."""
        room = self._batch.size
        parts: list[tuple[int, Tokens, int]] = []
        for sequence, history, kept in pending:
            part = history[kept : min(len(history) - 1, kept + room)]
            if len(part):
                parts.append((sequence, part, kept))
                room -= len(part)
        if self._step(parts, outputs=False) is not None:
            for sequence, part, start in parts:
                former = self._cells.get(sequence, part[:0])
                self._cells[sequence] = np.concatenate([former[:start], part])

    def _step(self, parts: Sequence[tuple[int, Tokens, int]], *, outputs: bool = True) -> list[int] | None:
        batch = self._batch
        batch.clear()
        ends: list[int] = []
        for sequence, part, start in parts:
            ends.append(batch.extend(sequence, part, start, 1 if outputs else 0) + len(part) - 1)
        if self._context.decode(batch) != 0:
            self._context.clear()
            self._cells.clear()
            self._broken = True
            return None
        return [int(self._context.row(end).argmax()) for end in ends] if outputs else []

    def trim(self) -> None:
        self._cells.clear()
        self._context.close()

    def close(self) -> None:
        self.trim()
        self._free()
        self._free = lambda: None


def check_same_vocabulary(lib: Any, ours: Vocabulary, draft: Vocabulary) -> None:
    """A guess is a number, so it must mean the same to both models.

    Raises:
        InvalidModel: it does not.
    """
    hint = "a draft model comes from the same family as the model that it guesses for"
    if int(lib.llama_vocab_type(ours.native)) != int(lib.llama_vocab_type(draft.native)):
        raise InvalidModel("the draft model has another kind of tokenizer", hint=hint)
    if ours.size != draft.size:
        raise InvalidModel(f"the draft model has {draft.size} tokens, the model {ours.size}", hint=hint)
    text = lib.llama_vocab_get_text
    for token in range(ours.size):
        if text(ours.native, token) != text(draft.native, token):
            raise InvalidModel(f"token {token} of the draft model is another than the model's", hint=hint)


def open_draft(lib: Any, fd: int, ours: Vocabulary, shape: ContextShape, context_length: int) -> DraftModel:
    """Load a draft model from an open descriptor, which is not closed.

    Args:
        shape: of the context of the model that it guesses for.

    Raises:
        InvalidModel: it cannot be run, or not for that model.
    """
    header = read_gguf(fd)
    gguf_rules.check(header)
    if header.architecture not in gguf_rules.DECODERS or header.architecture in gguf_rules.RECURRENT:
        raise InvalidModel(f"models of architecture {header.architecture} cannot guess tokens")
    model = load_model(fd, None)
    try:
        vocabulary = Vocabulary(lib, model, header.tokens[1])
        check_same_vocabulary(lib, ours, vocabulary)
        context = NativeContext(lib, model, vocabulary.size, replace(shape, outputs=shape.sequences, kv_type="f16"))
    except BaseException:
        lib.llama_model_free(model)
        raise
    return DraftModel(
        context, context_length=context_length, batch_tokens=shape.batch_tokens,
        free=lambda: lib.llama_model_free(model),
    )  # fmt: skip
