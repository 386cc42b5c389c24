"""Text to vectors: a context of its own, made when the first text comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ai_assistant.engines.vocabulary import Tokens, Vocabulary
from ai_assistant.errors import Cancelled, ContextOverflow, InternalError, InvalidArgument, InvalidModel, OutOfMemory

MAX_TEXTS = 2048
_SEQUENCES = 16
_SMALLEST = 512
_MEAN = 1


class Embedder:
    """Makes L2-normalised vectors with a model's own pooling (mean where it has none).

    Calls from several threads are answered one after the other.
    """

    def __init__(self, lib: Any, model: Any, vocabulary: Vocabulary, *, context_length: int, threads: int) -> None:
        self._lib = lib
        self._model = model
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._threads = threads
        self._lock = threading.Lock()
        self._context: Any = None
        self._room = 0
        self.steps = 0
        """Batches computed so far."""
        self._width = int(lib.llama_model_n_embd_out(model)) if hasattr(lib, "llama_model_n_embd_out") else 0
        self._width = self._width or int(lib.llama_model_n_embd(model))

    def embed(self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None) -> tuple[list[list[float]], int]:
        """Vectors of shape (len(texts), width), and the tokens read.

        Args:
            cancelled: asked between texts and between batches.

        Raises:
            InvalidArgument: no texts, too many, or an empty one.
            ContextOverflow: a text is longer than the model reads.
            Cancelled: `cancelled` said so.
        """
        if not texts or len(texts) > MAX_TEXTS:
            raise InvalidArgument(f"give 1 to {MAX_TEXTS} texts, not {len(texts)}", param="input")
        tokens: list[Tokens] = []
        for index, text in enumerate(texts):
            _check(cancelled)
            tokens.append(self._tokens(text, index))
        vectors: list[list[float]] = []
        with self._lock:
            _check(cancelled)
            self._make_room(max(map(len, tokens)))
            todo = list(tokens)
            while todo:
                _check(cancelled)
                count = self._fitting(todo)
                vectors += self._decode(todo[:count])
                del todo[:count]
        return vectors, sum(map(len, tokens))

    def _tokens(self, text: str, index: int) -> Tokens:
        limit = self._context_length
        fewest = self._vocabulary.fewest_tokens(text)
        tokens = self._vocabulary.tokenize(text, begin=True) if fewest <= limit else None
        if tokens is None or len(tokens) > limit:
            count = f"at least {fewest}" if tokens is None else str(len(tokens))
            raise ContextOverflow(f"input[{index}] has {count} tokens; the model reads {limit}", param="input")
        if not len(tokens):
            raise InvalidArgument(f"input[{index}] is empty", param="input")
        return tokens

    def _make_room(self, longest: int) -> None:
        """A pooled text must fit one physical batch, so the context grows with the longest text seen."""
        if longest <= self._room:
            return
        room = _SMALLEST
        while room < longest:
            room *= 2
        self._free()
        lib = self._lib
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = room
        parameters.n_seq_max = _SEQUENCES
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.embeddings = True
        parameters.kv_unified = True
        parameters.no_perf = True
        context = lib.llama_init_from_model(self._model, parameters)
        if context and lib.llama_pooling_type(context) <= 0:
            # Models made for text say nothing about pooling (0), and then there is no vector per text.
            lib.llama_free(context)
            parameters.pooling_type = _MEAN
            context = lib.llama_init_from_model(self._model, parameters)
        if not context:
            raise OutOfMemory(f"there is no memory for embedding texts of {room} tokens")
        self._context, self._room = context, room

    def _fitting(self, todo: list[Tokens]) -> int:
        total = 0
        for count, each in enumerate(todo):
            total += len(each)
            if total > self._room or count == _SEQUENCES:
                return count
        return len(todo)

    def _decode(self, texts: list[Tokens]) -> list[list[float]]:
        lib = self._lib
        memory = lib.llama_get_memory(self._context)
        if memory:
            lib.llama_memory_clear(memory, False)
        batch = lib.llama_batch_init(sum(map(len, texts)), 0, 1)
        try:
            at = 0
            for sequence, tokens in enumerate(texts):
                for position, token in enumerate(tokens.tolist()):
                    batch.token[at], batch.pos[at] = token, position
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                    batch.logits[at] = 1
                    at += 1
            batch.n_tokens = at
            code = lib.llama_decode(self._context, batch) if memory else lib.llama_encode(self._context, batch)
            self.steps += 1
        finally:
            lib.llama_batch_free(batch)
        if code != 0:
            raise InternalError(f"computing embeddings failed with code {code}")
        return [self._vector(sequence) for sequence in range(len(texts))]

    def _vector(self, sequence: int) -> list[float]:
        pointer = self._lib.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise InternalError("the model gave no vector")
        vector = np.ctypeslib.as_array(pointer, shape=(self._width,)).astype(np.float64)
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm) or norm == 0:
            raise InvalidModel("the model computes values that are not numbers; its weights are damaged")
        result: list[float] = (vector / norm).astype(np.float32).tolist()
        return result

    def _free(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        self._context, self._room = None, 0

    def close(self) -> None:
        with self._lock:
            self._free()


def _check(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled("the embedding was cancelled")
