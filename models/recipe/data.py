"""Training sentences: phrases in frames of politeness, with noise, each with the call that answers it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.actions.text import UNKNOWN, normalise
from ai_assistant.models.recipe.phrases import FOLDER, Expander, Section, parse, read_sections, read_slots

NONE = "none"
NONE_SHARE = 0.36
"""Of the sentences: most of what a person can say is not for this appliance."""
CHANGE_WEIGHT = 1.5
RAW_SHARE = 0.12
"""Sentences left as a person types them, for callers that do not normalise."""
EVAL = Path(__file__).parents[1] / "eval"
PHRASE_FILES = ("read.txt", "models.txt", "change.txt", "none.txt")

_Q_EN = parse("(||||||hey |hi |please tell me |can you tell me |could you tell me |tell me |ok |so |and |quick question |i wonder "
              "|do you know |excuse me |id like to know |i want to know |hello |say |well |now |hey there |um |yo |assistant )")  # fmt: skip
_C_EN = parse("(||||||please |can you |could you |could you please |can you please |please |i want you to |i need you to |go ahead and "
              "|would you |hey |ok |now |kindly |id like you to |lets |just |would you mind to |hey can you |ok now |you should |then "
              "|hi please |will you |make sure to |try to |if you can )")  # fmt: skip
_N_EN = parse("(||||||whats |what is |show |show me |tell me |give me |i need |i want to see |can i see |can you show me |could you tell me "
              "|check |display |report |print |get |how about |id like to know |let me see |do you know |fetch |please show |please give me "
              "|i want |whats with |read out |look up |i would like |can you check |may i see |i want to know |please check |what about "
              "|can you give me |can i get |lets see |hey whats |info on |information about |details on |query )")  # fmt: skip
_P_EN = parse("(|||i need |i want |give me |please |id like |i would like )")
_END_EN = parse("(||||||| please| please| thanks| for me| thank you| pls| quickly| if you can| would you| asap)")
_Q_ZH = parse("(||||||请问|你知道|告诉我|帮我看看|麻烦问一下|我想知道|我想问一下|那|嗨|你好|帮我查一下|看看|说说|对了|喂|问一下|那个|查一下)")
_C_ZH = parse("(||||||请|帮我|麻烦|麻烦你|请帮我|你|能不能|能帮我|给我|现在|马上|请你|帮忙|可以帮我|我要|我想|赶紧|快|现在请|你帮我|好的)")
_N_ZH = parse("(||||||看看|看下|查看|查一下|告诉我|我想知道|显示|请问|帮我看看|帮我查|能不能告诉我|给我看|我要看|说一下|报告|看一下|请显示|"
              "我想看|查查|帮我看一下|读一下|给我|你知道|瞧瞧|想看看|我想了解)")  # fmt: skip
_P_ZH = parse("(|||来个|我要|给我|请|需要)")
_N_END_ZH = parse("(||||||是多少|怎么样|呢|是什么|如何|多少|情况|是啥|现在怎样|好不好|吧|看看)")
_END_ZH = parse("(||||||||吧|谢谢|好吗|呀|啊|可以吗|行吗|呢|一下|拜托)")
_FILLERS = frozenset("the a an is are of me to this your please can you do does s for on in 的 了 一 下".split())
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
        if rng.random() < NONE_SHARE:
            section = rng.choice(self._none)
        else:
            section = rng.choices(self._some, self._weights)[0]
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
        return Sample(self._as_typed(text) if raw else normalise(text), target(section.action, arguments), section.action)

    def _framed(self, kind: str, text: str) -> str:
        expand = self._expander.expand
        if kind == "n":
            return f"{expand(_N_EN)} {text} {expand(_END_EN)}"
        if kind == "q":
            return f"{expand(_Q_EN)} {text} {expand(_END_EN)}"
        if kind == "c":
            return f"{expand(_C_EN)} {text} {expand(_END_EN)}"
        if kind == "p":
            return f"{expand(_P_EN)} {text} {expand(_END_EN)}"
        if kind == "zn":
            return expand(_N_ZH) + text + expand(_N_END_ZH)
        if kind == "zq":
            return expand(_Q_ZH) + text + (expand(_END_ZH) if self._rng.random() < 0.3 else "")
        if kind == "zc":
            return expand(_C_ZH) + text + expand(_END_ZH)
        return expand(_P_ZH) + text + expand(_END_ZH)

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
        end = rng.choice("?,.,!,,?".split(",")) if text.isascii() else rng.choice("？,。,！,,?".split(","))
        return text + end
