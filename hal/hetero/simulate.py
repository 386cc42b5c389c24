"""What a division of the graph costs, before anything runs: times, watts and memory."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ai_assistant.hal.hetero.contract import Costs
from ai_assistant.hal.hetero.dag import Dag, peak_bytes
from ai_assistant.hal.hetero.intent import Objective

UNKNOWN_WATTS = 10.0
"""For all devices alike where one of them measures nothing: the least work then is the least energy."""
Cut = tuple["Piece", ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Groups that are one program on one device.

    Args:
        device: number in `Problem.devices`.
        groups: in the order in which they run.
    """

    device: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be divided among whom.

    Args:
        lanes: devices with the same lane share a processor and do not work at the same time.
        seconds: of each group on each device; infinite where it cannot run.
        limits: bytes that each device may hold; 0: any number.
    """

    dag: Dag
    devices: tuple[str, ...]
    lanes: tuple[str, ...]
    seconds: tuple[tuple[float, ...], ...]
    launch_s: tuple[float, ...]
    watts: tuple[float, ...]
    limits: tuple[int, ...]
    costs: Costs
    constant_bytes: tuple[int, ...]
    transfers: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def transfer_s(self, source: int, target: int, nbytes: int) -> float:
        """Remembered, since the same few sizes are asked for again and again."""
        if source == target:
            return 0.0
        key = (source, target, nbytes)
        if (found := self.transfers.get(key)) is None:
            found = self.costs.transfer_s(self.devices[source], self.devices[target], nbytes)
            self.transfers[key] = found
        return found

    def piece_s(self, piece: Piece) -> float:
        return self.launch_s[piece.device] + sum(self.seconds[group][piece.device] for group in piece.groups)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a cut is expected to take.

    Args:
        latency_s: from the first submit to the last result of one request.
        period_s: between results when requests follow without a pause: the busiest lane.
        energy_j: for one request, above what idling takes.
        starts_s, ends_s: of each piece.
    """

    latency_s: float
    period_s: float
    energy_j: float
    starts_s: tuple[float, ...] = ()
    ends_s: tuple[float, ...] = ()

    def score(self, objective: Objective) -> tuple[float, float]:
        """Less is better. What an objective does not tell apart the next best measure does."""
        if objective is Objective.PERFORMANCE:
            return self.period_s, self.latency_s
        if objective is Objective.EFFICIENCY:
            return self.energy_j, self.latency_s
        return self.latency_s, self.energy_j


def neighbours(dag: Dag, cut: Sequence[Piece]) -> tuple[list[set[int]], list[set[int]]]:
    """The pieces that each needs, and that need it."""
    home = {group: number for number, piece in enumerate(cut) for group in piece.groups}
    before: list[set[int]] = [set() for _ in cut]
    after: list[set[int]] = [set() for _ in cut]
    for number, piece in enumerate(cut):
        for group in piece.groups:
            for other in dag.before[group]:
                if (source := home[other]) != number:
                    before[number].add(source)
                    after[source].add(number)
    return before, after


def ordered(problem: Problem, cut: Sequence[Piece]) -> Cut:
    """The pieces in the order in which they are submitted: what most depends on comes first."""
    before, after = neighbours(problem.dag, cut)
    missing = [len(each) for each in before]
    order = [number for number, count in enumerate(missing) if not count]
    for number in order:
        for other in after[number]:
            missing[other] -= 1
            if not missing[other]:
                order.append(other)
    if len(order) != len(cut):
        raise AssertionError("pieces that need each other")
    rank = [0.0] * len(cut)
    for number in reversed(order):
        rank[number] = problem.piece_s(cut[number]) + max((rank[other] for other in after[number]), default=0.0)
    missing = [len(each) for each in before]
    ready = [(-rank[number], number) for number in range(len(cut)) if not missing[number]]
    heapq.heapify(ready)
    found = []
    while ready:
        _, number = heapq.heappop(ready)
        found.append(cut[number])
        for other in after[number]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (-rank[other], other))
    return tuple(found)


def simulate(problem: Problem, cut: Sequence[Piece]) -> Prediction:
    """Run a cut in the mind: each lane does one piece at a time, in their order."""
    dag = problem.dag
    free: dict[str, float] = {}
    busy: dict[str, float] = {}
    ready: dict[tuple[int, int], float] = {}
    where: dict[int, int] = {}
    energy = 0.0
    starts, ends = [], []
    for piece in cut:
        device, lane = piece.device, problem.lanes[piece.device]
        start = free.get(lane, 0.0)
        for group in piece.groups:
            for value in dag.takes[group]:
                if (source := where.get(value)) is None:
                    continue  # made within this piece
                key = (value, device)
                if (there := ready.get(key)) is None:
                    moved = problem.transfer_s(source, device, dag.nbytes[value])
                    there = ready[key] = ready[value, source] + moved
                    energy += moved * problem.watts[device]
                start = max(start, there)
        took = problem.piece_s(piece)
        end = start + took
        starts.append(start)
        ends.append(end)
        free[lane] = end
        busy[lane] = busy.get(lane, 0.0) + took
        energy += took * problem.watts[device]
        for group in piece.groups:
            for value in dag.makes[group]:
                where[value] = device
                ready[value, device] = end
    return Prediction(max(ends, default=0.0), max(busy.values(), default=0.0), energy, tuple(starts), tuple(ends))


def memory(problem: Problem, cut: Sequence[Piece]) -> Mapping[int, int]:
    """Bytes that each device holds while one request runs: constants, what crosses, and what lives inside pieces."""
    dag = problem.dag
    held: dict[int, int] = {}
    inner: dict[int, int] = {}
    home = {group: number for number, piece in enumerate(cut) for group in piece.groups}
    wanted = set(dag.graph.outputs)
    for number, piece in enumerate(cut):
        constants = {index for group in piece.groups for index in dag.constants[group]}
        here = sum(int(data.nbytes) for index in constants if (data := dag.graph.values[index].data) is not None)
        for group in piece.groups:
            abroad = [user for user in dag.after[group] if home[user] != number]
            here += sum(
                dag.nbytes[value]
                for value in dag.makes[group]
                if value in wanted or any(value in dag.takes[user] for user in abroad)
            )
        arriving = {
            value
            for group in piece.groups
            for value in dag.takes[group]
            if (source := home[dag.maker[value]]) != number and cut[source].device != piece.device
        }
        here += sum(dag.nbytes[value] for value in arriving)
        held[piece.device] = held.get(piece.device, 0) + here
        nodes = sorted(node for group in piece.groups for node in dag.groups[group])
        # Pieces of a device run one after the other, so only the largest inside counts.
        inner[piece.device] = max(inner.get(piece.device, 0), peak_bytes(dag.graph, nodes))
    return {device: held[device] + inner[device] for device in held}
