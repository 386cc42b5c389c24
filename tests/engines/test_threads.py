"""How many threads decode: a simulated machine on which other work comes and goes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from ai_assistant.engines.threads import DECODES, ThreadControl, levels_of

Machine = Callable[[int], float]
"""Threads → seconds of a step of one token."""


def quiet(threads: int) -> float:
    return 0.004 + 0.048 / threads


def stragglers(threads: int) -> float:
    """Others hold half of four cores: whoever computes there as well waits at every barrier."""
    return quiet(threads) * (4.0 if threads > 2 else 1.0)


def shared_alike(threads: int) -> float:
    """Every core is taken to the same degree: fewer threads do not help."""
    return quiet(threads) * 2.0


def run(control: ThreadControl, machine: Machine, seconds: float, *, tokens: int = 1, noise: float = 0.0) -> float:
    """Let it decode for so long; returns tokens per second."""
    rng = random.Random(3)
    spent, steps = 0.0, 0
    while spent < seconds:
        step = machine(control.for_step(tokens)) * (1 + noise * rng.random())
        control.after_step(step, tokens)
        spent += step
        steps += 1
    return steps * tokens / spent


def test_the_counts_that_are_tried() -> None:
    assert levels_of(1) == (1,)
    assert levels_of(2) == (2, 1)
    assert levels_of(4) == (4, 3, 2, 1)
    assert levels_of(16) == (16, 12, 8, 4)
    with pytest.raises(ValueError, match="at least one"):
        ThreadControl(0)


def test_a_quiet_machine_keeps_all_threads_and_loses_next_to_nothing() -> None:
    control = ThreadControl(4)
    speed = run(control, quiet, 20, noise=0.1)
    assert control.for_step(1) == 4
    assert speed >= 0.97 / (quiet(4) * 1.05)


def test_fewer_threads_while_others_hold_some_cores_and_all_of_them_afterwards() -> None:
    control = ThreadControl(4)
    run(control, quiet, 5)
    run(control, stragglers, 3)
    assert run(control, stragglers, 10) >= 0.45 / quiet(4) > 1 / stragglers(4)
    assert run(control, stragglers, 0.5) > 0
    run(control, quiet, 2)
    assert control.for_step(1) == 4
    assert run(control, quiet, 5) >= 0.97 / quiet(4)


def test_a_model_that_is_loaded_beside_other_work_finds_out_as_well() -> None:
    control = ThreadControl(4)
    run(control, stragglers, 4)
    assert run(control, stragglers, 10) >= 0.45 / quiet(4)


def test_where_fewer_threads_do_not_help_trying_them_costs_little() -> None:
    control = ThreadControl(2)
    run(control, quiet, 5)
    assert run(control, shared_alike, 60) >= 0.97 / shared_alike(2)


def test_one_disturbed_step_changes_nothing() -> None:
    control = ThreadControl(4)
    run(control, quiet, 5)
    for _ in range(20):
        control.after_step(3.0, 1)
        assert run(control, quiet, 1) > 0
        assert control.for_step(1) == 4


def test_prompts_are_read_with_all_threads() -> None:
    control = ThreadControl(4)
    run(control, stragglers, 10)
    assert control.for_step(1) < 4
    assert control.for_step(DECODES + 1) == 4


def test_steps_of_another_width_are_not_compared() -> None:
    """Eight streams take longer than one; that is no reason to take threads away."""
    control = ThreadControl(4)
    run(control, quiet, 5)
    for tokens in (8, 1, 8, 1, 32, 1):
        for _ in range(30):
            # The trial that follows a load has been made.
            assert control.for_step(tokens) == 4
            control.after_step(quiet(4) * (1 + tokens / 4), tokens)


def test_a_growing_context_is_not_taken_for_other_work() -> None:
    control = ThreadControl(4)
    run(control, quiet, 2)
    for step in range(2000):
        assert control.for_step(1) == 4, step
        control.after_step(quiet(4) * (1 + step / 2000), 1)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("tokens", [1, 0, -5, 10**9])
def test_nonsense_is_ignored(seconds: float, tokens: int) -> None:
    control = ThreadControl(4)
    for _ in range(50):
        control.after_step(seconds, tokens)
    assert control.for_step(1) == 4


def test_one_thread_stays_one() -> None:
    control = ThreadControl(1)
    run(control, stragglers, 5)
    assert control.for_step(1) == control.most == 1
