"""Candidates: ways to give groups to devices that are worth a prediction."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, permutations

from ai_assistant.hal.hetero.simulate import Problem

INFINITE = math.inf
_MAX_ORDERS = 24
_NEVER_S = 1e5
"""Stands for infinity in sums that are subtracted from each other."""


def single(problem: Problem, device: int) -> list[int] | None:
    """Everything on one device; what it cannot run goes where that is fastest. None: it can run nothing."""
    found = []
    for row in problem.seconds:
        found.append(device if row[device] < INFINITE else min(range(len(row)), key=row.__getitem__))
    return found if device in found else None


def earliest_finish(problem: Problem) -> list[int]:
    """Heterogeneous earliest finish time: groups in order of what depends on them, each where it ends first.

    After Topcuoglu, Hariri and Wu (2002); a change of device costs a launch beside the transfer, and a device whose
    memory is full of constants takes no more.
    """
    dag, count = problem.dag, len(problem.devices)
    average = [_mean([each for each in row if each < INFINITE]) for row in problem.seconds]
    rank = [0.0] * len(dag)
    for group in range(len(dag) - 1, -1, -1):
        rank[group] = average[group] + max((rank[other] for other in dag.after[group]), default=0.0)
    missing = [len(each) for each in dag.before]
    ready = [(-rank[group], group) for group in range(len(dag)) if not missing[group]]
    heapq.heapify(ready)
    free = dict.fromkeys(problem.lanes, 0.0)
    ends = [0.0] * len(dag)
    chosen = [0] * len(dag)
    room = [limit or INFINITE for limit in problem.limits]
    here: list[set[int]] = [set() for _ in range(count)]
    """Values that are on a device already."""
    while ready:
        _, group = heapq.heappop(ready)
        best = (INFINITE, INFINITE, 0)
        for device in range(count):
            seconds = problem.seconds[group][device]
            if seconds == INFINITE:
                continue
            arrival = 0.0
            for value in dag.takes[group]:
                source = dag.maker[value]
                there = ends[source]
                if value not in here[device]:
                    there += problem.transfer_s(chosen[source], device, dag.nbytes[value]) + problem.launch_s[device]
                arrival = max(arrival, there)
            end = max(arrival, free[problem.lanes[device]]) + seconds
            full = problem.constant_bytes[group] > room[device]
            best = min(best, (INFINITE if full else end, end, device))
        end, device = best[1], best[2]
        chosen[group] = device
        ends[group] = free[problem.lanes[device]] = end
        room[device] -= problem.constant_bytes[group]
        here[device].update(dag.makes[group])
        here[device].update(dag.takes[group])
        for other in dag.after[group]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (-rank[other], other))
    return chosen


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def along(problem: Problem, weights: tuple[float, ...]) -> list[int]:
    """The cheapest way along the order of the groups, one after the other (dynamic programming).

    Best where the graph is a chain and some devices are better at some operators. What is alive when the device changes
    is taken to move with it.

    Args:
        weights: what a second costs on each device; watts give the least energy.
    """
    count = len(problem.devices)
    alive = alive_bytes(problem)
    costs = [problem.launch_s[device] * weights[device] for device in range(count)]
    choices: list[list[int]] = []
    for group, row in enumerate(problem.seconds):
        came: list[int] = []
        following: list[float] = []
        for device in range(count):
            best, source = costs[device], device
            for other in range(count):
                if other == device or costs[other] == INFINITE:
                    continue
                moved = problem.transfer_s(other, device, alive[group]) + problem.launch_s[device]
                if (cost := costs[other] + moved * weights[device]) < best:
                    best, source = cost, other
            came.append(source)
            seconds = row[device]
            following.append(best + seconds * weights[device] if seconds < INFINITE else INFINITE)
        choices.append(came)
        costs = following
    device = min(range(count), key=costs.__getitem__)
    found = []
    for came in reversed(choices):
        found.append(device)
        device = came[device]
    return found[::-1]


def alive_bytes(problem: Problem) -> list[int]:
    """Before each group: bytes of values that were made and are still needed."""
    dag = problem.dag
    last: dict[int, int] = {}
    for group in range(len(dag)):
        for value in dag.takes[group]:
            last[value] = group
    change = [0] * (len(dag) + 1)
    for value, end in last.items():
        change[dag.maker[value] + 1] += dag.nbytes[value]
        change[end + 1] -= dag.nbytes[value]
    found, alive = [], 0
    for group in range(len(dag)):
        alive += change[group]
        found.append(alive)
    return found


def pipelines(problem: Problem) -> Iterator[list[int]]:
    """The order of the groups cut once per device so that the busiest has little; for several orders of devices."""
    alive = alive_bytes(problem)
    count = len(problem.devices)
    orders = [order for size in range(2, min(4, count) + 1) for order in permutations(range(count), size)]
    for order in orders[:_MAX_ORDERS]:
        if len({problem.lanes[device] for device in order}) == len(order):
            stages = _stages(problem, order, alive)
            if stages is not None:
                yield stages


def _stages(problem: Problem, order: tuple[int, ...], alive: list[int]) -> list[int] | None:
    rows = problem.seconds
    seconds = {d: [0.0, *accumulate(min(row[d], _NEVER_S) for row in rows)] for d in order}
    constants = [0, *accumulate(problem.constant_bytes)]
    high = max(each[-1] for each in seconds.values()) + 1.0
    best = _fill(problem, order, alive, seconds, constants, high)
    low = 0.0
    while best is not None and high - low > 0.005 * high:
        bound = (low + high) / 2
        tried = _fill(problem, order, alive, seconds, constants, bound)
        if tried is None:
            low = bound
        else:
            best, high = tried, bound
    return best


def _fill(
    problem: Problem,
    order: tuple[int, ...],
    alive: list[int],
    seconds: dict[int, list[float]],
    constants: list[int],
    bound: float,
) -> list[int] | None:
    """Each device in turn takes groups until it would be busy for longer than that.

    Args:
        seconds, constants: of all groups before each, per device.
    """
    found: list[int] = []
    size = len(problem.seconds)
    for place, device in enumerate(order):
        group = len(found)
        if group == size:
            break
        busy = problem.launch_s[device]
        if place:
            busy += problem.transfer_s(order[place - 1], device, alive[group])
        end = bisect_right(seconds[device], seconds[device][group] + bound - busy) - 1
        if limit := problem.limits[device]:
            end = min(end, bisect_right(constants, constants[group] + limit) - 1)
        found += [device] * (end - group)
    if len(found) != size or any(problem.seconds[group][device] == INFINITE for group, device in enumerate(found)):
        return None
    return found
