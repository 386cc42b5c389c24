"""Who is certified: the example in C for silver, the processor for gold, … What the product claims is run here."""

from __future__ import annotations

from pathlib import Path

import pytest

import ai_assistant.hal.examples.vendor_python.backend as vendor_python
from ai_assistant.hal.conformance.case import Outcome
from ai_assistant.hal.conformance.certify import certify
from ai_assistant.hal.conformance.levels import Level, operators
from ai_assistant.hal.conformance.report import Report
from ai_assistant.hal.conformance.run import Settings
from tests.hal.native.build import example

pytestmark = pytest.mark.engine


def _bad(report: Report) -> dict[str, str]:
    return {each.case: f"{each.outcome}: {each.detail}" for each in report.results if each.outcome.bad}


def test_the_example_in_c_is_silver(tmp_path: Path) -> None:
    report = certify(Settings(str(example(tmp_path)), level=3, examples=10))
    assert _bad(report) == {}
    assert report.judged[0] is Level.SILVER
    abi = [each for each in report.results if each.case.startswith("L1.abi.")]
    assert {each.outcome for each in abi} == {Outcome.PASSED}


@pytest.mark.parametrize(
    ("backend", "level"),
    [("onnxruntime", Level.SILVER), ("ggml", Level.BRONZE), (vendor_python.__file__, Level.BRONZE)],
    ids=["onnxruntime", "ggml", "the example in Python"],
)
def test_what_else_the_product_brings(backend: str, level: Level) -> None:
    report = certify(Settings(backend, level=level.cases, examples=5))
    assert _bad(report) == {}
    assert report.judged[0] is level


def test_the_processor_is_gold_without_expected_failures() -> None:
    report = certify(Settings("cpu", level=4, examples=10, soak_s=3), expected={})
    assert _bad(report) == {}
    assert report.judged == (Level.GOLD, "")
    passed = {each.case for each in report.results if each.outcome == Outcome.PASSED}
    assert len(operators(each for each in report.results if each.case in passed)) >= 60
