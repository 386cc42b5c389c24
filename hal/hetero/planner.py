"""Chooses which device runs what: candidates are predicted, the best one is taken, and on request tried for real."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ai_assistant.errors import InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.contract import Context
from ai_assistant.hal.graph import Graph
from ai_assistant.hal.hetero import confirm
from ai_assistant.hal.hetero.contract import Costs
from ai_assistant.hal.hetero.cost import CostModel
from ai_assistant.hal.hetero.dag import Dag, analyse, chains
from ai_assistant.hal.hetero.devices import lane
from ai_assistant.hal.hetero.intent import OFF, Intent, Objective
from ai_assistant.hal.hetero.partition import merged, partition
from ai_assistant.hal.hetero.plans import Alternative, Part, Plan
from ai_assistant.hal.hetero.search import INFINITE, along, earliest_finish, pipelines, single
from ai_assistant.hal.hetero.simulate import (
    UNKNOWN_WATTS,
    Cut,
    Piece,
    Prediction,
    Problem,
    memory,
    neighbours,
    simulate,
)

FALLBACK = "cpu"
"""The device that runs what the chosen ones cannot, where it is among the contexts."""
MARGIN = 0.03
"""So much better than the best single device a division must be predicted, or measured, to be worth its risk."""
_UNSURE = 0.1
"""Predictions that are nearer to each other are taken for the same."""
MAX_PIECES = 256
"""A division into more is not worth a look: what each launch really costs would matter more than the prediction."""
_SEARCH_S = 0.08
_MERGE_S = 0.02
"""How long all divisions together, and the merging of one, may be thought about."""
_CLOSE = 3.0
"""A plan that is predicted to take more than so many times the best is not tried."""
_SHARES = (1.0, 0.8, 0.6)
Candidate = tuple[Alternative, Cut]


def plan(
    graph: Graph,
    contexts: Mapping[str, Context],
    intent: Intent = OFF,
    *,
    costs: Costs | None = None,
    memory_limits: Mapping[str, int] | None = None,
    measure: bool = False,
) -> Plan:
    """Divide a graph among devices.

    Every device alone is looked at, too, and a division is taken only where it is predicted to be better.

    Args:
        contexts: open devices by name; "cpu" among them runs what no chosen device can.
        costs: times; default: what was measured on this machine before, estimated otherwise.
        memory_limits: bytes by device, below what its capabilities say.
        measure: measure operators and transfers that are not known yet, then run the best candidates a few times with
            made-up inputs and take the one that is fastest in fact. Takes seconds.

    Raises:
        NotSupported: an operator that no device runs, with each one's reason.
        OutOfMemory: no way to divide the graph fits the devices, with the numbers.
        InvalidArgument: a device of the intent is not there, or there is none at all.
    """
    devices = chosen_devices(contexts, intent)
    limits = dict(memory_limits or {})
    model = costs if costs is not None else CostModel(contexts)
    if measure and isinstance(model, CostModel):
        model.measure(graph, devices)
    dag = analyse(graph)
    problem, unsupported, fallback = make_problem(dag, contexts, devices, model, limits)
    objective = intent.objective
    candidates = _predict(problem, intent, fallback)
    if not candidates:
        raise _impossible(dag, unsupported)
    fitting = [each for each in candidates if not each[0].refused]
    if not fitting:
        raise OutOfMemory(
            f"the graph does not fit: {candidates[0][0].refused}",
            hint="name more devices, give a larger limit, or use a smaller model",
        )
    fitting.sort(key=lambda each: each[0].predicted.score(objective))
    best = _best([(each, each[0].predicted.score(objective)[0]) for each in fitting], _UNSURE)

    def make(candidate: Candidate) -> Plan:
        everything = tuple(each[0] for each in fitting) + tuple(each[0] for each in candidates if each[0].refused)
        return _plan(problem, contexts, intent, candidate, everything, unsupported, model, limits, fallback)

    if measure and len(problem.dag) and len(fitting) > 1:
        fitting, best = _confirmed(fitting, best, objective, make)
    return make(best)


def chosen_devices(contexts: Mapping[str, Context], intent: Intent) -> tuple[str, ...]:
    """The names that an intent allows, in its order."""
    if not contexts:
        raise InvalidArgument("there is no device", param="contexts")
    if not intent.devices:
        return tuple(contexts)
    found: dict[str, None] = {}
    for wanted in intent.devices:
        matching = [name for name in contexts if name == wanted or name.startswith(f"{wanted}:")]
        if not matching:
            raise InvalidArgument(
                f"there is no device {wanted!r}", hint=f"there are {', '.join(contexts)}", param="hetero_compute"
            )
        found.update(dict.fromkeys(matching))
    return tuple(found)


def make_problem(
    dag: Dag, contexts: Mapping[str, Context], devices: Sequence[str], costs: Costs, limits: Mapping[str, int]
) -> tuple[Problem, dict[int, dict[str, str]], str]:
    """Ask every device about every node. Returns also what is not supported, and the fallback if it is needed."""
    graph = dag.graph
    unsupported: dict[int, dict[str, str]] = {}

    def ask(name: str) -> None:
        supports = contexts[name].supports
        for group in dag.groups:
            for node in group:
                if not (answer := supports(graph.nodes[node], graph)):
                    unsupported.setdefault(node, {})[name] = answer.reason or "no reason given"

    for name in devices:
        ask(name)
    fallback = ""
    names = tuple(devices)
    if FALLBACK in contexts and FALLBACK not in devices and not _covered(dag, unsupported, names):
        ask(FALLBACK)
        names, fallback = (*devices, FALLBACK), FALLBACK
    rows = []
    for group in dag.groups:
        row = []
        for name in names:
            if any(name in unsupported.get(node, ()) for node in group):
                row.append(INFINITE)
            elif name == fallback and any(row_s < INFINITE for row_s in row):
                row.append(INFINITE)  # it was not asked for, so it does only what nobody else can
            else:
                row.append(sum(costs.node_s(name, graph.nodes[node], graph).seconds for node in group))
        rows.append(tuple(row))
    watts = [costs.watts(name) for name in names]
    known = [each for each in watts if each is not None]
    problem = Problem(
        dag,
        names,
        tuple(lane(name, contexts[name]) for name in names),
        tuple(rows),
        tuple(costs.launch_s(name) for name in names),
        tuple(known) if len(known) == len(names) else (UNKNOWN_WATTS,) * len(names),
        tuple(_limit(contexts[name].capabilities.memory_bytes, limits.get(name, 0)) for name in names),
        costs,
        tuple(
            sum(int(data.nbytes) for index in each if (data := graph.values[index].data) is not None)
            for each in dag.constants
        ),
    )
    return problem, unsupported, fallback


def _covered(dag: Dag, unsupported: Mapping[int, Mapping[str, str]], names: Sequence[str]) -> bool:
    """Whether for every group there is a device that runs all of it."""
    return all(
        any(all(name not in unsupported.get(node, ()) for node in group) for name in names) for group in dag.groups
    )


def _limit(*limits: int) -> int:
    return min((each for each in limits if each > 0), default=0)


def _predict(problem: Problem, intent: Intent, fallback: str) -> list[Candidate]:
    """Every candidate with its prediction; the same division is listed once."""
    found: list[Candidate] = []
    seen: set[Cut] = set()

    def add(name: str, cut: Cut, alone: bool) -> None:
        if cut not in seen:
            seen.add(cut)
            found.append((_judge(problem, name, cut, alone), cut))

    if not len(problem.dag):
        add(problem.devices[0], (), True)
        return found
    if any(min(row) == INFINITE for row in problem.seconds):
        return found
    rest: list[tuple[str, list[int]]] = []
    for device, name in enumerate(problem.devices):
        assigned = single(problem, device)
        if assigned is None:
            continue
        if all(each == device for each in assigned):
            add(f"{name} alone", (Piece(device, tuple(range(len(problem.dag)))),), True)
        elif name != fallback:
            rest.append((f"{name}, the rest where it can run", assigned))
    if not intent.mixed and (found or not intent.devices):
        return found
    end = time.perf_counter() + _SEARCH_S
    for name, assigned in rest:
        cut = partition(problem.dag, assigned)
        add(name, merged(problem, cut, intent.objective, _until(end)), False)
    if intent.mixed and len(problem.devices) > 1:
        for name, assigned in _divisions(problem, intent.objective):
            if time.perf_counter() > end:
                break
            cut = partition(problem.dag, assigned)
            if len(cut) <= MAX_PIECES:
                add(name, merged(problem, cut, intent.objective, _until(end)), False)
    return found


def _until(end: float) -> float:
    return min(end, time.perf_counter() + _MERGE_S)


def _divisions(problem: Problem, objective: Objective) -> Iterator[tuple[str, list[int]]]:
    """Ways to share the groups, with a name for each; the most promising first."""
    if objective is Objective.EFFICIENCY:
        yield "least energy along the graph", along(problem, problem.watts)
    if objective is Objective.PERFORMANCE:
        for stages in pipelines(problem):
            yield "a stage for each device", stages
    coarse, place = _coarse(problem)
    homes = earliest_finish(coarse)
    found = [homes[each] for each in place]
    if all(problem.seconds[group][device] < INFINITE for group, device in enumerate(found)):
        yield "earliest finish of chains", found
    yield "earliest finish", earliest_finish(problem)
    yield "cheapest way along the graph", along(problem, (1.0,) * len(problem.devices))
    if any(problem.limits):
        # The searches count constants only, so that room is left for what passes between.
        for share in _SHARES:
            tight = replace(problem, limits=tuple(int(each * share) for each in problem.limits))
            yield "earliest finish within the memory", earliest_finish(tight)
            for stages in pipelines(tight):
                yield "what fits each device, in turn", stages


def _coarse(problem: Problem) -> tuple[Problem, tuple[int, ...]]:
    """The problem with chains that stay together."""
    dag, place = chains(problem.dag)
    count = len(problem.devices)
    seconds = [[0.0] * count for _ in range(len(dag))]
    constants = [0] * len(dag)
    for group, home in enumerate(place):
        constants[home] += problem.constant_bytes[group]
        for device in range(count):
            seconds[home][device] += problem.seconds[group][device]
    # A chain that no device can run as a whole is left to the finer searches.
    rows = [row if min(row) < INFINITE else [0.0] * count for row in seconds]
    return replace(
        problem, dag=dag, seconds=tuple(map(tuple, rows)), constant_bytes=tuple(constants)
    ), place  # fmt: skip


def _judge(problem: Problem, name: str, cut: Cut, alone: bool) -> Alternative:
    held = memory(problem, cut)
    refused = "; ".join(
        f"{problem.devices[device]} has {problem.limits[device]} bytes, {needed} are needed"
        for device, needed in sorted(held.items())
        if problem.limits[device] and needed > problem.limits[device]
    )
    used = tuple(dict.fromkeys(problem.devices[piece.device] for piece in cut))
    sizes = {problem.devices[device]: needed for device, needed in held.items()}
    return Alternative(name, used, len(cut), alone, simulate(problem, cut), sizes, refused=refused)


def _best(scored: list[tuple[Candidate, float]], slack: float) -> Candidate:
    """The one with the least score; a division only where it is clearly better than every single device.

    Args:
        slack: of divisions that are so near to each other, the one with the fewest parts is taken.
    """
    alone = [each for each in scored if each[0][0].single]
    fallback, bound = min(alone, key=lambda each: each[1]) if alone else (None, INFINITE)
    better = [each for each in scored if not each[0][0].single and each[1] <= bound * (1 - MARGIN)]
    if fallback is not None and not better:
        return fallback
    least = min(score for _, score in better)
    near = [each for each in better if each[1] <= least * (1 + slack)]
    return min(near, key=lambda each: (len(each[0][1]), each[1]))[0]


def _confirmed(
    fitting: list[Candidate], best: Candidate, objective: Objective, make: Callable[[Candidate], Plan]
) -> tuple[list[Candidate], Candidate]:
    """Try the pick, the best two divisions and the single devices that come near; take what is best in fact."""
    if objective is Objective.EFFICIENCY:
        return fitting, best  # joules of a few runs cannot be read from any sensor
    least = fitting[0][0].predicted.score(objective)[0]
    alone = [each for each in fitting if each[0].single]
    near = [each for each in alone if each[0].predicted.score(objective)[0] <= _CLOSE * least] or alone[:1]
    tried = [*near, *[each for each in fitting if not each[0].single][:2]]
    if best not in tried:
        tried.append(best)
    times = confirm.times([make(each) for each in tried], objective)
    known = {id(each[1]): seconds for each, seconds in zip(tried, times, strict=True)}
    marked = [
        (confirm.marked(alternative, known.get(id(cut))), cut) for alternative, cut in fitting
    ]  # fmt: skip
    scored = [
        (each, seconds) for each in marked if (seconds := each[0].measured_s) is not None and math.isfinite(seconds)
    ]
    return (marked, _best(scored, MARGIN)) if scored else (marked, best)


def _plan(
    problem: Problem,
    contexts: Mapping[str, Context],
    intent: Intent,
    candidate: Candidate,
    alternatives: tuple[Alternative, ...],
    unsupported: Mapping[int, Mapping[str, str]],
    costs: Costs,
    limits: Mapping[str, int],
    fallback: str,
) -> Plan:
    alternative, cut = candidate
    before, _ = neighbours(problem.dag, cut)
    prediction = simulate(problem, cut)
    parts = tuple(
        _part(problem, number, piece, cut, tuple(sorted(before[number])), prediction, unsupported, fallback)
        for number, piece in enumerate(cut)
    )
    return Plan(
        problem.dag.graph, contexts, intent, parts, alternative.name, prediction, alternatives, unsupported,
        problem.dag.dead, costs, limits, fallback,
    )  # fmt: skip


def _part(
    problem: Problem,
    number: int,
    piece: Piece,
    cut: Cut,
    after: tuple[int, ...],
    prediction: Prediction,
    unsupported: Mapping[int, Mapping[str, str]],
    fallback: str,
) -> Part:
    dag, graph = problem.dag, problem.dag.graph
    nodes = tuple(sorted(node for group in piece.groups for node in dag.groups[group]))
    name = problem.devices[piece.device]
    seconds = {}
    refusals = {}
    for device, other in enumerate(problem.devices):
        total = problem.piece_s(Piece(device, piece.groups))
        if total < INFINITE:
            seconds[other] = total
        else:
            refusal = next((_refusal(graph, node, reasons[other]) for node in nodes
                            if (reasons := unsupported.get(node)) and other in reasons), "")  # fmt: skip
            if refusal:
                refusals[other] = refusal
    sources = Counter(problem.costs.node_s(name, graph.nodes[node], graph).source for node in nodes)
    why = _why(number, name, seconds, refusals, cut, problem, prediction, fallback)
    return Part(number, name, nodes, after, seconds, prediction.starts_s[number], dict(sources), why, refusals)


def _refusal(graph: Graph, node: int, reason: str) -> str:
    """The reason with the operator that it speaks of."""
    name = str(graph.nodes[node])
    return reason if name in reason else f"{name}: {reason}"


def _why(
    number: int,
    name: str,
    seconds: Mapping[str, float],
    refusals: Mapping[str, str],
    cut: Cut,
    problem: Problem,
    prediction: Prediction,
    fallback: str,
) -> str:
    others = {other: each for other, each in seconds.items() if other != name}
    if name == fallback:
        return "no chosen device runs this"
    if not others:
        return "no other device runs this" if refusals else "the only device"
    nearest = min(others, key=others.__getitem__)
    mine, theirs = seconds[name], others[nearest]
    start, end = prediction.starts_s[number], prediction.ends_s[number]
    beside = [
        other
        for other, piece in enumerate(cut)
        if problem.lanes[piece.device] != problem.lanes[cut[number].device]
        and prediction.starts_s[other] < end
        and start < prediction.ends_s[other]
    ]
    if beside:
        return f"works beside part {', '.join(map(str, beside[:4]))}"
    if mine < theirs * (1 - MARGIN):
        return f"takes {mine / theirs:.2f} of the time on {nearest}" if theirs > 0 else "fastest"
    if len(cut) == 1:
        return f"about as fast as {nearest}, and nothing is gained by dividing"
    return "what it needs is here, or this device is free"


def _impossible(dag: Dag, unsupported: Mapping[int, Mapping[str, str]]) -> NotSupported:
    graph = dag.graph
    for group in dag.groups:
        for node in group:
            if reasons := unsupported.get(node):
                told = "; ".join(f"{name}: {reason[:200]}" for name, reason in list(reasons.items())[:4])
                return NotSupported(
                    f"no device runs all of the graph: {graph.nodes[node]} {graph.nodes[node].name[:60]!r} ({told})",
                    hint="HETERO_COMPUTE=ON lets devices share a graph; the cpu backend runs the most operators",
                )
    return NotSupported("no device runs this graph")
