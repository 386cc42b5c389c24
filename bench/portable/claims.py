"""What the machines of `bench/portability.py` said and took, and whether that is what is claimed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench._cross import INSTRUCTIONS
from bench._machine import MACHINES
from bench.harness import Row, at_least, limit

RELATIVE, ABSOLUTE = 1e-4, 1e-5
MOST_S = 900.0
APART = 1e9
"""How far answers are apart that cannot be compared: another shape, or no numbers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the application said.

    Args:
        asked: the device in HETERO_COMPUTE; "" where it was not set.
        used: devices that worked, and their versions.
        machine: what the application took the processor for.
        first_s: from its start to its answer.
    """

    asked: str
    used: Mapping[str, str]
    machine: str
    digest: str
    first_s: float
    scores: Any = field(compare=False)


@dataclass(slots=True)
class Story:
    """One machine from nothing to its answers.

    Args:
        downloaded: when its packages were.
        seconds: of each step; `index` and `packages` are of that time, the others of this run.
        digests: place → SHA-256, and how many are those of the originals.
        vectors: vector instructions in the example in C, None where it was not compiled.
        executed: those of them that ran, None where no emulator has written it down.
    """

    architecture: str
    emulated: bool
    downloaded: str = ""
    packages: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    same: int = 0
    answers: list[Answer] = field(default_factory=list)
    vectors: int | None = None
    executed: int | None = None

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def apart(one: Any, other: Any) -> float:
    """The largest difference of two answers, in tolerances: they agree up to 1."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype or not one.size:
        return APART
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return APART
    allowed = ABSOLUTE + RELATIVE * np.abs(other.astype(np.float64))
    return min(APART, float((np.abs(one.astype(np.float64) - other) / allowed).max()))


def claims(stories: Sequence[Story], originals: int) -> list[Row]:
    """A row per claim. The first story's first answer is what all others are compared with."""
    rows = []
    reference = stories[0].answers[0].scores
    for number, story in enumerate(stories):
        name = story.architecture
        rows.append(at_least(f"{name}: files and folders with the same bytes as here", [story.same], [originals]))
        as_asked = [
            each
            for each in story.answers
            if each.machine == MACHINES[name] and each.used and (not each.asked or each.asked in each.used)
        ]
        rows.append(at_least(f"{name}: answers by the devices asked", [len(as_asked)], [len(story.answers)]))
        for place, answer in enumerate(story.answers):
            if (number, place) == (0, 0):
                continue
            device = answer.asked or "not asked for a device"
            rows.append(limit(f"{name}: {device}, farthest score", apart(answer.scores, reference), 1, "tolerance"))
        if story.vectors is not None:
            rows.append(
                at_least(f"{name}: {INSTRUCTIONS[name]} in the example in C", [story.vectors], [1])
            )  # fmt: skip
        if story.executed is not None:
            rows.append(at_least(f"{name}: those of them that ran", [story.executed], [1]))
        emulated = ", emulated" if story.emulated else ""
        rows.append(limit(f"{name}{emulated}: nothing to first answer", story.total_s, MOST_S, "s"))
    return rows


def table(stories: Sequence[Story]) -> str:
    """Bytes and seconds of every step, as Markdown."""
    lines = [
        "| machine | downloaded | index | packages | unpacking | installing | start to answer | in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in stories:
        sizes = {name: f"{size / 1e6:.1f} MB" for name, size in each.bytes.items()}
        cells = [
            f"{each.architecture}{', emulated' if each.emulated else ''}",
            each.downloaded,
            f"{sizes['index']}, {each.seconds['index']:.1f} s",
            f"{each.packages}: {sizes['packages']}, {each.seconds['packages']:.1f} s",
            *(f"{each.seconds[step]:.1f} s" for step in ("unpack", "install", "answer")),
            f"{each.total_s:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def keep(stories: Sequence[Story], path: Path) -> None:
    """The record: everything but the scores."""
    found = []
    for each in stories:
        values = asdict(each) | {"total_s": each.total_s}
        for answer in values["answers"]:
            del answer["scores"]
        found.append(values)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"relative": RELATIVE, "absolute": ABSOLUTE, "machines": found}, indent=1) + "\n")
