"""The tokenizer: byte-level BPE that never merges two Chinese characters.

llama.cpp splits text as ``tokenizer.ggml.pre = qwen2`` does before it merges bytes; the same expression
is used here. Merges are learned from text in which every Chinese character stands alone, so that at
run time each is a token of its own, whatever its neighbours: with little data that generalises better
than words do, and nothing has to be segmented before the model.

The beginning of every call, ``{"name": "reboot", "arguments": {``, and every argument with the end of
the call is one token as well. So choosing an action is one softmax over all actions, its probability
is the confidence, and an answer takes three decode steps.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

from ai_assistant.actions.text import UNKNOWN
from ai_assistant.models.recipe.data import Generator, sections, target

VOCABULARY = 4096
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
END, SYSTEM, USER, ASSISTANT, TOOL = range(5)
_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = r"[\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}]"
_CORPUS_SEED = 7
_CORPUS_SAMPLES = 120_000


def call_tokens() -> list[str]:
    """The pieces that calls are made of, in a fixed order; any call in the training data is two of them."""
    heads: set[str] = set()
    tails: set[str] = {"}}"}
    for section in sections():
        for mark in ("1", UNKNOWN):
            values = {key: value if value != "?" else (mark if mark == UNKNOWN else f"{key}-{mark}")
                      for key, value in section.arguments.items()}  # fmt: skip
            text = target(section.action, values)
            head = target(section.action, {}).removesuffix("}}")
            heads.add(head)
            tails.add(text.removeprefix(head))
    return [*sorted(heads), *sorted(tails)]


def _splitter(*, alone: bool) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    steps: list[Any] = [Split(Regex(_HAN), "isolated")] if alone else []
    steps += [Split(Regex(_SPLIT), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    return Sequence(steps)


def train_tokenizer(path: Path) -> None:
    """Learn the merges from training sentences and calls, and write the tokenizer as JSON."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = _splitter(alone=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(call_tokens()),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    samples = itertools.islice(Generator(_CORPUS_SEED), _CORPUS_SAMPLES)
    tokenizer.train_from_iterator((text for each in samples for text in (each.text, each.answer)), trainer)
    tokenizer.pre_tokenizer = _splitter(alone=False)
    # Not "special": they are ordinary text that a grammar may require and that a reader should see.
    tokenizer.add_tokens([AddedToken(each, normalized=False, special=False) for each in call_tokens()])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def cut_ids(tokenizer: Any, text: str, rng: random.Random) -> list[int]:
    """Tokens of a text that is cut at one or two random places first, so that odd pieces of words are familiar.

    It stands in for the library's own dropout of merges, which takes no seed.
    """
    if len(text) < 4:
        return list(tokenizer.encode(text).ids)
    places = sorted({rng.randrange(1, len(text)) for _ in range(rng.choice((1, 2)))})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    return [each for piece in pieces for each in tokenizer.encode(piece).ids]


def prompt_ids(tokenizer: Any, question: str, system: str = "", *, cut: random.Random | None = None) -> list[int]:
    """The chat template's rendering of one question, as tokens."""
    head = [SYSTEM, *tokenizer.encode(system).ids, END] if system else []
    body = list(tokenizer.encode(question).ids) if cut is None else cut_ids(tokenizer, question, cut)
    return [*head, USER, *body, END, ASSISTANT]
