"""The benches' statistics: on samples whose answer is known."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys

import pytest

from bench import __main__ as runner
from bench.harness import MIN_PAIRS, Row, adds_at_most, at_least, at_most, difference, limit, pairs, ratio, report


def test_runs_alternate_who_goes_first() -> None:
    order: list[str] = []

    def mine(index: int) -> int:
        order.append(f"m{index}")
        return index

    def theirs(index: int) -> int:
        order.append(f"t{index}")
        return index * 10

    ours, other = pairs(mine, theirs, 7)
    assert ours == list(range(7))
    assert other == list(range(0, 70, 10))
    assert order[:6] == ["t0", "m0", "m1", "t1", "t2", "m2"]
    with pytest.raises(ValueError, match="at least"):
        pairs(mine, theirs, MIN_PAIRS - 1)


def test_a_ratio_of_equal_samples_is_exactly_one() -> None:
    found = ratio([3.0] * 9, [3.0] * 9)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_bounds_hold_the_truth_and_shrink_with_more_samples() -> None:
    rng = random.Random(5)
    widths = []
    for count in (9, 200):
        other = [rng.gauss(10, 1) for _ in range(count)]
        ours = [rng.gauss(12, 1) for _ in range(count)]
        found = ratio(ours, other)
        assert found.low <= found.value <= found.high
        assert found.low < 1.2 < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_bounds_cover_as_often_as_they_say() -> None:
    rng = random.Random(11)
    hits = 0
    for _ in range(60):
        other = [rng.lognormvariate(0, 0.1) for _ in range(15)]
        ours = [rng.lognormvariate(0, 0.1) for _ in range(15)]
        found = ratio(ours, other)
        hits += found.low <= 1.0 <= found.high
    assert 50 <= hits <= 60


def test_one_disturbed_run_does_not_shift_the_result() -> None:
    calm = [10.0, 10.1, 9.9, 10.0, 10.2, 9.8, 10.0]
    assert ratio([*calm[:-1], 500.0], calm).value == pytest.approx(1.0, abs=0.02)


def test_a_small_difference_is_seen_on_a_drifting_amount() -> None:
    drift = [40.0 + 5 * each for each in range(9)]
    found = difference([each + 1.5 for each in drift], drift)
    assert found.value == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5)


def test_unequal_samples_are_a_mistake() -> None:
    for ours, other in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="pairs"):
            ratio(ours, other)


def test_claims_hold_when_they_are_true() -> None:
    slow, fast = [1.0] * 7, [2.0] * 7
    assert at_least("faster", fast, slow).holds
    assert not at_least("faster", slow, fast).holds
    assert not at_least("twice", fast, slow, 2.5).holds
    assert at_most("little", [1.01] * 7, slow, 1.02).holds
    assert not at_most("little", [1.03] * 7, slow, 1.02).holds
    row, found = adds_at_most("adds", [5.5] * 7, [3.0] * 7, 3, "ms")
    assert row.holds
    assert found.value == 2.5
    assert not adds_at_most("adds", [6.5] * 7, [3.0] * 7, 3, "ms")[0].holds
    assert limit("memory", 44.0, 45.0, "MB").holds
    assert not limit("memory", 46.0, 45.0, "MB").holds


def test_almost_even_holds_only_when_it_is_certain() -> None:
    assert at_least("even", [0.98] * 9, [1.0] * 9).holds
    assert not at_least("even", [0.96] * 9, [1.0] * 9).holds
    assert not at_least("even", [0.80, 0.99] * 5, [1.0] * 10).holds


def row(holds: bool) -> Row:
    return Row("ttft", 1.25, 1.0, 1.25, 1.2, 1.3, "≤ 1.02 ×", holds)


def test_the_table_and_the_exit_status() -> None:
    out = io.StringIO()
    assert report([row(True), row(False)], out=out) == 1
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["name", "ours", "other", "ratio", "goal", "holds"]
    assert lines[1].split() == ["ttft", "1.25", "1", "1.250", "[1.200,", "1.300]", "≤", "1.02", "×", "yes"]
    assert lines[2].endswith("NO")
    assert report([row(True)], out=out) == 0
    assert report([], out=out) == 1


def test_json_lines() -> None:
    out = io.StringIO()
    assert report([row(True)], as_json=True, out=out) == 0
    (line,) = out.getvalue().splitlines()
    assert {"claim", "ours", "other", "ratio", "goal", "holds"} <= set(json.loads(line))
    assert json.loads(line)["holds"] is True


def test_the_runner_knows_its_benches() -> None:
    assert "api_overhead" in runner.names()
    assert not {"harness", "__main__", "__init__"} & set(runner.names())
    done = subprocess.run([sys.executable, "-m", "bench", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "api_overhead" in done.stderr


def test_without_a_name_what_takes_very_long_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command[2])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert runner.main([]) == 0
    assert "bench.serving" in started
    assert "bench.soak" not in started
    assert "soak is left out" in capsys.readouterr().err
    assert runner.main(["soak"]) == 0
    assert started[-1] == "bench.soak"
    assert capsys.readouterr().err == ""


def test_fewer_pairs_only_where_that_is_said() -> None:
    assert pairs(float, float, 5, least=5)[0] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 5"):
        pairs(float, float, 4, least=5)
