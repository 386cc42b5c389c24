"""A case of the suite, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ai_assistant.hal.conformance.subject import Subject


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"
    """The process died of it."""
    HUNG = "hung"
    """It did not end within its time limit."""
    UNSUPPORTED = "unsupported"
    """The backend said beforehand that it cannot."""
    EXPECTED = "expected-failure"
    """It failed, and the backend's list of expected failures says so."""
    UNEXPECTED = "unexpected-pass"
    """It passed, but the list says that it fails: the list must shrink."""

    @property
    def bad(self) -> bool:
        return self in (Outcome.FAILED, Outcome.CRASHED, Outcome.HUNG, Outcome.UNEXPECTED)


class CaseFailed(Exception):
    """The backend did something wrong: what, in one sentence."""


class Unsupported(Exception):
    """The backend declared that it cannot do what the case asks for: the reason it gave."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a case that passed has to tell.

    Args:
        examples: how many inputs were tried; supported: how many of them the backend took.
    """

    detail: str = ""
    examples: int = 0
    supported: int = 0


Run = Callable[["Subject"], Note | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is tested.

    Args:
        id: as in L2.order; L3.<operator>.<type of elements>.
        about: what is right, in one sentence.
        weight: how many times the time limit of an ordinary case it may take.
    """

    id: str
    run: Run
    about: str
    weight: float = 1.0

    @property
    def level(self) -> int:
        return int(self.id[1])


@dataclass(frozen=True, slots=True)
class Result:
    case: str
    outcome: Outcome
    detail: str = ""
    examples: int = 0
    supported: int = 0


class Cases:
    """The cases of one module, in the order in which they are written."""

    def __init__(self) -> None:
        self._cases: dict[str, Case] = {}

    def case(self, name: str, *, weight: float = 1.0) -> Callable[[Run], Run]:
        """Make a function a case. The first line of its docstring says what is right."""

        def register(run: Run) -> Run:
            self.add(Case(name, run, (run.__doc__ or "").strip().split("\n")[0], weight))
            return run

        return register

    def add(self, case: Case) -> None:
        assert case.id not in self._cases, case.id
        self._cases[case.id] = case

    def all(self) -> tuple[Case, ...]:
        return tuple(self._cases.values())


def expect(condition: object, message: str) -> None:
    """Raises CaseFailed."""
    if not condition:
        raise CaseFailed(message)
