"""A whole graph on a backend that may not run all of it: the rest is computed by the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ai_assistant.hal.conformance import oracle
from ai_assistant.hal.conformance.families.row import Sample
from ai_assistant.hal.conformance.subject import run
from ai_assistant.hal.contract import Context, Program, Queue
from ai_assistant.hal.graph import NO_VALUE, Array, Graph, Node


class Mixed:
    """A graph made ready. Consecutive nodes that the backend supports are one program.

    Raises:
        NotSupported, BackendFailed, …: what `compile` raised for nodes that are declared supported.
    """

    def __init__(self, context: Context, graph: Graph) -> None:
        self._context, self._graph = context, graph
        self.reasons: dict[str, str] = {}
        """Operator → why it is not supported."""
        self.missing = 0
        self._steps: list[tuple[Program, tuple[int, ...], tuple[int, ...]] | Node] = []
        together: list[int] = []
        for number, node in enumerate(graph.nodes):
            support = context.supports(node, graph)
            if support:
                together.append(number)
                continue
            self.missing += 1
            self.reasons.setdefault(node.op, support.reason)
            self._compile(together)
            together = []
            self._steps.append(node)
        self._compile(together)

    def _compile(self, numbers: list[int]) -> None:
        if numbers:
            part, inputs, outputs = self._graph.part(tuple(numbers))
            self._steps.append((self._context.compile(part), inputs, outputs))

    @property
    def ratio(self) -> float:
        """The share of nodes that the backend does not run, 0 to 1."""
        return self.missing / max(1, len(self._graph.nodes))

    def run(self, queue: Queue, inputs: Sequence[Array]) -> list[Array]:
        values = {index: value.data for index, value in enumerate(self._graph.values) if value.data is not None}
        values |= dict(zip(self._graph.inputs, inputs, strict=True))
        for step in self._steps:
            if isinstance(step, Node):
                given = [None if index == NO_VALUE else values[index] for index in step.inputs]
                sample = Sample(given, step.attributes, outputs=len(step.outputs))
                made = oracle.evaluate(step.op, sample, self._graph.opsets[""])
                values |= dict(zip(step.outputs, made, strict=True))
            else:
                program, wanted, outputs = step
                found = run(self._context, queue, program, [np.asarray(values[index]) for index in wanted])
                values |= dict(zip(outputs, found, strict=True))
        return [values[index] for index in self._graph.outputs]

    def close(self) -> None:
        for step in self._steps:
            if not isinstance(step, Node):
                step[0].close()
