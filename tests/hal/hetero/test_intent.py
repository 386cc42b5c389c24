"""The switch for several devices: what is understood, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.hetero.intent import OFF, Intent, Objective, from_environment, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OFF", OFF),
        ("off", OFF),
        ("ON", Intent(mixed=True)),
        (" on ", Intent(mixed=True)),
        ("latency", Intent(True, Objective.LATENCY)),
        ("Performance", Intent(True, Objective.PERFORMANCE)),
        ("efficiency", Intent(True, Objective.EFFICIENCY)),
        ("cpu", Intent(devices=("cpu",))),
        ("cpu, onnxruntime", Intent(True, devices=("cpu", "onnxruntime"))),
        (
            "onnxruntime:CPUExecutionProvider@0,onnxruntime:CPUExecutionProvider@1",
            Intent(True, devices=("onnxruntime:CPUExecutionProvider@0", "onnxruntime:CPUExecutionProvider@1")),
        ),
    ],
)
def test_what_is_understood(text: str, expected: Intent) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "  ", "1", "yes please", "cpu,", ",", "cpu,,gpu", "cpu,cpu", "on,cpu", "cpu,latency", "cpu;gpu", "c\0pu",
     "-x", "cpu:", "cpu:../../etc", "cpu\nOFF", "ｃｐｕ", "x" * 2000, ",".join(f"d{each}" for each in range(17)),
     None, 1, True, b"ON", ["cpu"]],
)  # fmt: skip
def test_anything_else_is_refused_with_a_hint(text: Any) -> None:
    with pytest.raises(InvalidArgument, match="HETERO_COMPUTE") as caught:
        parse(text)
    assert caught.value.hint
    assert caught.value.param == "hetero_compute"
    assert len(caught.value.message) < 200


def test_the_environment() -> None:
    assert from_environment({}) == OFF
    assert from_environment({"HETERO_COMPUTE": ""}, Intent(mixed=True)) == Intent(mixed=True)
    assert from_environment({"HETERO_COMPUTE": "performance"}) == Intent(True, Objective.PERFORMANCE)
    with pytest.raises(InvalidArgument):
        from_environment({"HETERO_COMPUTE": "maybe?"})
