"""Plans are run for real, in turn, with made-up inputs: predictions are good at ranking, a clock is better."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from ai_assistant.errors import AIAssistantError, DeviceLost
from ai_assistant.hal.graph import Array
from ai_assistant.hal.hetero.executor import Executor, Run
from ai_assistant.hal.hetero.intent import Objective
from ai_assistant.hal.hetero.measure import TIMEOUT_S, sample, undisturbed
from ai_assistant.hal.hetero.plans import Alternative, Plan

_BUDGET_S = 4.0
_MIN_ROUNDS = 3
_ROUNDS = 15
_MANY_ROUNDS = 100
_MANY_S = 0.5
"""Plans of less than a millisecond get more rounds, within this."""
_SHORT_S = 0.01
"""Of a plan that is quicker, what wakes its threads counts: each time is that of a run right after another."""


def times(plans: Sequence[Plan], objective: Objective) -> list[float]:
    """Seconds of an undisturbed request with each plan; for performance between results. Infinite where it cannot run.

    Raises:
        DeviceLost
    """
    inputs = [sample(spec, place) for place, spec in enumerate(plans[0].graph.input_specs) if spec.static]
    if len(inputs) != len(plans[0].graph.inputs):
        return [math.inf] * len(plans)  # nobody knows which sizes would be typical
    found: list[list[float]] = [[] for _ in plans]
    with ExitStack() as stack:
        executors: list[Executor | None] = []
        short: set[int] = set()
        for plan in plans:
            try:
                executor = Executor(plan, replans=False)
                stack.callback(executor.close)
                executor.run(inputs, timeout_s=TIMEOUT_S)  # the first run is never typical
                if _once(executor, inputs, Objective.LATENCY) < _SHORT_S:
                    short.add(len(executors))
                executors.append(executor)
            except DeviceLost:
                raise
            except AIAssistantError:
                executors.append(None)
        begin = time.monotonic()
        for number in range(_MANY_ROUNDS):
            passed = time.monotonic() - begin
            if (number >= _MIN_ROUNDS and passed > _BUDGET_S) or (number >= _ROUNDS and passed > _MANY_S):
                break
            for place, each in enumerate(executors):
                if each is not None:
                    if place in short:
                        each.run(inputs, timeout_s=TIMEOUT_S)
                    found[place].append(_once(each, inputs, objective))
    return [undisturbed(each) if each else math.inf for each in found]


def _once(executor: Executor, inputs: Sequence[Array], objective: Objective) -> float:
    count = 2 * executor.depth if objective is Objective.PERFORMANCE else 1
    begin = time.perf_counter()
    runs: list[Run] = []
    for _ in range(count):
        if len(runs) == executor.depth:
            runs.pop(0).result(TIMEOUT_S)
        runs.append(executor.submit(inputs))
    for run in runs:
        run.result(TIMEOUT_S)
    return (time.perf_counter() - begin) / count


def marked(alternative: Alternative, seconds: float | None) -> Alternative:
    """With its measured time."""
    return alternative if seconds is None or math.isinf(seconds) else replace(alternative, measured_s=seconds)
