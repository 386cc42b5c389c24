"""What each level asks for. docs/certification.md says the same in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from ai_assistant.hal.conformance import VERSION
from ai_assistant.hal.conformance.case import Outcome, Result

PROFILE_PREFIX = "L3.profile."
PROFILE_SIZE = 12
MODELS = ("L4.cnn", "L4.minilm", "L4.soak", "L4.transformer")
RUNTIME = (
    "L1.allocate.arguments", "L1.capabilities", "L1.foreign", "L1.identity", "L1.load", "L1.open.again",
    "L1.open.unknown", "L1.probe", "L1.submit.arguments", "L1.supports.odd", "L1.supports.shapes",
    "L1.supports.unknown", "L2.adopt", "L2.alignment", "L2.allocate", "L2.asynchronous", "L2.bounds",
    "L2.close", "L2.copy", "L2.copy.outside", "L2.descriptor", "L2.events", "L2.exhausted", "L2.failure",
    "L2.free", "L2.free.unowned", "L2.leak", "L2.leak.programs", "L2.limits", "L2.offset", "L2.order",
    "L2.queues.beside", "L2.queues.limit", "L2.run", "L2.stress", "L2.threads", "L2.view",
)  # fmt: skip
"""Without these cases a report shows nothing, whatever it says. A test holds the lists against the suite."""
LIBRARY = (
    "L1.abi.table", "L1.abi.major", "L1.abi.minor", "L1.abi.extensions", "L1.abi.filled", "L1.abi.size",
    "L1.abi.null", "L1.abi.errors", "L1.abi.outside", "L1.abi.probe",
)  # fmt: skip
"""The same of a shared library."""
ADDED: Mapping[str, int] = {"L1.supports.shapes": 1, "L2.descriptor": 1}
"""With which minor version of the suite a case came: reports of older ones count without it."""
MIN_OPERATORS = 60
"""How many different operators a report for silver must have tried, supported or not."""


class Level(StrEnum):
    NONE = "none"
    BRONZE = "bronze"
    SILVER = "silver"
    GOLD = "gold"

    def reaches(self, other: Level) -> bool:
        return self.rank >= other.rank

    @property
    def rank(self) -> int:
        return list(Level).index(self)

    @property
    def cases(self) -> int:
        """Up to which level of cases it reaches."""
        return {"none": 1, "bronze": 2, "silver": 3, "gold": 4}[self.value]


def reached(
    results: Sequence[Result], *, reproduced: bool, library: bool = False, suite: str = VERSION
) -> tuple[Level, str]:
    """The highest level that results earn, and what keeps them from the next.

    Args:
        reproduced: the suite ran twice, and the outcomes were the same.
        library: what was tested is a shared library, so that its ABI must have been.
        suite: the version that the results are of.
    """
    by_name = {result.case: result for result in results}
    if len(by_name) != len(results):
        return Level.NONE, "a case is there twice"
    minor = int(suite.split(".")[1])
    needed = (name for name in (*RUNTIME, *(LIBRARY if library else ())) if ADDED.get(name, 0) <= minor)
    missing = [name for name in needed if name not in by_name]
    if missing:
        return Level.NONE, f"{missing[0]} was not run"
    for result in results:
        if _of(result) <= 2 and result.outcome not in (Outcome.PASSED, Outcome.UNSUPPORTED):
            return Level.NONE, _why(result)
    profile = [result for result in results if result.case.startswith(PROFILE_PREFIX)]
    swept = [result for result in results if _of(result) == 3 and result not in profile]
    if len(profile) < PROFILE_SIZE or len(operators(swept)) < MIN_OPERATORS:
        return Level.BRONZE, "the operators were not tried"
    for result in profile:
        if result.outcome != Outcome.PASSED:
            return Level.BRONZE, _why(result)
    for result in swept:
        if result.outcome.bad:
            return Level.BRONZE, _why(result)
    if any(name not in by_name for name in MODELS):
        return Level.SILVER, "the networks were not run"
    for result in results:
        if _of(result) == 4 and result.outcome != Outcome.PASSED:
            return Level.SILVER, _why(result)
    if not reproduced:
        return Level.SILVER, "it was not run twice with the same outcome"
    return Level.GOLD, ""


def operators(results: Iterable[Result]) -> set[str]:
    """The operators that sweeps are of."""
    names = (result.case for result in results)
    return {name.split(".")[1] for name in names if name.startswith("L3.") and not name.startswith(PROFILE_PREFIX)}


def _of(result: Result) -> int:
    return int(result.case[1])


def _why(result: Result) -> str:
    return f"{result.case} {result.outcome}" + (f": {result.detail}" if result.detail else "")
