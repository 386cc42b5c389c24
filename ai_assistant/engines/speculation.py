"""Guessing tokens ahead: several are checked in one pass over the weights, which costs little more than one.

A guess is only ever compared with what the sequence's own sampler chooses from the model's logits at that
place, one place after the other. So the answer is the one that would have come without guessing, at any
temperature, under any grammar and with the same seed: for a guess that is certain, this is what rejection
sampling comes to. What a guess costs and saves depends on the text and the machine, so it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.memory import MOST_AHEAD

_FIRST_AHEAD = 4
_LONGEST_NGRAM = 4
_SHORTEST_NGRAM = 2
_WINDOW = 1 << 16
"""Tokens back that are searched."""


def lookup(history: Tokens, count: int) -> Tokens:
    """What followed the last time that the history ended like this: `count` tokens, or none."""
    history = history[-_WINDOW:]
    for length in range(_LONGEST_NGRAM, _SHORTEST_NGRAM - 1, -1):
        if len(history) <= length:
            continue
        ends = np.flatnonzero(history[length - 1 : -1] == history[-1])
        for back in range(2, length + 1):
            if not len(ends):
                break
            ends = ends[history[ends + length - back] == history[-back]]
        if len(ends):
            # What ends in the middle of a repetition goes on with it.
            return np.resize(history[int(ends[-1]) + length :], count)
    return history[:0]


class Drafter(Protocol):
    """Something that guesses; one row per sequence, each up to `count` tokens."""

    def propose(self, wanted: Sequence[tuple[int, Tokens]], count: int) -> list[Tokens]: ...

    def close(self) -> None: ...

    def trim(self) -> None: ...


class Lookup:
    """Guesses from the conversation's own text: no model, no state."""

    def propose(self, wanted: Sequence[tuple[int, Tokens]], count: int) -> list[Tokens]:
        rows: list[Tokens] = []
        for _, history in wanted:
            row = lookup(history, count)
            rows.append(row)
            if not len(row):
                break  # All or none are guessed for in a step.
        return rows

    def close(self) -> None:
        pass

    def trim(self) -> None:
        pass


def next_reach(reach: int, guessed: int, accepted: int) -> int:
    """How many to guess next for a sequence: more after a full hit, fewer after a miss."""
    reach = reach or _FIRST_AHEAD
    if accepted == guessed:
        return min(MOST_AHEAD, max(reach, guessed * 2))
    if accepted == 0:
        return max(2, reach // 2)
    return max(2, min(MOST_AHEAD, accepted + 2))


def first_reach(reach: int) -> int:
    return reach or _FIRST_AHEAD


class Gain:
    """Decides from measured steps whether guessing pays, for one number of sequences.

    It pays when a guessing step brings more tokens per second than plain ones. Tried for a few steps, left
    off for a while that doubles with each failure, and kept until it is clearly slower: the margins keep
    it from flapping.
    """

    _TRIAL = 8
    _CHECK = 16
    _ON, _OFF = 1.05, 0.98
    _REFRESH = 64
    """Guessing steps after which a plain one is measured again; contexts grow."""
    _LEAST_PAUSE, _MOST_PAUSE = 64, 4096

    def __init__(self) -> None:
        self.on = False
        self._plain_s = 0.0
        self._plain = 0
        self._pause = 0
        self._next_pause = self._LEAST_PAUSE
        self._steps = 0
        self._since_plain = 0
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def wanted(self) -> bool:
        """Whether the next step should guess."""
        return self._plain >= 4 and self._pause <= 0 and self._since_plain < self._REFRESH

    def plain(self, seconds: float) -> None:
        """A step without guesses took so long; it brought each sequence one token."""
        self._plain += 1
        # The first ones are slower: buffers are touched for the first time.
        weight = 1.0 if self._plain <= 2 else 0.125 if self._since_plain == 0 else 0.5
        self._plain_s += (seconds - self._plain_s) * weight
        self._since_plain = 0
        self._pause -= 1

    def guessed(self, tokens: float, seconds: float) -> None:
        """A step with guesses took so long and brought each sequence so many tokens, on average."""
        self._steps += 1
        self._since_plain += 1
        self._tokens += tokens
        self._seconds += seconds
        if self._steps < (self._CHECK if self.on else self._TRIAL):
            return
        gain = self._tokens / self._seconds * self._plain_s if self._seconds > 0 else 0.0
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0
        if gain >= (self._OFF if self.on else self._ON):
            self.on = True
            self._next_pause = self._LEAST_PAUSE
        else:
            self.on = False
            self._pause = self._next_pause
            self._next_pause = min(self._MOST_PAUSE, self._next_pause * 2)


class Speculation:
    """Guesses for all sequences of a step or for none, since the library takes neighbours of equal length in one pass.

    Args:
        measured: guess only while it pays; otherwise whenever there is a guess.
        most: guesses of one step, all sequences together.
    """

    def __init__(self, drafter: Drafter, *, measured: bool, most: int) -> None:
        self._drafter = drafter
        self._measured = measured
        self._most = most
        self._gains: dict[int, Gain] = {}
        self.drafted = 0
        self.accepted = 0

    def gain(self, sequences: int) -> Gain:
        found = self._gains.get(sequences)
        if found is None:
            found = self._gains[sequences] = Gain()
        return found

    def propose(self, wanted: Sequence[tuple[int, Tokens]], count: int) -> list[Tokens] | None:
        """Rows of equal length, at least one token each; None: not now.

        Args:
            wanted: for each sequence its number and its tokens, the undecoded last one included.
            count: tokens that every sequence has room for.
        """
        count = min(count, self._most // len(wanted))
        if count < 1 or (self._measured and not self.gain(len(wanted)).wanted):
            return None
        rows = self._drafter.propose(wanted, count)
        shortest = min(map(len, rows), default=0)
        if len(rows) < len(wanted) or shortest < 1:
            return None
        return [each[:shortest] for each in rows]

    def plain(self, sequences: int, seconds: float) -> None:
        self.gain(sequences).plain(seconds)

    def guessed(self, sequences: int, drafted: int, accepted: int, seconds: float) -> None:
        """A step with guesses is over."""
        self.drafted += drafted
        self.accepted += accepted
        self.gain(sequences).guessed(1 + accepted / sequences, seconds)

    def trim(self) -> None:
        self._drafter.trim()

    def close(self) -> None:
        self._drafter.close()
