"""A context without a model: the next token is a sum over all before it, so any mistake in a cache shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ai_assistant.engines.batch import Batch, Tokens
from ai_assistant.engines.output import PlainOutput
from ai_assistant.engines.scheduler import Scheduler
from ai_assistant.engines.task import Task
from ai_assistant.errors import OutOfMemory

VOCABULARY = 97


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after `tokens`."""
    total = 7
    for each in tokens[-200:]:
        total = (total * 31 + each + 1) % 1_000_003
    return total % VOCABULARY


def following(tokens: Sequence[int], count: int, model: Callable[[Sequence[int]], int] = next_token) -> list[int]:
    """The next `count` tokens, each the model's choice."""
    row = list(tokens)
    for _ in range(count):
        row.append(model(row))
    return row[len(tokens) :]


class FakeContext:
    """Fulfils `Context`. Every misuse is an assertion: the scheduler's thread ends, and its tasks fail."""

    def __init__(
        self,
        sequences: int = 4,
        *,
        whole: bool = False,
        model: Callable[[Sequence[int]], int] = next_token,
        vocabulary: int = VOCABULARY,
    ) -> None:
        self.whole = whole
        self.scratch: Any = None
        self.untouched_bytes = 0
        self.rows: list[list[int]] = [[] for _ in range(sequences)]
        self.batches: list[list[tuple[int, int]]] = []
        """Of each batch: sequence and tokens, in order."""
        self.read = 0
        self.copies = 0
        self.fail_open = self.fail_save = self.fail_restore = False
        self.fail_decode = 0
        self.before_decode: Callable[[], None] = lambda: None
        self._model = model
        self._vocabulary = vocabulary
        self._open = False
        self._outputs: dict[int, list[int]] = {}

    @property
    def is_open(self) -> bool:
        return self._open

    def open(self) -> None:
        if self.fail_open:
            raise OutOfMemory("there is no memory")
        self._open = True

    def close(self) -> None:
        self._open = False
        self.clear()

    def decode(self, batch: Batch) -> int:
        assert self._open
        assert 0 < batch.count <= batch.size
        self.before_decode()
        self._outputs.clear()
        parts: list[tuple[int, int]] = []
        for index in range(batch.count):
            sequence = int(batch.sequences[index])
            row = self.rows[sequence]
            assert int(batch.positions[index]) == len(row), "a position that does not follow"
            row.append(int(batch.tokens[index]))
            if parts and parts[-1][0] == sequence:
                parts[-1] = (sequence, parts[-1][1] + 1)
            else:
                parts.append((sequence, 1))
            if batch.wanted[index]:
                self._outputs[index] = list(row)
        assert len({sequence for sequence, _ in parts}) == len(parts), "a sequence in two pieces"
        assert parts == sorted(parts), "neighbours apart"
        self.batches.append(parts)
        self.read += batch.count
        if self.fail_decode:
            self.fail_decode -= 1
            return -1
        return 0

    def row(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        logits = np.zeros(self._vocabulary, dtype=np.float32)
        logits[self._model(self._outputs[index])] = 1
        return logits

    def cut(self, sequence: int, length: int) -> int:
        assert length < len(self.rows[sequence])
        if self.whole:
            length = 0
        del self.rows[sequence][length:]
        return length

    def copy(self, source: int, target: int, length: int) -> bool:
        assert not self.whole
        assert source != target
        assert length == len(self.rows[source])
        self.rows[target] = list(self.rows[source])
        self.copies += 1
        return True

    def save(self, sequence: int) -> bytearray | None:
        return None if self.fail_save else bytearray(np.array(self.rows[sequence], dtype=np.int32).tobytes())

    def restore(self, sequence: int, state: bytearray, length: int) -> bool:
        self.rows[sequence] = []
        if self.fail_restore:
            return False
        self.rows[sequence] = np.frombuffer(bytes(state), dtype=np.int32).tolist()
        return len(self.rows[sequence]) == length

    def clear(self) -> None:
        for row in self.rows:
            row.clear()


class Greedy:
    """A sampler."""

    complete = False
    closed = False

    def choose(self, logits: np.ndarray[Any, np.dtype[np.float32]], _scratch: object) -> int:
        return int(logits.argmax())

    def close(self) -> None:
        self.closed = True


class Letters:
    """A vocabulary in which every token is one character."""

    def __init__(self, end: int = -1) -> None:
        self._end = end

    def is_end(self, token: int) -> bool:
        return token == self._end

    @staticmethod
    def piece(token: int) -> bytes:
        return chr(token + 0x100).encode()


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(each + 0x100) for each in tokens)


def task(prompt: Sequence[int] | Tokens, limit: int = 8, stops: tuple[str, ...] = (), **options: Any) -> Task:
    sampler: Any = Greedy()
    output: Any = PlainOutput(stops)
    return Task(np.array(prompt, dtype=np.int32), limit, sampler, output, None, **options)


def scheduler(context: FakeContext, *, vocabulary: Any = None, **options: Any) -> Scheduler:
    values = {"context_length": 512, "sequences": len(context.rows), "batch_tokens": 64, "max_queued": 64, **options}
    letters: Any = vocabulary or Letters()
    return Scheduler(context, letters, **values)
