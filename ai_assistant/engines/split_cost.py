"""What layers of a language model cost on a device: seconds, joules and bytes, for `split.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf, isfinite
from typing import TypeVar

from ai_assistant.hal.hetero.cost import ASSUMED_BYTES_S, ASSUMED_FLOPS_S, ASSUMED_LAUNCH_S
from ai_assistant.hal.hetero.intent import Objective

N = TypeVar("N", int, float)
READ_TOKENS, WRITTEN_TOKENS = 512, 128
"""The request that placements are compared by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What one layer takes; the output is one, too. Bytes, and operations per token, a multiply-add being two."""

    weights_bytes: int = 0
    expert_bytes: int = 0
    """Of the weights, those of which a token uses some experts only."""
    host_has_bytes: int = 0
    """Of the weights, what the host keeps wherever the layer runs."""
    repacked_bytes: int = 0
    """Copies that the host's processor makes of its own layers."""
    cache_bytes: int = 0
    """Keys, values and states of all sequences, full."""
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A model and how it is loaded. Sizes in bytes."""

    layers: tuple[Layer, ...]
    output: Layer
    width_bytes: int = 0
    """What goes from one layer to the next, per token."""
    logits_bytes: int = 0
    """What the output makes, per token that is asked for."""
    expert_share: float = 1.0
    """Of the experts, how many a token uses."""
    sequences: int = 1
    batch_tokens: int = 512
    host_bytes: int = 0
    """What the host takes with no layer at all: process, embedding, inputs and results of a step."""
    host_step_bytes: int = 0
    """What it works in beside that, if it has a layer."""
    device_step_bytes: int = 0
    """What another device works in, if it has a layer."""
    output_step_bytes: int = 0
    """What the device with the output needs for its results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitDevice:
    """A device as the language model engine sees it; rates are those of `hal.hetero`'s cost model.

    Args:
        name: as in an intent: `cpu`, or BACKEND:DEVICE.
        free_bytes: of memory; 0 counts as none.
        bytes_s: how fast a product reads weights that are there already.
        launch_s: until work on it has begun and its end is known.
        copy_bytes_s: between its memory and the host's.
        shares_host: its memory is the host's.
        software: a program that plays a device.
        watts: while it works; None: nobody knows.
    """

    name: str
    kind: str = "gpu"
    free_bytes: int = 0
    flops_s: float = 0.0
    bytes_s: float = 0.0
    launch_s: float = 0.0
    copy_bytes_s: float = inf
    shares_host: bool = False
    software: bool = False
    watts: float | None = None

    @property
    def usable(self) -> bool:
        """Its rates are numbers that something can be predicted with."""
        return (
            all(isfinite(each) and each > 0 for each in (self.flops_s, self.bytes_s))
            and self.copy_bytes_s > 0  # NaN is not
            and isfinite(self.launch_s)
            and self.launch_s >= 0
        )

    def with_assumed(self) -> SplitDevice:
        """The same with assumed rates where they are unusable."""
        if self.usable:
            return self
        return replace(
            self,
            flops_s=ASSUMED_FLOPS_S,
            bytes_s=ASSUMED_BYTES_S,
            launch_s=ASSUMED_LAUNCH_S,
            copy_bytes_s=ASSUMED_BYTES_S,
        )


