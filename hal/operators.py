"""Which operators a backend runs, for what types, and why not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ai_assistant.errors import AlreadyExists, NotSupported
from ai_assistant.hal.graph import NO_VALUE, Array, DType, Graph, Node

ROW_MAJOR = "row-major"
NEWEST_OPSET = 22
"""The newest version of ONNX's own operators that anybody could know of when this was written."""
Check = Callable[[Node, Graph], str]
"""Says why a node cannot be run although its operator and type can; "" when it can."""
Kernel = Callable[[Node, list[Any]], tuple[Array, ...]]
"""Computes a node's outputs of its inputs: arrays, None for those left out."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a node can be run. True or false like a bool; when false, with the reason."""

    supported: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.supported


YES = Support(True)


@dataclass(frozen=True, slots=True)
class Operator:
    """What is declared of an operator.

    Args:
        since, until: the versions whose meaning is implemented; until 0 means every later one that is known now
            (of ONNX's own operators, to NEWEST_OPSET).
        data_input: the input whose type `dtypes` speaks of.
    """

    op: str
    dtypes: frozenset[DType]
    since: int = 1
    until: int = 0
    domain: str = ""
    layouts: frozenset[str] = frozenset({ROW_MAJOR})
    data_input: int = 0
    check: Check | None = None
    kernel: Kernel | None = None

    def means(self, version: int) -> bool:
        """Whether that version is one of those declared."""
        return self.since <= version <= (self.until or (version if self.domain else max(self.since, NEWEST_OPSET)))


class OperatorRegistry:
    """The operators of one backend."""

    def __init__(self) -> None:
        self._operators: dict[tuple[str, str], list[Operator]] = {}

    def register(
        self,
        op: str,
        dtypes: Collection[DType],
        layouts: Collection[str] = (ROW_MAJOR,),
        *,
        since: int = 1,
        until: int = 0,
        domain: str = "",
        data_input: int = 0,
        check: Check | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        """Declare that an operator is run.

        Args:
            op, dtypes, layouts, since, until, domain, data_input: as in `Operator`.
            check: says why a node cannot be run nevertheless; `same`, `broadcast`, `matmul` and what `makes` makes
                are there. Without one, a node whose shapes contradict its operator is declared supported.
            kernel: computes one node on the host.

        Raises:
            AlreadyExists: another entry covers some of the same versions.
        """
        entry = Operator(op, frozenset(dtypes), since, until, domain, frozenset(layouts), data_input, check, kernel)
        entries = self._operators.setdefault((domain, op), [])
        for other in entries:
            if since <= (other.until or since) and other.since <= (until or other.since):
                raise AlreadyExists(f"{op} is registered for version {max(since, other.since)} already")
        entries.append(entry)

    def find(self, node: Node) -> Operator | None:
        """The entry for that operator in that version."""
        for entry in self._operators.get((node.domain, node.op), ()):
            if entry.means(node.version):
                return entry
        return None

    def supports(self, node: Node, graph: Graph) -> Support:
        """Whether a node of a graph can be run, with the reason when not."""
        entry = self.find(node)
        if entry is None:
            known = self._operators.get((node.domain, node.op))
            versions = ", ".join(f"{each.since} to {each.until or 'newest'}" for each in known or ())
            return Support(False, f"{node} is not implemented" + (f" (versions {versions} are)" if known else ""))
        index = node.inputs[entry.data_input] if entry.data_input < len(node.inputs) else NO_VALUE
        # A generator such as Range's constant forms has no input: what it makes tells the type.
        value = graph.values[index] if index != NO_VALUE else graph.values[node.outputs[0]]
        if value.spec is None:
            return Support(False, f"the type of {value.name[:60]!r} is not known")
        if value.spec.dtype not in entry.dtypes:
            return Support(False, f"{node} is not implemented for {value.spec.dtype}")
        reason = entry.check(node, graph) if entry.check else ""
        return Support(False, reason) if reason else YES

    def kernel(self, node: Node) -> Kernel:
        """Raises NotSupported: there is none."""
        entry = self.find(node)
        if entry is None or entry.kernel is None:
            raise NotSupported(f"there is no kernel for {node}")
        return entry.kernel

    def __iter__(self) -> Iterator[Operator]:
        for entries in self._operators.values():
            yield from entries

    def __len__(self) -> int:
        return len(self._operators)


def makes(inputs: int, shape: Callable[..., tuple[int, ...]]) -> Check:
    """A check for operators that take so many tensors and make one, all of the same type.

    A graph merely says what shapes its values have. Nobody before the backend compares that with what its operators
    make of their inputs, and a kernel that trusts it writes where it should not.

    Args:
        shape: gives the output's shape, given one shape per input; raises ValueError or IndexError where there is none.
    """

    def check(node: Node, graph: Graph) -> str:
        indices = (*node.inputs, *node.outputs)
        if len(node.inputs) != inputs or len(node.outputs) != 1 or NO_VALUE in indices:
            return f"{node} is implemented for {inputs} input{'s' * (inputs != 1)} and one output"
        specs = [graph.spec(index) for index in indices]
        if len({spec.dtype for spec in specs}) > 1:
            return f"{node} is not implemented for {', '.join(map(str, specs))}: mixed types"
        *given, made = (spec.sizes for spec in specs)
        try:
            right = shape(*given)
        except (ValueError, IndexError) as error:
            return f"{node}: {error}"
        return "" if right == made else f"{node} makes the shape {right} here, and the graph says {made}"

    def named(node: Node, graph: Graph) -> str:
        try:
            return check(node, graph)
        except NotSupported as error:  # a type or a size that is not known
            return error.message

    return named


def _matmul(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if not a or not b:
        raise ValueError("a single number is no matrix")
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    if a[-1] != (b[-2] if len(b) > 1 else b[0]):
        raise ValueError(f"matrices {a} and {b} do not fit")
    return (*np.broadcast_shapes(a[:-2], b[:-2]), *rows, *columns)


same = makes(1, lambda x: x)
"""One input, and an output like it."""
broadcast = makes(2, np.broadcast_shapes)
"""Two inputs that are broadcast as NumPy does."""
matmul = makes(2, _matmul)
"""Matrices, or stacks of them; a vector is a row on the left and a column on the right."""
