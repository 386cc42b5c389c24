"""Times of operators, launches and transfers on this machine: measured where they were, estimated where not."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from ai_assistant.errors import AIAssistantError, BackendFailed, DeviceLost, NotSupported, OutOfMemory, Timeout
from ai_assistant.hal.contract import Context, Queue
from ai_assistant.hal.graph import NO_VALUE, Graph, Node, TensorSpec
from ai_assistant.hal.hetero import measure
from ai_assistant.hal.hetero.contract import Estimate, Source
from ai_assistant.hal.hetero.store import Store, key
from ai_assistant.hal.hetero.work import Work, work

ASSUMED_FLOPS_S = 20e9
ASSUMED_BYTES_S = 8e9
ASSUMED_LAUNCH_S = 50e-6
ASSUMED_HOP_S = 30e-6
"""A modest CPU. Only differences between devices matter, and those without a measurement are all alike."""
_RATES = "rates"
_RESIDENT = "rates with constants"
_WATTS = "watts"
_MAX_WATTS = 1e4


class CostModel:
    """The planner's `Costs` for open devices.

    Args:
        versions: of each device's backend; measurements of another version are not used.
        folder: where measurements are kept; default: the user's cache.
    """

    def __init__(
        self, contexts: Mapping[str, Context], *, versions: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._contexts = contexts
        given = versions if versions is not None else getattr(contexts, "versions", {})
        self._stores = {name: Store(key(each, given.get(name, "")), folder) for name, each in contexts.items()}
        self._memo: WeakKeyDictionary[Graph, dict[int, tuple[str, Work]]] = WeakKeyDictionary()

    def node_s(self, device: str, node: Node, graph: Graph) -> Estimate:
        text, effort = self._class(node, graph)
        if (found := self._stores[device].get(text)) is not None and len(found) == 3:
            seconds, flops, moved = found
            # A class has sizes of up to twice each other: the measured time is stretched by the work.
            whole = effort.flops + effort.moved_bytes
            scale = whole / (flops + moved) if flops + moved and whole else 1.0
            return Estimate(seconds * scale, Source.MEASURED)
        flops_s, bytes_s, _, _ = self._rates(device)
        source = Source.ESTIMATED if flops_s and bytes_s else Source.ASSUMED
        return Estimate(effort.seconds(flops_s or ASSUMED_FLOPS_S, bytes_s or ASSUMED_BYTES_S), source)

    def launch_s(self, device: str) -> float:
        return self._rates(device)[2] or ASSUMED_LAUNCH_S

    def transfer_s(self, source: str, target: str, nbytes: int) -> float:
        if source == target:
            return 0.0
        times = self._stores[target].get(self._route(source))
        shared = self._contexts[source].capabilities.host_memory and self._contexts[target].capabilities.host_memory
        if not times:
            return ASSUMED_HOP_S + (0.0 if shared else nbytes / ASSUMED_BYTES_S)
        hop, *copies = times
        if shared or not copies:
            return hop
        return hop + between(copies, nbytes)

    def watts(self, device: str) -> float | None:
        found = self._stores[device].get(_WATTS)
        return found[0] if found else None

    def resident(self, device: str) -> tuple[float, float]:
        """Operations and bytes per second of products with what is on the device; 0 where nobody measured them."""
        found = self._stores[device].get(_RESIDENT)
        return (found[0], found[1]) if found is not None and len(found) == 2 else (0.0, 0.0)

    def moved_s(self, device: str) -> float:
        """Bytes per second of an operator whose operands the host gives and gets back; 0 where nobody measured them."""
        return self._rates(device)[1]

    def _class(self, node: Node, graph: Graph) -> tuple[str, Work]:
        known = self._memo.setdefault(graph, {})
        if (found := known.get(id(node))) is None:
            found = known[id(node)] = signature(node, graph), work(node, graph)
        return found

    def measure(self, graph: Graph, devices: Iterable[str], budget_s: float = 10.0) -> int:
        """Measure what is not known of a graph's operators, the devices' rates, and the ways between them.

        Args:
            budget_s: when to stop; the operators with the most work come first.

        Returns how many operators were measured.

        Raises:
            DeviceLost
        """
        names = tuple(devices)
        deadline = time.monotonic() + budget_s
        count = 0
        for name in names:
            self._measure_rates(name)
            self._measure_watts(name)
            for other in names:
                if other != name and self._stores[name].get(self._route(other)) is None:
                    self._measure_route(other, name)
        classes: dict[str, tuple[float, Node]] = {}
        for node in graph.nodes:
            text, effort = self._class(node, graph)
            classes.setdefault(text, (effort.flops + effort.moved_bytes, node))
        heaviest = [(text, node) for text, (_, node) in sorted(classes.items(), key=lambda each: -each[1][0])]
        for name in names:
            count += self._measure_nodes(name, heaviest, graph, deadline)
        for name in names:
            self._stores[name].save()
        return count

    def measure_resident(self, devices: Iterable[str]) -> None:
        """Measure what is not known of the devices' rates, with operands that come and with constants.

        Raises:
            DeviceLost
        """
        for name in devices:
            store = self._stores[name]
            self._measure_rates(name)
            self._measure_watts(name)
            if store.get(_RESIDENT) is None:
                with contextlib.suppress(BackendFailed, NotSupported, OutOfMemory, Timeout):
                    store.put(_RESIDENT, *measure.resident_rates(self._contexts[name]))
            store.save()

    def _measure_nodes(self, name: str, nodes: Iterable[tuple[str, Node]], graph: Graph, deadline: float) -> int:
        context, store = self._contexts[name], self._stores[name]
        floor = self._rates(name)[3]
        queue = context.queue()
        count = 0
        try:
            for text, node in nodes:
                if time.monotonic() > deadline:
                    break
                if store.get(text) is not None or not context.supports(node, graph):
                    continue
                try:
                    seconds = measure.node_s(context, queue, node, graph, floor)
                except DeviceLost:
                    raise
                except AIAssistantError:
                    # With made-up inputs some operators fail; their time stays an estimate.
                    _settle(queue)
                    continue
                effort = work(node, graph)
                store.put(text, seconds, effort.flops, effort.moved_bytes)
                count += 1
        finally:
            queue.close()
        return count

    def _measure_rates(self, name: str) -> None:
        if self._stores[name].get(_RATES) is None:
            try:
                self._stores[name].put(_RATES, *measure.rates(self._contexts[name]))
            except DeviceLost:
                raise
            except AIAssistantError:
                return  # a device that cannot even do this is not worth more; its rates stay assumed

    def _measure_route(self, source: str, target: str) -> None:
        try:
            hop = measure.hop_s(self._contexts[source], self._contexts[target])
            copies = measure.transfer_s(self._contexts[source], self._contexts[target])
        except DeviceLost:
            raise
        except AIAssistantError:
            return
        self._stores[target].put(self._route(source), hop, *copies)

    def _measure_watts(self, name: str) -> None:
        context, store = self._contexts[name], self._stores[name]
        if context.capabilities.reads_power and store.get(_WATTS) is None:
            try:
                watts = measure.watts(context)
            except DeviceLost:
                raise
            except AIAssistantError:
                return
            if watts is not None and 0 < watts < _MAX_WATTS:
                store.put(_WATTS, watts)

    def _rates(self, device: str) -> tuple[float, ...]:
        found = self._stores[device].get(_RATES)
        return found if found is not None and len(found) == 4 else (0.0, 0.0, 0.0, 0.0)

    def _route(self, source: str) -> str:
        return f"from {source} {self._contexts[source].device.id} {self._contexts[source].device.name}"


def _settle(queue: Queue) -> None:
    with contextlib.suppress(AIAssistantError):
        queue.synchronize(measure.TIMEOUT_S)


def between(copies: list[float] | tuple[float, ...], nbytes: int) -> float:
    """The time of a copy from those of `measure.SIZES`: straight lines between them, and on beyond the last."""
    sizes = measure.SIZES[: len(copies)]
    if len(copies) == 1 or nbytes <= sizes[0]:
        return copies[0] * max(1.0, nbytes / sizes[0])
    for place in range(1, len(copies)):
        if nbytes <= sizes[place] or place == len(copies) - 1:
            share = (nbytes - sizes[place - 1]) / (sizes[place] - sizes[place - 1])
            slope = max(0.0, copies[place] - copies[place - 1])
            return copies[place - 1] + share * slope
    return copies[-1]


def signature(node: Node, graph: Graph) -> str:
    """An operator's class: name, version, attributes, and types and shapes, each size rounded up to a power of two."""
    inputs = [
        "-"
        if index == NO_VALUE
        else ("=" if graph.values[index].data is not None else "") + _rounded(graph.values[index].spec)
        for index in node.inputs
    ]
    outputs = [_rounded(graph.values[index].spec) for index in node.outputs if index != NO_VALUE]
    attributes = ""
    if node.attributes:
        told = sorted(
            (name, f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else value)
            for name, value in node.attributes.items()
        )
        attributes = hashlib.sha256(repr(told).encode(errors="replace")).hexdigest()[:12]
    text = f"{node}({','.join(inputs)})->{','.join(outputs)} {attributes}"
    return text if len(text) < 300 else hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _rounded(spec: TensorSpec | None) -> str:
    if spec is None:
        return "?"
    sizes = ",".join(
        "?" if size is None else str(1 << (size - 1).bit_length() if size > 0 else 0) for size in spec.shape
    )
    return f"{spec.dtype}[{sizes}]"
