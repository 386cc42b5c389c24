"""How much each part of the serving bench does, and about how long that takes: all of it within an hour and ten.

The speeds are guesses for two cores with AVX-512, on the low side, and serve only to choose sizes and to tell a person
how long to wait; no result is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = (1, 4, 8, 16)
TOKENS_PER_WORD = 3
_SEED_TOKENS = 6
"""What the number before a text is read as."""
_BASELINE_PREFILL, _BASELINE_DECODE, _AVX2 = 24.0, 5.7, 1.6
"""How many times slower the plain plug-ins are (x86-64 in prefill and decode; AVX2 in both)."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of a shape, and seconds until a server has it."""

    prefill: float
    decode: tuple[float, float, float, float]
    """At 1, 4, 8 and 16 streams."""
    start_s: float


SPEEDS = {
    "tiny": Speed(3000, (300, 900, 1500, 2000), 4),
    "0.5B": Speed(400, (80, 180, 220, 300), 10),
    "1B": Speed(150, (35, 80, 100, 140), 15),
    "7B": Speed(10, (3, 6, 8, 9), 120),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one shape. Words of prompts, tokens of answers."""

    pairs: int
    cheap_pairs: int
    """Of parts whose samples take few seconds."""
    decode_tokens: tuple[int, int, int, int]
    """Per stream, at 1, 4, 8 and 16 streams."""
    prefill_words: int
    arrivals: int
    arrival_words: int
    arrival_tokens: int
    people: int
    turns: int
    shared_words: int
    said_words: int
    variant_words: int
    variant_tokens: int


SIZES = {
    "tiny": Sizes(5, 5, (8, 8, 8, 8), 20, 5, 6, 4, 5, 2, 20, 8, 10, 4),
    "0.5B": Sizes(5, 7, (96, 96, 80, 64), 130, 24, 12, 8, 12, 4, 170, 8, 20, 16),
    "1B": Sizes(5, 5, (96, 96, 80, 64), 130, 20, 12, 8, 8, 4, 170, 8, 20, 16),
}
TRACE_TOKENS = 4
MIXED_WORDS = tuple(7 * each for each in range(1, 9))
"""Prompts of the memory parts."""
MIXED_TOKENS = 24
SEVEN_CONTEXT, SEVEN_WORDS = 512, 150
"""Of the model of 7 B: the prompt nearly fills the context."""


def expected_s(part: str, shape: str, pairs: int = 0) -> float:
    """About how long a part takes, in seconds; most of it with a peer that remembers nothing.

    Args:
        pairs: 0 is what `SIZES` says.
    """
    if part in ("overhead", "api"):
        return 90.0
    if part == "seven":
        speed = SPEEDS["7B"]
        return speed.start_s + _tokens(SEVEN_WORDS) / speed.prefill + 32 / speed.decode[0]
    speed, sizes = SPEEDS[shape], SIZES[shape]
    many, few = pairs or sizes.cheap_pairs, pairs or sizes.pairs
    start = 2 * speed.start_s
    if part == "decode":
        return sum(
            start + 2 * (many + 1) * streams * (2 * _tokens(8) / speed.prefill + (16 + tokens) / rate)
            for streams, tokens, rate in zip(STREAMS, sizes.decode_tokens, speed.decode, strict=True)
        )
    if part == "prefill":
        return start + 2 * (many + 1) * _tokens(sizes.prefill_words) / speed.prefill
    if part == "poisson":
        one = _tokens(sizes.arrival_words) / speed.prefill + sizes.arrival_tokens / speed.decode[0]
        return start + 10 * one + 2 * few * (sizes.arrivals + 1) * 2 * one
    if part == "trace":
        # A turn repeats what was said before it; ours and half of the peer's beginnings are remembered.
        said = _tokens(sizes.said_words)
        whole = _tokens(sizes.shared_words) + said * (sizes.turns + 1) / 2
        read = (said + whole) / speed.prefill
        return start + few * sizes.people * sizes.turns * (read + 2 * TRACE_TOKENS / speed.decode[0])
    if part == "variants":
        prompt = _tokens(sizes.variant_words) / speed.prefill
        answer = sizes.variant_tokens / speed.decode[0]
        baseline = prompt * _BASELINE_PREFILL + answer * _BASELINE_DECODE
        # Each sample is a process that loads the model and reads a few tokens to warm up.
        return few * (4 * 0.7 * speed.start_s + baseline * 1.3 + (prompt + answer) * (2 + _AVX2) * 1.3)
    if part in ("memory", "transformers"):
        read = sum(_tokens(each) for each in MIXED_WORDS) / speed.prefill
        return 2 * (2 * speed.start_s + 2 * (read + 8 * MIXED_TOKENS / speed.decode[2]))
    raise KeyError(part)


def _tokens(words: int) -> int:
    return TOKENS_PER_WORD * words + _SEED_TOKENS
