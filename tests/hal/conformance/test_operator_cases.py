"""L3 and L4: the table of operators against the reference itself, and fakes that are wrong in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ai_assistant.errors import InvalidModel
from ai_assistant.hal.conformance.case import CaseFailed, Outcome
from ai_assistant.hal.conformance.levels import MIN_OPERATORS, MODELS, PROFILE_SIZE
from ai_assistant.hal.conformance.weights import read_safetensors
from tests.hal.conformance.conftest import Certify

F = Outcome.FAILED
engine = pytest.mark.engine


@engine
def test_the_table_has_the_operators_that_the_levels_ask_for() -> None:
    from ai_assistant.hal.conformance.families import ROWS
    from ai_assistant.hal.conformance.mandatory import PROFILE
    from ai_assistant.hal.conformance.model_cases import CASES

    assert len({row.op for row in ROWS}) >= MIN_OPERATORS
    assert len(PROFILE) == PROFILE_SIZE
    assert {op for operators in PROFILE.values() for op in operators} <= {row.op for row in ROWS}
    assert {case.id for case in CASES.all()} == set(MODELS)


@engine
def test_the_reference_computes_every_example_and_examples_do_not_change() -> None:
    from ai_assistant.hal.conformance import oracle
    from ai_assistant.hal.conformance.families import ROWS
    from ai_assistant.hal.conformance.operator_cases import samples_of

    for row in ROWS:
        for dtype in row.dtypes:
            first, again = (samples_of(row, dtype, 6, 1) for _ in range(2))
            assert len(first) >= 1
            for sample, same in zip(first, again, strict=True):
                right = oracle.evaluate(row.op, sample, row.opset)
                oracle.compare(oracle.evaluate(row.op, same, row.opset), right)
                graph = oracle.graph_of(row.op, sample, right, row.opset)
                assert graph.output_specs[0].sizes == right[0].shape


@engine
def test_two_seeds_make_different_examples() -> None:
    from ai_assistant.hal.conformance.families import ROWS
    from ai_assistant.hal.conformance.operator_cases import samples_of

    row = next(row for row in ROWS if row.op == "MatMul")
    one, two = (
        [
            array.shape
            for sample in samples_of(row, row.dtypes[0], 20, seed)
            for array in sample.inputs
            if array is not None
        ]
        for seed in (0, 1)
    )
    assert one != two
    assert len(set(one)) > 5


@engine
def test_a_result_is_compared_in_type_shape_and_value() -> None:
    from ai_assistant.hal.conformance.oracle import compare

    right = np.array([1, 2, np.nan], np.float32)
    compare([right + np.float32(1e-6)], [right])
    for wrong in (right.astype(np.float64), right.reshape(1, 3), np.nan_to_num(right), right * np.float32(1.001)):
        with pytest.raises(CaseFailed):
            compare([wrong], [right])
    with pytest.raises(CaseFailed):
        compare([], [right])
    with pytest.raises(CaseFailed):
        compare([np.array([1, 2])], [np.array([1, 3])])


@engine
def test_operators_that_are_declared_unsupported_cost_nothing_except_in_the_profile(outcomes: Certify) -> None:
    found = outcomes(
        "Right", "L3.Add", "L3.Relu", "L3.Conv", "L3.Softmax", "L3.profile.Relu", "L3.profile.Conv", level=3
    )
    assert found["L3.Add.f32"].outcome == found["L3.Relu.f32"].outcome == Outcome.PASSED
    assert found["L3.Conv.f32"].outcome == found["L3.Add.f16"].outcome == Outcome.UNSUPPORTED
    assert "not implemented" in found["L3.Conv.f32"].detail
    assert found["L3.profile.Relu"].outcome == Outcome.PASSED
    assert found["L3.profile.Conv"].outcome == F


@engine
@pytest.mark.parametrize(
    ("backend", "case", "outcome", "says"),
    [
        ("WrongResult", "L3.Add.f32", F, "right is"),
        ("Raises", "L3.Relu.f32", F, "declared supported, and raises BackendFailed"),
        ("LiesAboutTypes", "L3.Add.f16", F, "declared supported, and raises NotSupported"),
        ("DiesOfLong", "L3.Relu.f32", Outcome.CRASHED, "SIGABRT at (float32["),
        ("Lies", "L3.Conv.f32", F, "declared supported, and raises NotSupported"),
        ("Silent", "L3.Conv.f32", F, "without a reason"),
    ],
)
def test_a_wrong_operator_is_caught(outcomes: Certify, backend: str, case: str, outcome: Outcome, says: str) -> None:
    found = outcomes(backend, case, level=3, examples=25)[case]
    assert found.outcome == outcome, found
    assert says in found.detail


@engine
def test_a_network_with_too_much_computed_elsewhere_is_no_gold(outcomes: Certify) -> None:
    found = outcomes("Right", "L4.cnn", "L4.soak", level=4)
    assert found["L4.cnn"].outcome == F
    assert "at most 10% may be" in found["L4.cnn"].detail
    assert found["L4.soak"].outcome == Outcome.PASSED  # what it runs is right, and what it does not the reference runs


@engine
def test_a_network_that_comes_out_wrong_is_caught(outcomes: Certify) -> None:
    found = outcomes("Shifted", "L4.transformer", level=4)["L4.transformer"]
    assert found.outcome == F
    assert "right is" in found.detail
    found = outcomes("Tires", "L4.soak", level=4)["L4.soak"]
    assert found.outcome == F
    assert "run 6: output 0 differs" in found.detail


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 8,
        b"\x10" + bytes(7) + b"{}",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     ',
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F99","shape":[0],"data_offsets":[0,0]}}      ',
    ],
)
def test_weights_that_are_damaged_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidModel):
        read_safetensors(path)
