"""One step's tokens, in the arrays that the library reads: no copy, no call per token."""

from __future__ import annotations

from typing import Any

import numpy as np

Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Batch:
    """Up to `size` tokens of several sequences, with a mark at those whose logits are wanted.

    Sequences are added in the order of their numbers: the library puts neighbours of equal length into
    one pass over the weights, and only neighbours.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self.tokens: Tokens = np.zeros(size, dtype=np.int32)
        self.positions: Tokens = np.zeros(size, dtype=np.int32)
        self.sequences: Tokens = np.zeros(size, dtype=np.int32)
        self.ones: Tokens = np.ones(size, dtype=np.int32)
        self.wanted = np.zeros(size, dtype=np.int8)
        address = self.sequences.ctypes.data
        self.pointers = np.arange(address, address + 4 * size, 4, dtype=np.uint64)
        self._range: Tokens = np.arange(size, dtype=np.int32)

    @property
    def room(self) -> int:
        return self.size - self.count

    def clear(self) -> None:
        self.count = 0

    def add(self, sequence: int, token: int, position: int) -> int:
        """One token, with logits. Returns its index."""
        at = self.count
        self.tokens[at] = token
        self.positions[at] = position
        self.sequences[at] = sequence
        self.wanted[at] = 1
        self.count = at + 1
        return at

    def extend(self, sequence: int, part: Tokens, position: int, wanted: int) -> int:
        """Consecutive tokens from `position` on, the last `wanted` of them with logits. Returns the first's index."""
        at, count = self.count, len(part)
        end = at + count
        self.tokens[at:end] = part
        self.positions[at:end] = self._range[:count] + position
        self.sequences[at:end] = sequence
        self.wanted[at:end] = 0
        if wanted:
            self.wanted[end - wanted : end] = 1
        self.count = end
        return at
