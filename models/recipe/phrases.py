"""The phrase files: a little grammar of what people say.

A file is a list of sections ``@ <action> [parameter=value …]``; each line below is ``kind: pattern``.
In a pattern, ``(a|b|)`` picks one part and ``{slot}`` picks a line of that section of slots.txt.
``{?m}`` and its like pick either a mark (``model-1``) or a name that does not exist, see `FILLERS`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "phrases"
KINDS = ("n", "q", "c", "p", "zn", "zq", "zc", "zp")
"""Noun phrase, question, command, noun phrase that takes few frames; z: the same in Chinese."""

Part = str | tuple[str, str] | tuple["Pattern", ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern: text, ("slot", name), or a tuple of alternatives."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Section:
    action: str
    arguments: Mapping[str, str]
    lines: tuple[tuple[str, Pattern], ...]


def parse(text: str) -> Pattern:
    """Raises ValueError for a parenthesis without its partner."""
    alternatives, rest = _alternatives(text, 0, top=True)
    if rest != len(text):
        raise ValueError(f"unbalanced parentheses in {text!r}")
    return alternatives[0]


def _alternatives(text: str, at: int, *, top: bool) -> tuple[list[Pattern], int]:
    found: list[Pattern] = []
    parts: list[Part] = []
    while at < len(text):
        char = text[at]
        if char == "(":
            inner, at = _alternatives(text, at + 1, top=False)
            if at >= len(text) or text[at] != ")":
                raise ValueError(f"unbalanced parentheses in {text!r}")
            parts.append(tuple(inner))
            at += 1
        elif char == ")":
            if top:
                raise ValueError(f"unbalanced parentheses in {text!r}")
            break
        elif char == "|" and not top:
            found.append(Pattern(tuple(parts)))
            parts = []
            at += 1
        elif char == "{":
            end = text.index("}", at)
            parts.append(("slot", text[at + 1 : end]))
            at = end + 1
        else:
            end = next((i for i in range(at, len(text)) if text[i] in "({)|"), len(text))
            end = max(end, at + 1)
            parts.append(text[at:end])
            at = end
    found.append(Pattern(tuple(parts)))
    return found, at


def read_sections(path: Path) -> list[Section]:
    """Raises ValueError with the line's number for anything that is no section or phrase."""
    sections: list[tuple[str, dict[str, str], list[tuple[str, Pattern]]]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("@"):
            action, *pairs = line[1:].split()
            sections.append((action, dict(pair.split("=", 1) for pair in pairs), []))
            continue
        kind, colon, pattern = line.partition(":")
        if kind not in KINDS or not colon or not sections:
            raise ValueError(f"{path.name}:{number}: not a phrase: {line[:60]!r}")
        sections[-1][2].append((kind, parse(pattern.strip())))
    return [Section(action, arguments, tuple(lines)) for action, arguments, lines in sections]


def read_slots(path: Path) -> dict[str, list[Pattern]]:
    slots: dict[str, list[Pattern]] = {}
    current: list[Pattern] = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("@"):
            current = slots.setdefault(line[1:].strip(), [])
        elif line.strip() and not line.startswith("#"):
            current.append(parse(line))
    return slots


def read_frames(path: Path) -> dict[str, Pattern]:
    """``name: pattern`` lines; the pattern may begin or end with a space that counts."""
    frames: dict[str, Pattern] = {}
    for line in path.read_text("utf-8").splitlines():
        name, colon, pattern = line.partition(": ")
        if colon and not line.startswith("#"):
            frames[name] = parse(pattern)
    return frames


_SYLLABLES = "ba ko ri sha tu len mo dar qui zel fa ni pro ex ond wu gra plu tis vor hem jy bax".split()  # noqa: SIM905


def _all(*patterns: str) -> list[Pattern]:
    return [parse(each) for each in patterns]


FILLERS = {
    "?m": _all(
        "(the|this|that|some|a|another|my|the other|the new|the old) (model|language model|llm|ai model|ai)",
        "(the |)(big|small|large|bigger|smaller|best|fast|default|chat|coding|embedding) model",
        "(the |)(model |)(llama|llama 3|gpt-4|gpt|qwen|qwen 2.5|gemma|mistral|mistral 7b|phi|phi-3|deepseek|deepseek r1"
        "|falcon|claude|bert|whisper|smollm|tinyllama|mixtral|yi|glm|baichuan|internlm)(| 7b| 1.5b| 70b| mini)",
        "(the |)model {nonsense}",
        "(the |)model (called |named |){nonsense}",
        "it",
    ),
    "?z": _all(
        "(这个|那个|一个|我的|新的|旧的|大的|小的|默认|)(模型|大模型|语言模型)",
        "(模型|)(llama|llama3|gpt|千问|通义千问|qwen|gemma|mistral|deepseek|文心|智谱|百川|phi3|豆包|混元)(模型|)",
        "模型{nonsense}",
    ),
    "?t": _all("mars", "the moon", "{nonsense}", "my place", "somewhere else", "another one"),
    "?zt": _all("火星", "月球", "别的地方", "另一个", "{znonsense}"),
}
"""What is said where a name belongs, though nothing of that name exists: in English and Chinese, models and zones."""
UNKNOWN_SHARE = 0.22
_AROUND = {
    "?m": ("{}", "{}", "the model {}", "the {} model", "model {}", "the {}"),
    "?z": ("{}", "{}", "模型{}", "{}模型", "{}这个模型"),
}


class Expander:
    """Expands patterns with one random generator, so that a seed gives the same sentences everywhere."""

    def __init__(self, rng: random.Random, slots: Mapping[str, list[Pattern]]) -> None:
        self._rng = rng
        self._slots = slots
        self.unknown = False
        """Whether the last expansion named something that does not exist."""

    def expand(self, pattern: Pattern) -> str:
        self.unknown = False
        return " ".join(self._expand(pattern).split())

    def _expand(self, pattern: Pattern) -> str:
        out: list[str] = []
        for part in pattern.parts:
            if isinstance(part, str):
                out.append(part)
            elif part and isinstance(part[0], Pattern):
                chosen = self._rng.choice(part)
                assert isinstance(chosen, Pattern)
                out.append(self._expand(chosen))
            else:
                out.append(self._slot(str(part[1])))
        return "".join(out)

    def _slot(self, name: str) -> str:
        rng = self._rng
        if name == "nonsense":
            return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))
        if name == "znonsense":
            return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(2, 5)))
        if name in FILLERS:
            self.unknown = rng.random() < UNKNOWN_SHARE
            if self.unknown:
                return self._expand(rng.choice(FILLERS[name]))
            if name in ("?t", "?zt"):
                return "zone-1"
            return rng.choice(_AROUND[name]).format("model-1")
        return self._expand(rng.choice(self._slots[name]))


def clean(text: str) -> str:
    """Spaces in a Chinese phrase are only there to part pattern pieces."""
    return re.sub(r"\s+", " ", text).strip()
