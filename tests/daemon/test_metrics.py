"""The store of numbers: bounds, sums, hostile values, and that it cannot grow."""

from __future__ import annotations

import math

import pytest

from ai_assistant.daemon.metrics import MAX_MODELS, SECONDS, Histogram, Metrics, quantile
from ai_assistant.engines.contract import Usage


def test_a_histogram_is_cumulative_and_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [(1.0, 2), (2.0, 3), (math.inf, 4)]
    assert histogram.total == 11.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_measurement_is_left_out(value: float) -> None:
    metrics = Metrics()
    metrics.observe("a:1", Usage(5, 5, 0, value, value, value), value)
    model = metrics.models["a:1"]
    for each in (model.queue_s, model.ttft_s, model.tpot_s):
        assert each.cumulative()[-1][1] == 0
        assert each.total == 0


def test_a_generation() -> None:
    now = 100.0
    metrics = Metrics(lambda: now)
    metrics.observe("a:1", Usage(100, 20, 60, 0.5, 2.0, 4.0), 2.5)
    model = metrics.models["a:1"]
    assert (model.prompt_tokens, model.completion_tokens, model.cached_tokens) == (100, 20, 60)
    # Cached tokens were not read.
    assert (model.prefill_rate.total, model.decode_rate.total, model.tpot_s.total) == (20.0, 5.0, 0.2)
    assert metrics.recent_ttft("a:1") == [2.5]
    now = 161.0
    assert metrics.recent_ttft("a:1") == []


def test_models_are_bounded_and_the_least_recently_used_goes() -> None:
    now = 0.0
    metrics = Metrics(lambda: now)
    for number in range(MAX_MODELS):
        now += 1
        metrics.ended(f"m:{number}", "done")
    now += 1
    metrics.ended("m:0", "done")
    metrics.ended("new:1", "done")
    assert len(metrics.models) == MAX_MODELS
    assert {"m:0", "new:1"} <= set(metrics.models)
    assert "m:1" not in metrics.models
    metrics.forget("new:1")
    assert "new:1" not in metrics.models


def test_quantiles() -> None:
    values = [float(each) for each in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.95), quantile([3.0], 0.95), quantile([], 0.5)) == (
        50,
        95,
        3,
        None,
    )


def test_bounds_are_ascending_from_a_millisecond_to_a_minute() -> None:
    assert list(SECONDS) == sorted(set(SECONDS))
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 60.0)
