"""L1 and L2 on fakes: the right one passes, and every kind of wrong one is caught by the case that is named for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ai_assistant.errors import BackendFailed, NotSupported
from ai_assistant.hal.conformance.case import Outcome
from ai_assistant.hal.conformance.levels import LIBRARY, RUNTIME, Level, reached
from ai_assistant.hal.conformance.run import Settings, run
from ai_assistant.hal.conformance.suite import cases, digest
from tests.hal.conformance.conftest import Certify

F, C, H = Outcome.FAILED, Outcome.CRASHED, Outcome.HUNG


def test_a_right_backend_reaches_bronze(outcomes: Certify) -> None:
    found = outcomes("Right")
    assert {name: result for name, result in found.items() if result.outcome.bad} == {}
    # A backend that supports little is asked for little, but what it declares impossible is not what it can.
    missing = {name for name, result in found.items() if result.outcome == Outcome.UNSUPPORTED}
    assert missing == {"L1.load", "L2.queues.limit"}
    assert reached(tuple(found.values()), reproduced=False)[0] is Level.BRONZE


@pytest.mark.parametrize(
    ("backend", "case", "outcome", "says"),
    [
        ("WritesPast", "L2.bounds", C, "SIGSEGV"),
        ("WritesPast", "L2.offset", F, "memory after the tensor was written to"),
        ("ReadsBefore", "L2.bounds", C, "SIGSEGV"),
        ("WrongResult", "L2.run", F, "wrong result for 9 columns"),
        ("Dies", "L2.run", C, "SIGABRT"),
        ("Raises", "L2.run", F, "BackendFailed: the device did not answer"),
        ("LeaksTensors", "L2.leak", F, "still in use after"),
        ("LeaksProcess", "L2.leak", F, "the process grew by"),
        ("LeaksPrograms", "L2.leak.programs", F, "the process grew by"),
        ("WrongForThreads", "L2.threads", F, ""),
        ("Lies", "L1.supports.unknown", F, "is declared supported"),
        ("Silent", "L1.supports.unknown", F, "no reason is given"),
        ("BelievesShapes", "L1.supports.shapes", F, "must be refused"),
        ("SaysSoAtOnce", "L2.descriptor", F, "before the event is done"),
        ("Reorders", "L2.order", F, "ran in another order"),
        ("IgnoresEvents", "L2.events", F, "before the event of another queue"),
        ("ForgetsFailure", "L2.failure", F, "says that all is well"),
        ("ChecksNothing", "L1.submit.arguments", F, "must be refused as InvalidArgument"),
        ("ChecksLate", "L1.submit.arguments", F, "and was taken"),
        ("Unaligned", "L2.alignment", F, "is not aligned"),
        ("CountsTwice", "L2.free", F, "not counted once"),
        ("CopiesOutside", "L2.copy.outside", F, "must be refused"),
        ("Unlimited", "L2.limits", F, "must be refused as OutOfMemory"),
        ("Unlimited", "L2.exhausted", F, "could be allocated"),
        ("CopiesAdopted", "L2.adopt", F, "was copied"),
        ("AnyDevice", "L1.open.unknown", F, "was taken"),
    ],
)
def test_a_wrong_backend_is_caught(outcomes: Certify, backend: str, case: str, outcome: Outcome, says: str) -> None:
    found = outcomes(backend, case)[case]
    assert found.outcome == outcome, found
    assert says in found.detail


def test_a_hang_costs_one_case_and_its_time(outcomes: Certify) -> None:
    found = outcomes("Hangs", "L2.offset", "L2.run", "L2.copy", limit_s=3)
    assert found["L2.offset"].outcome == H
    assert "3 s" in found["L2.offset"].detail
    assert found["L2.run"].outcome == found["L2.copy"].outcome == Outcome.PASSED


def test_a_queue_that_does_not_return_hangs_or_fails(outcomes: Certify) -> None:
    assert outcomes("Synchronous", "L2.asynchronous", limit_s=3)["L2.asynchronous"].outcome in (F, H)


def test_after_a_crash_the_rest_runs(outcomes: Certify) -> None:
    found = outcomes("Dies", "L2.run", "L2.order", "L2.events", "L2.close")
    assert [found[name].outcome for name in ("L2.run", "L2.order", "L2.events", "L2.close")] == [
        C,
        Outcome.PASSED,
        Outcome.PASSED,
        Outcome.PASSED,
    ]


def test_what_a_backend_prints_is_no_result(outcomes: Certify) -> None:
    assert outcomes("Prints", "L1.identity")["L1.identity"].outcome == Outcome.PASSED


@pytest.mark.parametrize(
    ("backend", "error", "says"),
    [
        ("Absent", NotSupported, "the firmware is missing"),
        ("ProbeDies", BackendFailed, "SIGABRT"),
        ("ProbeHangs", BackendFailed, "does not load within"),
        ("ProbeRaises", BackendFailed, "ZeroDivisionError"),
    ],
)
def test_a_backend_that_is_not_there_is_no_result(
    fake: Callable[[str], str], backend: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        run(Settings(fake(backend), level=1, limit_s=4))
    if backend == "Absent":
        assert getattr(caught.value, "hint", "") == "install firmware-fake"


def test_a_device_that_does_not_exist_is_named(fake: Callable[[str], str]) -> None:
    with pytest.raises(NotSupported, match="no such device"):
        run(Settings(fake("Right"), device="7", level=1))


def test_the_lists_of_cases_that_a_report_needs_are_those_of_the_suite() -> None:
    from pathlib import Path

    assert {case.id for case in cases(2)} == set(RUNTIME)
    assert {case.id for case in cases(1, Path("x.so"))} >= set(LIBRARY)
    assert all(case.about for case in cases(2))


def test_the_suite_knows_its_own_files() -> None:
    assert len(digest()) == 64
    assert digest() == digest()