class Costs:
    """Costs of runs of places – layers, then the output – on devices.

    Args:
        objective: latency: one sequence writes; performance: all do; efficiency: joules for one.
    """

    def __init__(
        self, model: ModelSizes, host: SplitDevice, devices: Sequence[SplitDevice], objective: Objective
    ) -> None:
        self._model = model
        self.host = host
        self._places = (*model.layers, model.output)
        self.places = len(self._places)
        self._writing = max(1, model.sequences) if objective is Objective.PERFORMANCE else 1
        self._batch = max(1, model.batch_tokens)
        self._rated = {each.name: each.with_assumed() for each in (host, *devices)}
        every = [each.watts for each in self._rated.values()]
        # Where one cannot be measured all count alike, as in hal.hetero.
        known = objective is Objective.EFFICIENCY and all(each is not None and 0 < each < inf for each in every)
        self._watts = {name: float(each.watts or 1.0) if known else 1.0 for name, each in self._rated.items()}
        self._tables = {name: self._table(each) for name, each in self._rated.items()}
        self._bytes = _sums(each.weights_bytes + each.cache_bytes for each in self._places)
        self._host_bytes = _sums(
            each.weights_bytes - each.host_has_bytes + each.repacked_bytes + each.cache_bytes for each in self._places
        )

    def _table(self, device: SplitDevice) -> tuple[list[float], list[float]]:
        """Sums over the places: seconds of a step that writes, and of one that reads a batch."""
        write = [self._place_s(place, device, self._writing, self._writing) for place in range(self.places)]
        # The output is asked for one token of a prompt.
        read = [
            self._place_s(place, device, 1 if place == self.places - 1 else self._batch, 1)
            for place in range(self.places)
        ]
        return _sums(write), _sums(read)

    def _place_s(self, place: int, device: SplitDevice, tokens: int, sequences: int) -> float:
        layer, model = self._places[place], self._model
        used = min(1.0, tokens * model.expert_share)
        weights = layer.weights_bytes - layer.expert_bytes * (1.0 - used)
        cache = layer.cache_bytes / 2 * sequences / max(1, model.sequences)  # on average half full
        return max((weights + cache) / device.bytes_s, layer.flops * tokens / device.flops_s)

    def cuts(self, most: int) -> list[int]:
        """Where a part may end."""
        each = -(-self.places // most)
        return sorted({*range(each, self.places, each), self.places - 1, self.places} - {0})

    def bytes_of(self, device: SplitDevice, begin: int, end: int) -> int:
        """What a device's memory holds with these places; the host's also without any."""
        model, sums = self._model, self._host_bytes if device is self.host else self._bytes
        needed = sums[end] - sums[begin]
        step = 0
        if begin < min(end, self.places - 1):
            step = model.host_step_bytes if device is self.host else model.device_step_bytes
        if begin < end == self.places:
            step = max(step, model.output_step_bytes)
        return needed + step + (model.host_bytes if device is self.host else 0)

    def score(self, device: SplitDevice, before: SplitDevice | None, begin: int, end: int) -> float:
        """Seconds, or joules, of the compared request in these places, with the way to them and back."""
        write, read = self._steps_s(device, before, begin, end)
        seconds = READ_TOKENS * read / self._batch + WRITTEN_TOKENS * write / self._writing
        return seconds * self._watts[device.name]

    def token_s(self, parts: Sequence[tuple[SplitDevice, int, int]]) -> tuple[float, float]:
        """Seconds per written and per read token."""
        write = read = 0.0
        before: SplitDevice | None = None
        for device, begin, end in parts:
            one, other = self._steps_s(device, before, begin, end)
            write, read, before = write + one, read + other, device
        return write / self._writing, read / self._batch

    def _steps_s(self, device: SplitDevice, before: SplitDevice | None, begin: int, end: int) -> tuple[float, float]:
        rated, model = self._rated[device.name], self._model
        write, read = (sums[end] - sums[begin] + rated.launch_s for sums in self._tables[device.name])
        former = None if before is None else self._rated[before.name]
        way = sum(1 / each.copy_bytes_s for each in (former, rated) if each is not None and each.name != self.host.name)
        write += way * model.width_bytes * self._writing
        read += way * model.width_bytes * self._batch
        if end == self.places and device is not self.host:
            write += model.logits_bytes * self._writing / rated.copy_bytes_s
            read += model.logits_bytes / rated.copy_bytes_s
        return write, read


def _sums(numbers: Iterable[N]) -> list[N]:
    """Of the first 0, 1, 2 … numbers."""
    return list(accumulate(numbers, initial=0))
