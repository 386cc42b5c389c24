"""The verdict about a boot: one check for each component, and for each difference what it means and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    AS_PUBLISHED = "as published"
    DIFFERS = "differs"
    INFORMATION = "information"


@dataclass(frozen=True, slots=True)
class Check:
    """One component. ``id`` is stable, for programs; everything else is for people. ``pcr`` is None for what no
    PCR holds. ``expected``, ``meaning`` and ``hint`` are empty where nothing differs."""

    id: str
    component: str
    pcr: int | None
    verdict: Verdict
    found: str
    expected: str = ""
    meaning: str = ""
    hint: str = ""


def published(name: str, component: str, pcr: int | None, found: str) -> Check:
    return Check(name, component, pcr, Verdict.AS_PUBLISHED, found)


def information(name: str, component: str, pcr: int | None, found: str) -> Check:
    return Check(name, component, pcr, Verdict.INFORMATION, found)


def differs(name: str, component: str, pcr: int | None, *, expected: str, found: str, meaning: str, hint: str) -> Check:
    return Check(name, component, pcr, Verdict.DIFFERS, found, expected, meaning, hint)


@dataclass(frozen=True, slots=True)
class Report:
    """``phases`` are those whose PCR 11 the TPM holds; empty when it holds none that is published."""

    checks: tuple[Check, ...]
    phases: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        return Verdict.DIFFERS if self.differences else Verdict.AS_PUBLISHED

    @property
    def differences(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.verdict is Verdict.DIFFERS)
