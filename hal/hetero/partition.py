"""From "which device runs which group" to pieces: as few as possible, none of which waits for its own result."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ai_assistant.hal.hetero.dag import Dag
from ai_assistant.hal.hetero.intent import Objective
from ai_assistant.hal.hetero.simulate import Cut, Piece, Problem, neighbours, ordered, simulate


def partition(dag: Dag, devices: Sequence[int]) -> Cut:
    """Pieces in an order in which they can run.

    A group joins the piece that it continues unless that would make somebody wait: another device for a result that the
    piece has already, or the piece for something that it did not need until now. So no two pieces can need each other.
    """
    home: list[int] = []
    members: list[list[int]] = []
    device: list[int] = []
    ancestors: list[int] = []
    """Bit masks of pieces."""
    closed: list[bool] = []
    for group in range(len(dag)):
        mine = devices[group]
        sources = {home[each] for each in dag.before[group]}
        needed = 0
        for each in sources:
            needed |= 1 << each | ancestors[each]
        chosen = -1
        for each in sorted(sources, reverse=True):
            if device[each] == mine and not closed[each] and not needed & ~(ancestors[each] | 1 << each):
                chosen = each
                break
        if chosen < 0:
            chosen = len(members)
            members.append([])
            device.append(mine)
            ancestors.append(needed)
            closed.append(False)
        members[chosen].append(group)
        home.append(chosen)
        if any(devices[user] != mine for user in dag.after[group]):
            closed[chosen] = True
    return tuple(Piece(device[number], tuple(groups)) for number, groups in enumerate(members))


def merged(problem: Problem, cut: Cut, objective: Objective, deadline: float) -> Cut:
    """Put neighbours on one device together wherever that costs nothing.

    Args:
        deadline: `time.perf_counter` at which to be content with what there is.
    """
    cut = ordered(problem, cut)
    best = simulate(problem, cut).score(objective)
    progress = True
    while progress and len(cut) > 1:
        progress = False
        for first, second in _pairs(problem.dag, cut):
            if time.perf_counter() > deadline:
                return cut
            tried = ordered(problem, _join(cut, first, second))
            score = simulate(problem, tried).score(objective)
            if score <= best:
                cut, best, progress = tried, score, True
                break
    return cut


def _join(cut: Cut, first: int, second: int) -> list[Piece]:
    groups = tuple(sorted(cut[first].groups + cut[second].groups))
    kept = [piece for number, piece in enumerate(cut) if number not in (first, second)]
    return [*kept, Piece(cut[first].device, groups)]


def _pairs(dag: Dag, cut: Cut) -> list[tuple[int, int]]:
    """Pieces of one device that can be one piece: no way leads from one to the other through a third."""
    before, _ = neighbours(dag, cut)
    ancestors: list[int] = []
    for number in range(len(cut)):
        mask = 0
        for each in before[number]:
            mask |= 1 << each | ancestors[each]
        ancestors.append(mask)
    direct: list[tuple[int, int]] = []
    apart: list[tuple[int, int]] = []
    for second in range(len(cut)):
        around = 0
        for each in before[second]:
            around |= ancestors[each]
        for first in range(second):
            if cut[first].device != cut[second].device or around >> first & 1:
                continue
            (direct if first in before[second] else apart).append((first, second))
    # Those that hand something on come first: joining them saves a launch and a buffer.
    return direct + apart
