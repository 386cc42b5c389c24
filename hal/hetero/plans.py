"""A plan: which device runs which part of a graph, and why, for programs and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ai_assistant.hal.contract import Context
from ai_assistant.hal.graph import Graph
from ai_assistant.hal.hetero.contract import Costs, Source
from ai_assistant.hal.hetero.intent import Intent
from ai_assistant.hal.hetero.simulate import Prediction

_COLOURS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#fb9a99", "#ffff99", "#dddddd")
_SHOWN_OPERATORS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Nodes that are one program on one device.

    Args:
        nodes: their numbers in the graph, in the order in which they run.
        after: the parts that this one needs.
        seconds: predicted, with its launch; of each device that could run it, this one among them.
        start_s: when it is predicted to start, counted from the request's.
        sources: how many nodes' times come from where.
        unsupported: for each other device that cannot run it the first node and the reason.
    """

    number: int
    device: str
    nodes: tuple[int, ...]
    after: tuple[int, ...]
    seconds: Mapping[str, float]
    start_s: float
    sources: Mapping[Source, int]
    why: str
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def predicted_s(self) -> float:
        return self.seconds[self.device]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan that was looked at.

    Args:
        name: a device, or how the graph was divided.
        single: everything on one device.
        memory_bytes: per device.
        measured_s: the median time of a request where it was run; None where it was only predicted.
        refused: why it could not be taken; "" where it could.
    """

    name: str
    devices: tuple[str, ...]
    parts: int
    single: bool
    predicted: Prediction
    memory_bytes: Mapping[str, int]
    measured_s: float | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What `planner.plan` found. `Executor` runs it.

    Args:
        contexts: every device that may be used, also those that got nothing: they take over when one is lost.
        parts: in an order in which they can be submitted.
        unsupported: node → device → why it does not run there.
        dead: nodes that are left out since nobody uses what they make.
    """

    graph: Graph
    contexts: Mapping[str, Context]
    intent: Intent
    parts: tuple[Part, ...]
    name: str
    predicted: Prediction
    alternatives: tuple[Alternative, ...]
    unsupported: Mapping[int, Mapping[str, str]]
    dead: tuple[int, ...]
    costs: Costs
    memory_limits: Mapping[str, int]
    fallback: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        """Those that work, each once."""
        return tuple(dict.fromkeys(part.device for part in self.parts))

    def without(self, device: str) -> Mapping[str, Context]:
        """The contexts that are left when a device is lost."""
        return {name: context for name, context in self.contexts.items() if name != device}

    def explain(self) -> list[dict[str, Any]]:
        """A row for each part: who runs it, why, and what the others would take. Plain values, fit for JSON."""
        return [
            {
                "part": part.number,
                "device": part.device,
                "nodes": len(part.nodes),
                "operators": operators(self.graph, part.nodes),
                "after": list(part.after),
                "why": part.why,
                "predicted_s": part.predicted_s,
                "start_s": part.start_s,
                "sources": {str(source): count for source, count in part.sources.items()},
                "alternatives": {name: each for name, each in part.seconds.items() if name != part.device},
                "unsupported": dict(part.unsupported),
            }
            for part in self.parts
        ]

    def to_dict(self) -> dict[str, Any]:
        """The whole plan in plain values."""
        return {
            "graph": self.graph.name,
            "intent": str(self.intent),
            "plan": self.name,
            "devices": list(self.devices),
            "predicted": _predicted(self.predicted),
            "parts": self.explain(),
            "alternatives": [
                {
                    "name": each.name,
                    "devices": list(each.devices),
                    "parts": each.parts,
                    "single": each.single,
                    "predicted": _predicted(each.predicted),
                    "memory_bytes": dict(each.memory_bytes),
                    "measured_s": each.measured_s,
                    "refused": each.refused,
                }
                for each in self.alternatives
            ],
            "unused_nodes": len(self.dead),
        }

    def dot(self) -> str:
        """The parts as a graph for Graphviz."""
        colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(self.devices)}
        lines = [
            "digraph plan {",
            "  rankdir=TB;",
            '  node [shape=box, style="filled,rounded", fontname="sans-serif"];',
        ]
        for part in self.parts:
            text = (
                f"{part.number}: {part.device}\n{operators(self.graph, part.nodes)}\n{milliseconds(part.predicted_s)}"
            )
            lines.append(f"  p{part.number} [label={_quoted(text)}, fillcolor={_quoted(colours[part.device])}];")
        where = {index: part for part in self.parts for node in part.nodes for index in self.graph.nodes[node].outputs}
        for part in self.parts:
            for source in part.after:
                crossing = {
                    index
                    for node in part.nodes
                    for index in self.graph.nodes[node].inputs
                    if index in where and where[index].number == source
                }
                label = ", ".join(str(self.graph.values[index].spec) for index in sorted(crossing)[:3])
                lines.append(f"  p{source} -> p{part.number} [label={_quoted(label)}];")
        return "\n".join([*lines, "}"]) + "\n"

    def renamed(self, name: str) -> Plan:
        return replace(self, name=name)


def operators(graph: Graph, nodes: Iterable[int]) -> str:
    """As in "MatMul ×6, Add ×4, Softmax"."""
    counted = Counter(graph.nodes[node].op[:40] for node in nodes)
    shown = [f"{op} ×{count}" if count > 1 else op for op, count in counted.most_common(_SHOWN_OPERATORS)]
    return ", ".join(shown) + (f" and {len(counted) - len(shown)} more" if len(counted) > len(shown) else "")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _predicted(prediction: Prediction) -> dict[str, float]:
    return {
        "latency_s": prediction.latency_s,
        "period_s": prediction.period_s,
        "energy_j": prediction.energy_j,
    }


def _quoted(text: str) -> str:
    """A string of the DOT language: names in a model are other people's text."""
    clean = "".join(each if each.isprintable() or each == "\n" else "�" for each in text)
    return '"' + clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
