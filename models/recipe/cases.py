"""The hand-written questions, and how answers to them are counted. Needs nothing but the catalogue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ai_assistant.actions.catalogue import BY_NAME, NONE, Effect
from ai_assistant.actions.caution import forbidden
from ai_assistant.actions.confidence import sure
from ai_assistant.actions.text import UNKNOWN, Marked, mark

SETS = ("dev", "test", "hard")
"""dev: thresholds and phrases were chosen with it; test: plain questions; hard: idioms, allusions and traps."""
EVAL = Path(__file__).parents[1] / "eval"
LIVE: Mapping[str, tuple[str, ...]] = {
    "model": ("assistant:1", "gemma-3-270m:q4", "mini-chat:2", "qwen2.5-0.5b:1"),
    "zone": ("America/New_York", "Asia/Shanghai", "Asia/Tokyo", "Europe/Berlin", "Europe/London", "Europe/Madrid",
             "Europe/Paris", "UTC"),
}  # fmt: skip
"""The names that exist in the world of the questions."""


@dataclass(frozen=True, slots=True)
class Case:
    text: str
    language: str
    action: str
    arguments: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said of one question, with real names in the arguments."""

    action: str
    arguments: Mapping[str, str]
    confidence: float


Predict = Callable[[Marked], Answer]


def read_cases(name: str) -> list[Case]:
    """One of `SETS`."""
    lines = (EVAL / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [Case(**json.loads(line)) for line in lines if line.strip()]


def marked(case: Case) -> Marked:
    return mark(case.text, LIVE)


def refused(answer: Answer, text: str) -> bool:
    """Whether the product would decline to act on this answer to a normalised question, as `Asker` does.

    No action fits, it is not sure enough, a name does not exist, or the words forbid a change.
    """
    if answer.action == NONE or UNKNOWN in answer.arguments.values():
        return True
    changes = BY_NAME[answer.action].effect is Effect.CHANGE
    return not sure(answer.confidence, changes=changes) or (changes and forbidden(answer.action, text))


@dataclass(slots=True)
class Score:
    """Counts over one set. "wrong" acted otherwise than was wanted, with what kind of action."""

    questions: int = 0
    in_scope: int = 0
    right: int = 0
    refused_in_scope: int = 0
    out_of_scope: int = 0
    refused_out_of_scope: int = 0
    wrong: int = 0
    wrong_changes: int = 0
    mistakes: list[str] = field(default_factory=list)

    def add(self, case: Case, answer: Answer, *, declined: bool) -> None:
        """`declined`: whether the product refused to act on this answer."""
        self.questions += 1
        wants_refusal = case.action == NONE or UNKNOWN in case.arguments.values()
        right = (answer.action, dict(answer.arguments)) == (case.action, dict(case.arguments))
        self.in_scope += not wants_refusal
        self.out_of_scope += wants_refusal
        if declined:
            self.refused_out_of_scope += wants_refusal
            self.refused_in_scope += not wants_refusal
            if not wants_refusal:
                self._note("refused", case, answer)
        elif right:
            self.right += 1
        else:
            self.wrong += 1
            self.wrong_changes += BY_NAME[answer.action].effect is Effect.CHANGE
            self._note("WRONG", case, answer)

    def _note(self, kind: str, case: Case, answer: Answer) -> None:
        said = f"{answer.action} {dict(answer.arguments) or ''}".strip()
        self.mistakes.append(f"{kind}: {case.text!r} wanted {case.action}, said {said} ({answer.confidence:.3f})")

    def summary(self) -> dict[str, float | int]:
        """Shares are 0 to 1: accuracy and refusals of what is in scope, wrong actions of all questions."""
        return {
            "questions": self.questions,
            "accuracy": round(self.right / max(1, self.in_scope), 4),
            "refused_in_scope": round(self.refused_in_scope / max(1, self.in_scope), 4),
            "refused_out_of_scope": round(self.refused_out_of_scope / max(1, self.out_of_scope), 4),
            "wrong": round(self.wrong / max(1, self.questions), 4),
            "wrong_changes": self.wrong_changes,
        }


def score(cases: Iterable[Case], predict: Predict) -> Score:
    total = Score()
    for case in cases:
        question = marked(case)
        answer = predict(question)
        total.add(case, answer, declined=refused(answer, question.text))
    return total


def with_names(arguments: Mapping[str, str], question: Marked) -> dict[str, str]:
    """Replace marks such as ``model-1`` by the names that they stand for."""
    return {key: question.values.get(key, {}).get(value, value) for key, value in arguments.items()}
