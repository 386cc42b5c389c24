"""Arithmetic of what fits and how fast it runs, and the memory's bandwidth."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ai_assistant.engines import bandwidth
from ai_assistant.engines.suggest import GREATEST_SHARE, LEAST_SHARE, speed, suggest, tables

GIB = 1 << 30


def test_the_table_is_one_of_shapes() -> None:
    shapes, quantizations = tables()
    assert len({each.name for each in shapes}) == len(shapes)
    assert [each.parameters for each in shapes] == sorted(each.parameters for each in shapes)
    for shape in shapes:
        assert 0 < shape.active <= shape.parameters
        # The numbers belong together: attention, feed-forward and embeddings make up the parameters.
        if shape.active == shape.parameters:
            layer = shape.width * (2 * shape.width + 2 * shape.kv_width + 3 * shape.hidden)
            embeddings = shape.vocabulary * shape.width
            whole = shape.layers * layer
            assert 0.95 * (whole + embeddings) <= shape.parameters <= 1.05 * (whole + 2 * embeddings)
    assert all(2 < each.bits <= 32 for each in quantizations)


def test_what_fits_depends_on_memory_disk_and_context() -> None:
    small = suggest(memory_bytes=4 * GIB, disk_bytes=100 * GIB, bandwidth=24e9)
    assert {each.shape for each in small if each.fits} == {"0.5 B", "1 B", "3 B"}
    assert [each.file_bytes for each in small] == sorted(each.file_bytes for each in small)
    large = suggest(memory_bytes=64 * GIB, disk_bytes=100 * GIB, bandwidth=24e9)
    assert {each.shape for each in large if each.fits} > {each.shape for each in small if each.fits}
    assert not any(each.fits for each in suggest(memory_bytes=64 * GIB, disk_bytes=0, bandwidth=24e9))
    assert not any(each.fits for each in suggest(memory_bytes=0, disk_bytes=GIB, bandwidth=24e9))
    long = suggest(memory_bytes=4 * GIB, disk_bytes=100 * GIB, bandwidth=24e9, context_length=131_072)
    for short, more in zip(small, long, strict=True):
        assert more.memory_bytes > short.memory_bytes
        assert more.fastest < short.fastest
    # A mixture of experts is as large as all of them and as fast as those that a token meets.
    by_name = {(each.shape, each.quantization): each for each in large}
    mixture, dense = by_name[("30 B, 3 B active", "Q4_K_M")], by_name[("32 B", "Q4_K_M")]
    assert mixture.memory_bytes > 0.8 * dense.memory_bytes
    assert mixture.slowest > 5 * dense.slowest


def test_a_speed_is_a_range_below_the_limit() -> None:
    assert speed(24e9, 6e9) == pytest.approx((4 * LEAST_SHARE, 4 * GREATEST_SHARE))
    assert speed(24e9, 0) == (0.0, 0.0)
    assert GREATEST_SHARE < 1


def test_bandwidth_counts_three_arrays() -> None:
    ticks = iter([0.0, 2.0, 10.0, 11.0])
    elements = 1 << 16
    assert bandwidth.measure(4 * elements, 2, clock=lambda: next(ticks)) == 3 * 4 * elements / 1.0


def test_bandwidth_is_real_and_finite() -> None:
    assert 0 < bandwidth.measure(1 << 20, 1) < math.inf


def test_it_is_measured_once(tmp_path: Path) -> None:
    made: list[float] = []

    def make() -> float:
        made.append(2e9 + len(made))
        return made[-1]

    path = tmp_path / "deep" / "bandwidth.json"
    assert bandwidth.measured_once("a box", path, make) == 2e9
    assert bandwidth.measured_once("a box", path, make) == 2e9
    assert bandwidth.measured_once("another box", path, make) == 2e9 + 1
    assert bandwidth.measured_once("another box", path, make, again=True) == 2e9 + 2
    for content in ("", "[]", "{", '{"machine": "another box", "bytes_per_s": NaN}', '{"machine": "another box"}',
                    '{"machine": "another box", "bytes_per_s": -1}', '{"machine": "another box", "bytes_per_s": true}',
                    '{"machine": "another box", "bytes_per_s": "7"}'):  # fmt: skip
        path.write_text(content)
        before = len(made)
        bandwidth.measured_once("another box", path, make)
        assert len(made) == before + 1
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert bandwidth.measured_once("a box", blocked / "x", make) == made[-1]
