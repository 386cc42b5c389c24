"""Training sentences: phrases in frames of politeness, with noise, each with the call that answers it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.actions.text import UNKNOWN, normalise
from ai_assistant.models.recipe.phrases import FOLDER, Expander, Section, read_frames, read_sections, read_slots

NONE = "none"
NONE_SHARE = 0.36
"""Of the sentences: most of what a person can say is not for this appliance."""
CHANGE_WEIGHT = 1.5
RAW_SHARE = 0.12
"""Sentences left as a person types them, for callers that do not normalise."""
EVAL = Path(__file__).parents[1] / "eval"
PHRASE_FILES = ("read.txt", "models.txt", "change.txt", "none.txt")

_FILLERS = frozenset({
    "the", "a", "an", "is", "are", "of", "me", "to", "this", "your", "please", "can", "you", "do", "does", "s",
    "for", "on", "in", "的", "了", "一", "下",
})  # fmt: skip
_MARKS = ("model-1", "model-2", "zone-1")
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@dataclass(frozen=True, slots=True)
class Sample:
    text: str
    answer: str
    """The call as the model is to write it."""
    action: str


def target(action: str, arguments: dict[str, str]) -> str:
    """One call in the spacing that a grammar made from a JSON schema admits (one space after : and ,)."""
    return json.dumps({"name": action, "arguments": arguments}, ensure_ascii=False)


def sections() -> list[Section]:
    return [section for name in PHRASE_FILES for section in read_sections(FOLDER / name)]


def held_out() -> frozenset[str]:
    """Every sentence of the evaluation sets, normalised: none of them may be trained on."""
    texts: set[str] = set()
    for path in EVAL.glob("*.jsonl"):
        texts.update(normalise(json.loads(line)["text"]) for line in path.read_text("utf-8").splitlines())
    return frozenset(texts)


class Generator:
    """An endless stream of samples; the same seed gives the same stream."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._expander = Expander(self._rng, read_slots(FOLDER / "slots.txt"))
        self._frames = read_frames(FOLDER / "frames.txt")
        every = sections()
        self._none = [each for each in every if each.action == NONE]
        self._some = [each for each in every if each.action != NONE]
        changes = {each.action for name in ("models.txt", "change.txt") for each in read_sections(FOLDER / name)}
        self._weights = [CHANGE_WEIGHT if each.action in changes else 1.0 for each in self._some]
        self._held_out = held_out()

    def __iter__(self) -> Iterator[Sample]:
        while True:
            sample = self.one()
            if normalise(sample.text) not in self._held_out:
                yield sample

    def one(self) -> Sample:
        rng = self._rng
        refuse = rng.random() < NONE_SHARE
        section = rng.choice(self._none) if refuse else rng.choices(self._some, self._weights)[0]
        want_zh = rng.random() < 0.45
        lines = [line for line in section.lines if line[0].startswith("z") == want_zh]
        # A short list of kinds first: a section with twenty questions and one noun phrase should still use the noun.
        kind = rng.choice([each for each, _ in lines])
        pattern = rng.choice([each for name, each in lines if name == kind])
        text = self._expander.expand(pattern)
        unknown = self._expander.unknown
        arguments = {key: (f"{key}-1" if value == "?" else value) for key, value in section.arguments.items()}
        if unknown:
            arguments = {key: (UNKNOWN if value == "?" else value) for key, value in section.arguments.items()}
        text = self._framed(kind, text)
        text = self._noisy(text) if rng.random() < 0.3 else text
        raw = rng.random() < RAW_SHARE
        text = self._as_typed(text) if raw else normalise(text)
        return Sample(text, target(section.action, arguments), section.action)

    def _framed(self, kind: str, text: str) -> str:
        before = self._frame(kind)
        if not kind.startswith("z"):
            return f"{before} {text} {self._frame('end')}"
        if kind == "zn":
            return before + text + self._frame("zn_end")
        if kind == "zq":
            return before + text + (self._frame("z_end") if self._rng.random() < 0.3 else "")
        return before + text + self._frame("z_end")

    def _frame(self, name: str) -> str:
        return self._expander.expand(self._frames[name])

    def _noisy(self, text: str) -> str:
        """A slip of the fingers or a missing small word; marks and negations stay whole."""
        rng = self._rng
        words = text.split()
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(words)) if words else 0
            if not words or any(each in words[at] for each in _MARKS):
                continue
            word = words[at]
            if word in _FILLERS and len(words) > 2:
                del words[at]
            elif word.isascii() and word.isalpha() and len(word) >= 5 and word not in ("never", "model"):
                words[at] = self._slip(word)
            elif not word.isascii() and len(word) > 5:
                drop = [i for i, char in enumerate(word) if char in "的了一下请吗呢"]
                if drop:
                    i = rng.choice(drop)
                    words[at] = word[:i] + word[i + 1 :]
        return " ".join(words)

    def _slip(self, word: str) -> str:
        rng = self._rng
        i = rng.randrange(1, len(word) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        if kind == 1:
            return word[:i] + word[i + 1 :]
        if kind == 2:
            return word[:i] + word[i] + word[i:]
        row = next(each for each in (*_KEYS, word[i]) if word[i] in each)
        near = row[(row.index(word[i]) + rng.choice((-1, 1))) % len(row)]
        return word[:i] + near + word[i + 1 :]

    def _as_typed(self, text: str) -> str:
        rng = self._rng
        style = rng.randrange(4)
        if style == 0:
            text = text[:1].upper() + text[1:]
        elif style == 1 and rng.random() < 0.3:
            text = text.upper().replace("MODEL-", "model-").replace("ZONE-", "zone-")
        end = rng.choice(["?", ".", "!", "", "?"]) if text.isascii() else rng.choice(["？", "。", "！", "", "?"])
        return text + end
