"""Which layers of a language model run on which device: arithmetic on sizes and measured rates, nothing is loaded.

The native library gives a device layers that follow each other: the first ones may stay on the host's processor, then
each further device has its own, and the output, which counts as one more layer, is with the last. Layers run one after
the other, so a division adds up times and never hides them: it pays where no fast device holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from math import inf, isfinite
from typing import Any

from ai_assistant.engines.split_cost import Costs, Layer, ModelSizes, SplitDevice
from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.hetero.intent import Intent

__all__ = ["Candidate", "Layer", "ModelSizes", "Split", "SplitDevice", "split"]

GAIN = 0.97
"""A division is taken if it takes at most this share of the best single device's time; as for ONNX graphs."""
UNKNOWN_SPEED = "its speed is not known"
"""Why a device is left out that should not be."""
HOST_NAMES = ("cpu", "ggml:CPU")
_MOST_DEVICES = 4
"""Beside the host; of more, the fastest. There are 64 orders of four."""
_MOST_CUTS = 128
"""Places where a model is cut; one of more layers is cut at every second, third … layer."""
_MOST_OPEN = 32
"""Beginnings of a division, for one device and cut, that are looked at further."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to place the model that was looked at.

    Args:
        parts: (device, layers), in the order in which they run; the output counts as the last layer.
        decode_s: seconds per token that is written; for `performance` with all sequences writing, per token of any.
        prefill_s: seconds per token of a prompt, read in full batches.
        score: what is compared: seconds, or joules for `efficiency`, of reading 512 tokens and writing 128.
        memory_bytes: per device, the host always among them.
        host_bytes: of the host's memory, with what devices have of it that share it.
        refused: why it cannot be taken; "" where it can.
    """

    parts: tuple[tuple[str, int], ...]
    decode_s: float = 0.0
    prefill_s: float = 0.0
    score: float = inf
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    refused: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    @property
    def name(self) -> str:
        return " + ".join(self.devices) if len(self.parts) > 1 else f"{self.parts[0][0]} alone"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parts": [{"device": name, "layers": count} for name, count in self.parts],
            "decode_s": self.decode_s,
            "prefill_s": self.prefill_s,
            "score": self.score if isfinite(self.score) else None,
            "memory_bytes": dict(self.memory_bytes),
            "host_bytes": self.host_bytes,
            "refused": self.refused,
        }


