"""A graph as the planner sees it: what must run, what cannot be torn apart, and what flows between.

A value whose type or size is known only when the graph runs cannot cross from one device to another, so the nodes
that share it are one *group*. Everything else is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ai_assistant.hal.graph import NO_VALUE, Graph

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Dag:
    """Groups in an order in which they can run.

    Args:
        groups: the nodes of each.
        before, after: the groups that each needs, and that need it, without repetitions.
        makes, takes: the values of each that others use (or that are the graph's outputs), and that others make.
        nbytes: the size of each value in `makes`.
        constants: the constant values that each uses.
        dead: nodes whose results nobody uses; they are not run.
    """

    graph: Graph
    groups: Groups
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    makes: tuple[tuple[int, ...], ...]
    takes: tuple[tuple[int, ...], ...]
    maker: dict[int, int]
    nbytes: dict[int, int]
    constants: tuple[tuple[int, ...], ...]
    dead: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.groups)


def analyse(graph: Graph) -> Dag:
    """Find what runs, in which groups."""
    live = _live(graph)
    return _connect(graph, _groups(graph, live), tuple(each for each in range(len(graph.nodes)) if each not in live))


def chains(dag: Dag) -> tuple[Dag, tuple[int, ...]]:
    """The same with groups that only follow each other put together. Returns also where each group has gone."""
    place: list[int] = []
    merged: list[list[int]] = []
    for group in range(len(dag)):
        before = dag.before[group]
        if len(before) == 1 and dag.after[before[0]] == (group,):
            place.append(place[before[0]])
            merged[place[-1]] += dag.groups[group]
        else:
            place.append(len(merged))
            merged.append(list(dag.groups[group]))
    return _connect(dag.graph, tuple(map(tuple, merged)), dag.dead), tuple(place)


def _connect(graph: Graph, groups: Groups, dead: tuple[int, ...]) -> Dag:
    group_of = {node: number for number, nodes in enumerate(groups) for node in nodes}
    wanted = set(graph.outputs)
    maker: dict[int, int] = {}
    makes: list[tuple[int, ...]] = []
    takes: list[tuple[int, ...]] = []
    constants: list[tuple[int, ...]] = []
    after: list[set[int]] = [set() for _ in groups]
    before: list[set[int]] = [set() for _ in groups]
    for number, nodes in enumerate(groups):
        used = dict.fromkeys(index for node in nodes for index in graph.nodes[node].inputs if index != NO_VALUE)
        constants.append(tuple(index for index in used if graph.values[index].data is not None))
        foreign = []
        for index in used:
            if (source := maker.get(index, number)) != number:
                foreign.append(index)
                before[number].add(source)
                after[source].add(number)
        takes.append(tuple(foreign))
        for node in nodes:
            for index in graph.nodes[node].outputs:
                if index != NO_VALUE:
                    maker[index] = number
    for number, nodes in enumerate(groups):
        makes.append(
            tuple(
                index
                for node in nodes
                for index in graph.nodes[node].outputs
                if index != NO_VALUE
                and (index in wanted or any(group_of.get(user, number) != number
                                            for user in graph.consumers.get(index, ())))
            )
        )  # fmt: skip
    sizes = {}
    for each in makes:
        for index in each:
            spec = graph.values[index].spec
            # Only an output of the graph may have an open size here; it goes to the caller and to nobody else.
            sizes[index] = spec.nbytes if spec is not None and spec.static else 0
    return Dag(
        graph, groups, tuple(tuple(sorted(each)) for each in before), tuple(tuple(sorted(each)) for each in after),
        tuple(makes), tuple(takes), maker, sizes, tuple(constants),
        dead,
    )  # fmt: skip


def _live(graph: Graph) -> set[int]:
    """The nodes that an output needs."""
    found: set[int] = set()
    waiting = [graph.producers[index] for index in graph.outputs if index in graph.producers]
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += [graph.producers[index] for index in graph.nodes[number].inputs if index in graph.producers]
    return found


def _groups(graph: Graph, live: set[int]) -> Groups:
    order = sorted(live)
    root = {number: number for number in order}

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = root[root[number]]
            number = root[number]
        return number

    joined = False
    for number in order:
        for index in graph.nodes[number].inputs:
            source = graph.producers.get(index)
            spec = graph.values[index].spec if source is not None else None
            if source is not None and (spec is None or not spec.static):
                root[find(number)] = find(source)
                joined = True
    if not joined:
        return tuple((number,) for number in order)
    members: dict[int, list[int]] = {}
    for number in order:
        members.setdefault(find(number), []).append(number)
    edges: dict[int, set[int]] = {each: set() for each in members}
    for number in order:
        for index in graph.nodes[number].inputs:
            source = graph.producers.get(index)
            if source is not None and find(source) != find(number):
                edges[find(source)].add(find(number))
    # A group that a path leaves and enters again must have that path, too.
    found = [tuple(sorted(node for each in ring for node in members[each])) for ring in cycles(edges)]
    return tuple(reversed(found))


def cycles(edges: dict[int, set[int]]) -> list[list[int]]:
    """Strongly connected components, those that others lead to first come last (Tarjan, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for start in edges:
        if start in index:
            continue
        work = [(start, iter(sorted(edges[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on_stack.add(start)
        while work:
            at, successors = work[-1]
            for each in successors:
                if each not in index:
                    index[each] = low[each] = len(index)
                    stack.append(each)
                    on_stack.add(each)
                    work.append((each, iter(sorted(edges[each]))))
                    break
                if each in on_stack:
                    low[at] = min(low[at], index[each])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[at])
                if low[at] == index[at]:
                    ring = []
                    while True:
                        each = stack.pop()
                        on_stack.discard(each)
                        ring.append(each)
                        if each == at:
                            break
                    found.append(ring)
    return found


def peak_bytes(graph: Graph, nodes: Sequence[int]) -> int:
    """The most that results within some nodes take at once, when they run in order."""
    inside = {index for node in nodes for index in graph.nodes[node].outputs if index != NO_VALUE}
    last = {index: place for place, node in enumerate(nodes) for index in graph.nodes[node].inputs if index in inside}
    ends: dict[int, list[int]] = {}
    for index, place in last.items():
        ends.setdefault(place, []).append(index)
    alive = most = 0
    sizes: dict[int, int] = {}
    for place, node in enumerate(nodes):
        for index in graph.nodes[node].outputs:
            spec = graph.values[index].spec if index != NO_VALUE and index in last else None
            if spec is not None and spec.static:
                sizes[index] = spec.nbytes
                alive += sizes[index]
        most = max(most, alive)
        alive -= sum(sizes.pop(index, 0) for index in ends.get(place, ()))
    return most