@dataclass(frozen=True, slots=True)
class Split:
    """What was decided, and why."""

    taken: Candidate
    why: str
    looked_at: tuple[Candidate, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Devices that were not even looked at, and why."""

    @property
    def host_only(self) -> bool:
        return len(self.taken.parts) == 1 and self.taken.parts[0][0] == HOST_NAMES[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.taken.to_dict(),
            "why": self.why,
            "alternatives": [each.to_dict() for each in self.looked_at],
            "left_out": dict(self.left_out),
        }


def split(model: ModelSizes, host: SplitDevice, others: Sequence[SplitDevice], intent: Intent) -> Split:
    """The best placement of a model.

    Where nothing is certain the host has it: a device without a known speed, or without room, gets no layer, and of
    equally good placements the one with fewer parts is taken, the host's before any other.

    Args:
        host: the processor, named "cpu". Rates of it that are unusable are assumed.
        others: every other device, in the library's order.
        intent: OFF, an objective, or devices. One device that is named gets as many layers as it has room for; several
            share the model if that is better.

    Raises:
        InvalidArgument: a device that is named is none of these.
    """
    named, left_out = _resolve(intent, host, others)
    forced = bool(intent.devices)
    use_host = not forced or host in named
    devices = [each for each in named if each is not host]
    for each in list(devices):
        # Who is asked for by name alone is used however slow it may be.
        if not each.usable and (len(named) > 1 or not forced):
            left_out[each.name] = UNKNOWN_SPEED
            devices.remove(each)
    if len(devices) > _MOST_DEVICES:
        fastest = sorted(devices, key=lambda each: -each.bytes_s)[:_MOST_DEVICES]
        left_out.update({each.name: "there are faster ones" for each in devices if each not in fastest})
        devices = [each for each in devices if each in fastest]
    costs = Costs(model, host, devices, intent.objective)
    alone = _candidate(costs, (host,), (costs.places,))
    # The host takes a model that fits nowhere, too: its weights are mapped, and the kernel may drop pages.
    singles = [alone] if use_host or not devices else []
    singles += [_candidate(costs, (each,), (costs.places,)) for each in devices]
    divided: list[Candidate] = []
    if intent.mixed:
        divided = [_best(costs, chain) for chain in _chains(costs, devices, use_host)]
    looked_at = (*singles, *divided)
    whole = _least(each for each in singles if not each.refused)
    parts = _least(each for each in divided if not each.refused)
    if whole is None and parts is None and devices and forced:
        # Those that were named do not hold the model: they take what they can, and the host has the rest.
        rest = [_best(costs, chain, most=True) for chain in _chains(costs, devices, use_host=True)]
        parts = min((each for each in rest if not each.refused), key=_hosted, default=None)
        looked_at = (*looked_at, *rest)
    if parts is not None and (whole is None or parts.score <= whole.score * GAIN):
        return Split(parts, _why_divided(parts, whole, singles), looked_at, left_out)
    if whole is not None:
        return Split(whole, _why_whole(whole, singles, divided, forced=forced), looked_at, left_out)
    if alone not in looked_at:
        looked_at = (alone, *looked_at)
    return Split(alone, "no device has room for it: " + (alone.refused or "the host is left"), looked_at, left_out)


def _resolve(
    intent: Intent, host: SplitDevice, others: Sequence[SplitDevice]
) -> tuple[list[SplitDevice], dict[str, str]]:
    """Who may be used, and who not, with the reason."""
    if not intent.devices:
        left_out = {each.name: "it computes on the processor" for each in others if each.software}
        return [host, *(each for each in others if not each.software)], left_out
    found: list[SplitDevice] = []
    for name in intent.devices:
        # A backend alone means its first device, as for ONNX graphs.
        candidates = [*others, host] if name == "ggml" else [each for each in others if each.name == name]
        if name in HOST_NAMES:
            candidates = [host]
        if not candidates:
            raise InvalidArgument(
                f"language models cannot run on {name[:60]!r} here",
                hint=f"there are {', '.join((host.name, *(each.name for each in others)))}",
                param="hetero_compute",
            )
        if candidates[0] not in found:
            found.append(candidates[0])
    return found, {each.name: "it is not asked for" for each in others if each not in found}


def _chains(costs: Costs, devices: Sequence[SplitDevice], use_host: bool) -> Iterator[tuple[SplitDevice, ...]]:
    """Two devices or more in every order in which layers may run through them; the host only at the beginning."""
    for count in range(1, len(devices) + 1):
        for chain in permutations(devices, count):
            if use_host:
                yield (costs.host, *chain)
            if count > 1:
                yield chain


def _best(costs: Costs, chain: tuple[SplitDevice, ...], *, most: bool = False) -> Candidate:
    """The best cuts for devices in this order, each with one layer at least.

    Args:
        most: as few layers as possible on the host, instead of as little time.
    """
    if len(chain) > costs.places:
        return Candidate(tuple((each.name, 1) for each in chain), refused="it has fewer layers than there are devices")
    cuts = costs.cuts(_MOST_CUTS)
    # (score, bytes of the host's memory, ends of the parts so far), by the layer that comes next
    open_: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {0: [(0.0, 0, ())]}
    for place, device in enumerate(chain):
        before = chain[place - 1] if place else None
        last = place == len(chain) - 1
        new: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {}
        for begin, states in open_.items():
            for end in (costs.places,) if last else cuts:
                if end <= begin:
                    continue
                needed = costs.bytes_of(device, begin, end)
                if device is not costs.host and needed > device.free_bytes:
                    break  # and so are all that are longer
                score = costs.score(device, before, begin, end)
                if most and device is costs.host:
                    score += (end - begin) * 1e30
                taken = needed if device is costs.host or device.shares_host else 0
                new.setdefault(end, []).extend(
                    (former + score, pool + taken, (*ends, end)) for former, pool, ends in states
                )
        open_ = {end: _worth(states) for end, states in new.items()}
    resident = 0 if chain[0] is costs.host else costs.bytes_of(costs.host, 0, 0)
    room = costs.host.free_bytes
    fitting = [each for each in open_.get(costs.places, ()) if each[1] + resident <= room]
    if not fitting:
        return Candidate(tuple((each.name, 1) for each in chain), refused="they do not have room for it together")
    ends = min(fitting)[2]
    return _candidate(costs, chain, ends)


def _worth(states: list[tuple[float, int, tuple[int, ...]]]) -> list[tuple[float, int, tuple[int, ...]]]:
    """Those that are not both slower and larger than another."""
    kept: list[tuple[float, int, tuple[int, ...]]] = []
    for each in sorted(states):
        if not kept or each[1] < kept[-1][1]:
            kept.append(each)
    return kept[: _MOST_OPEN - 1] + kept[_MOST_OPEN - 1 :][-1:]


def _candidate(costs: Costs, chain: Sequence[SplitDevice], ends: Sequence[int]) -> Candidate:
    """Predicted for devices in this order, whose layers end there."""
    steps = list(zip(chain, (0, *ends[:-1]), ends, strict=True))
    memory = {costs.host.name: costs.bytes_of(costs.host, 0, 0)}
    score = 0.0
    before: SplitDevice | None = None
    pool = 0 if chain[0] is costs.host else memory[costs.host.name]
    refused = ""
    for device, begin, end in steps:
        needed = memory[device.name] = costs.bytes_of(device, begin, end)
        score += costs.score(device, before, begin, end)
        pool += needed if device is costs.host or device.shares_host else 0
        before = device
        if device is not costs.host and needed > device.free_bytes:
            refused = f"{device.name} needs {needed} bytes and has {max(0, device.free_bytes)}"
    if not refused and pool > costs.host.free_bytes:
        refused = f"the host's memory needs {pool} bytes and has {max(0, costs.host.free_bytes)}"
    decode_s, prefill_s = costs.token_s(steps)
    parts = tuple((device.name, end - begin) for device, begin, end in steps)
    return Candidate(parts, decode_s, prefill_s, score, memory, pool, refused)


def _least(candidates: Iterator[Candidate]) -> Candidate | None:
    """The best; of equal ones the first."""
    return min(candidates, key=lambda each: (each.score, len(each.parts)), default=None)


def _hosted(each: Candidate) -> tuple[int, float]:
    return sum(count for name, count in each.parts if name == HOST_NAMES[0]), each.score


def _why_whole(whole: Candidate, singles: Sequence[Candidate], divided: Sequence[Candidate], *, forced: bool) -> str:
    others = [each for each in singles if each is not whole]
    if not others and not divided:
        return "it is the one that is asked for" if forced else "there is no other device"
    fitting = [each for each in others if not each.refused]
    told = [f"{each.name} is predicted to take {each.score / whole.score:.2f} of that" for each in fitting]
    told += [each.refused for each in others if each.refused]
    better = [each for each in divided if not each.refused and each.score < whole.score]
    if better:
        told.append(f"{better[0].name} is predicted to gain less than 3 %")
    return "predicted to be the fastest" + (": " + "; ".join(told) if told else "")


def _why_divided(parts: Candidate, whole: Candidate | None, singles: Sequence[Candidate]) -> str:
    reasons = [each.refused for each in singles if each.refused]
    if whole is None:
        return "no device that may be used holds it alone: " + "; ".join(reasons)
    share = parts.score / whole.score
    return f"predicted to take {share:.2f} of {whole.name}" + ("".join(f"; {each}" for each in reasons))
