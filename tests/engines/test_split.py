"""Which layers run where: arithmetic that is compared with every other way to do it, and inputs that are none."""

from __future__ import annotations

import math
from itertools import pairwise, permutations, product
from typing import Any

import pytest

from ai_assistant.engines.split import GAIN, Candidate, split
from ai_assistant.engines.split_cost import Costs, Layer, ModelSizes, SplitDevice
from ai_assistant.errors import InvalidArgument
from ai_assistant.hal.hetero.intent import OFF, Intent, Objective, parse

MB = 1 << 20
ON = parse("ON")


def model(layers: int = 8, size: int = 100 * MB, **values: Any) -> ModelSizes:
    each = Layer(weights_bytes=size, cache_bytes=10 * MB, flops=4.0 * size)
    output = Layer(weights_bytes=size // 2, flops=2.0 * size)
    return ModelSizes(
        **{
            "layers": (each,) * layers, "output": output, "width_bytes": 16 << 10, "logits_bytes": 512 << 10,
            "sequences": 4, "host_bytes": 80 * MB, "host_step_bytes": 40 * MB, "device_step_bytes": 30 * MB,
            "output_step_bytes": 5 * MB, **values,
        }
    )  # fmt: skip


def host(**values: Any) -> SplitDevice:
    return SplitDevice(
        **{
            "name": "cpu", "kind": "cpu", "free_bytes": 8000 * MB, "flops_s": 1e11, "bytes_s": 2e10, "launch_s": 2e-5,
            "copy_bytes_s": 1e10, "shares_host": True, **values,
        }
    )  # fmt: skip


def gpu(name: str = "ggml:Vulkan0", **values: Any) -> SplitDevice:
    return SplitDevice(
        **{
            "name": name, "free_bytes": 4000 * MB, "flops_s": 4e12, "bytes_s": 2e11, "launch_s": 1e-4,
            "copy_bytes_s": 8e9, **values,
        }
    )  # fmt: skip


def layers_of(found: Candidate) -> dict[str, int]:
    return dict(found.parts)


def test_without_another_device_the_host_has_it() -> None:
    for intent in (OFF, ON, parse("performance"), parse("efficiency"), parse("cpu"), parse("ggml:CPU"), parse("ggml")):
        found = split(model(), host(), [], intent)
        assert found.taken.parts == (("cpu", 9),)
        assert found.host_only
        assert not found.taken.refused


@pytest.mark.parametrize("intent", [OFF, ON, parse("performance"), parse("efficiency")], ids=str)
def test_a_faster_device_that_holds_it_has_all_of_it(intent: Intent) -> None:
    found = split(model(), host(), [gpu()], intent)
    assert found.taken.parts == (("ggml:Vulkan0", 9),)
    assert not found.host_only
    # 8 layers with their caches, half a layer as output, and what a step works in.
    assert found.taken.memory_bytes["ggml:Vulkan0"] == (8 * 110 + 50 + 30) * MB
    assert found.taken.memory_bytes["cpu"] == found.taken.host_bytes == 80 * MB
    assert "cpu alone is predicted to take" in found.why


def test_a_slower_device_gets_nothing() -> None:
    found = split(model(), host(), [gpu(bytes_s=1e10, flops_s=1e10)], ON)
    assert found.taken.parts == (("cpu", 9),)


def test_a_device_without_room_for_all_takes_the_end_and_only_where_that_was_asked_for() -> None:
    small = gpu(free_bytes=520 * MB)
    found = split(model(), host(), [small], ON)
    # 4 layers of 110, the output of 50 and 30 for a step.
    assert found.taken.parts == (("cpu", 4), ("ggml:Vulkan0", 5))
    assert "needs" in found.why
    assert split(model(), host(), [small], OFF).taken.parts == (("cpu", 9),)
    # Whoever names it gets it, with the rest on the host.
    named = split(model(), host(), [small], parse("ggml:Vulkan0"))
    assert named.taken.parts == (("cpu", 4), ("ggml:Vulkan0", 5))
    assert "no device that may be used holds it alone" in named.why


def test_a_gain_below_three_percent_is_none() -> None:
    """A device is made slower until what it would save is less; the last division taken is worth the rule's share."""
    taken = []
    for percent in range(100, 250):
        other = gpu(bytes_s=2e10 * percent / 100, flops_s=1e11 * percent / 100, free_bytes=300 * MB, launch_s=0)
        found = split(model(), host(), [other], ON)
        best = min(each.score for each in found.looked_at if len(each.parts) == 1 and not each.refused)
        divided = [each for each in found.looked_at if len(each.parts) > 1 and not each.refused]
        assert (found.taken in divided) == (min(each.score for each in divided) <= GAIN * best)
        taken.append(found.taken in divided)
    assert not taken[0]
    assert taken[-1]
    assert taken == sorted(taken)


def test_a_device_on_the_hosts_memory_counts_there() -> None:
    shared = gpu(shares_host=True, free_bytes=8000 * MB)
    # Both have enough by themselves, and not together with what the host needs anyway.
    tight = host(free_bytes=(8 * 110 + 50 + 30 + 80 - 1) * MB)
    assert split(model(), host(), [shared], ON).taken.host_bytes == (8 * 110 + 50 + 30 + 80) * MB
    refused = [each for each in split(model(), tight, [shared], ON).looked_at if each.devices == (shared.name,)]
    assert "host's memory" in refused[0].refused
    own = split(model(), tight, [gpu()], ON).taken
    assert own.parts == ((shared.name, 9),)
    assert own.host_bytes == 80 * MB


def test_nothing_fits_anywhere() -> None:
    found = split(model(), host(free_bytes=10 * MB), [gpu(free_bytes=100 * MB)], ON)
    assert found.taken.parts == (("cpu", 9),)
    assert "no device has room" in found.why
    assert found.taken.refused


@pytest.mark.parametrize("free", [0, -5])
def test_a_device_without_free_memory(free: int) -> None:
    for intent in (OFF, ON, parse("ggml:Vulkan0"), parse("cpu,ggml:Vulkan0")):
        assert split(model(), host(), [gpu(free_bytes=free)], intent).taken.parts == (("cpu", 9),)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("rate", ["flops_s", "bytes_s"])
def test_rates_that_are_none(rate: str, bad: float) -> None:
    broken: dict[str, Any] = {rate: bad}
    found = split(model(), host(), [gpu(**broken)], ON)
    assert found.taken.parts == (("cpu", 9),)
    assert found.left_out == {"ggml:Vulkan0": "its speed is not known"}
    # Of the host they are assumed.
    found = split(model(), host(**broken), [gpu()], ON)
    assert found.taken.parts == (("ggml:Vulkan0", 9),)
    assert all(math.isfinite(each.score) for each in found.looked_at if not each.refused)
    # Who names one device gets it.
    assert split(model(), host(), [gpu(**broken)], parse("ggml:Vulkan0")).taken.parts == (("ggml:Vulkan0", 9),)


@pytest.mark.parametrize(("field", "bad"), [("launch_s", math.nan), ("launch_s", -1.0), ("copy_bytes_s", math.nan),
                                            ("copy_bytes_s", 0.0)])  # fmt: skip
def test_ways_that_are_none(field: str, bad: float) -> None:
    broken: dict[str, Any] = {field: bad}
    assert split(model(), host(), [gpu(**broken)], ON).left_out == {"ggml:Vulkan0": "its speed is not known"}


def test_no_layers_and_one_huge_one() -> None:
    empty = model(layers=0)
    assert split(empty, host(), [gpu()], ON).taken.parts == (("ggml:Vulkan0", 1),)
    assert split(empty, host(), [gpu()], OFF).taken.memory_bytes["ggml:Vulkan0"] == 55 * MB
    huge = model(layers=1, size=5000 * MB)
    found = split(huge, host(), [gpu()], ON)
    # The layer fits on the host only; the output would fit on the other one.
    assert found.taken.parts == (("cpu", 1), ("ggml:Vulkan0", 1))
    assert found.taken.memory_bytes["ggml:Vulkan0"] == 2505 * MB
    assert split(huge, host(), [gpu(free_bytes=2504 * MB)], ON).taken.parts == (("cpu", 2),)


def test_of_equals_the_host_then_the_first() -> None:
    same: dict[str, Any] = {key: getattr(host(), key) for key in ("free_bytes", "flops_s", "bytes_s", "launch_s")}
    twin = gpu(**{**same, "copy_bytes_s": math.inf})
    assert split(model(), host(), [twin], ON).taken.parts == (("cpu", 9),)
    assert split(model(), host(), [gpu("ggml:A"), gpu("ggml:B")], ON).taken.parts == (("ggml:A", 9),)


def test_software_is_used_only_by_its_name() -> None:
    soft = gpu(software=True)
    for intent in (OFF, ON, parse("performance")):
        found = split(model(), host(), [soft], intent)
        assert found.taken.parts == (("cpu", 9),)
        assert found.left_out == {"ggml:Vulkan0": "it computes on the processor"}
    assert split(model(), host(), [soft], parse("ggml:Vulkan0")).taken.parts == (("ggml:Vulkan0", 9),)
    assert split(model(), host(), [soft], parse("ggml")).taken.parts == (("ggml:Vulkan0", 9),)


def test_names() -> None:
    with pytest.raises(InvalidArgument, match="onnxruntime") as error:
        split(model(), host(), [gpu()], parse("cpu,onnxruntime"))
    assert error.value.param == "hetero_compute"
    assert "ggml:Vulkan0" in error.value.hint
    found = split(model(), host(), [gpu("ggml:A"), gpu("ggml:B")], parse("cpu,ggml:B"))
    assert found.taken.parts == (("ggml:B", 9),)
    assert found.left_out == {"ggml:A": "it is not asked for"}
    # The host by two of its names is one device.
    assert split(model(), host(), [], parse("cpu,ggml:CPU")).taken.parts == (("cpu", 9),)


def test_two_devices_that_hold_it_together_do_so_without_the_host() -> None:
    pair = [gpu("ggml:A", free_bytes=600 * MB), gpu("ggml:B", free_bytes=600 * MB)]
    found = split(model(), host(), pair, ON)
    assert set(layers_of(found.taken)) == {"ggml:A", "ggml:B"}
    assert sum(layers_of(found.taken).values()) == 9
    assert split(model(), host(), pair, parse("ggml:A,ggml:B")).taken.parts == found.taken.parts


def test_many_devices_and_many_layers_end() -> None:
    devices = [gpu(f"ggml:{place}", free_bytes=4000 * MB, bytes_s=1e11 + place) for place in range(16)]
    found = split(model(layers=512), host(free_bytes=80_000 * MB), devices, ON)
    assert sum(count for _, count in found.taken.parts) == 513
    assert len(found.left_out) == 12


def test_experts_are_read_by_share() -> None:
    dense, sparse = model(), model(expert_share=0.25)
    layers = tuple(
        Layer(weights_bytes=100 * MB, expert_bytes=80 * MB, cache_bytes=10 * MB, flops=1.0) for _ in range(8)
    )
    sparse = model(layers=0, expert_share=0.25)
    sparse = ModelSizes(**{**{name: getattr(sparse, name) for name in ModelSizes.__slots__}, "layers": layers})
    alone = split(sparse, host(), [], ON).taken
    slower = split(dense, host(), [], ON).taken
    assert alone.decode_s < slower.decode_s
    assert alone.memory_bytes == slower.memory_bytes


def test_performance_counts_all_sequences() -> None:
    one = split(model(), host(), [], ON).taken
    all_ = split(model(), host(), [], parse("performance")).taken
    # The weights are read once for all four; per token that is less, and not four times less where it computes.
    assert one.decode_s / 4 <= all_.decode_s < one.decode_s
    assert all_.prefill_s == one.prefill_s


def test_efficiency_is_joules() -> None:
    hungry = gpu(watts=500.0)
    frugal = host(watts=10.0)
    assert split(model(), frugal, [hungry], ON).taken.parts == (("ggml:Vulkan0", 9),)
    assert split(model(), frugal, [hungry], parse("efficiency")).taken.parts == (("cpu", 9),)
    # Where one cannot be measured, all count alike.
    for unknown in (None, math.nan, -1.0, 0.0):
        found = split(model(), frugal, [gpu(watts=unknown)], parse("efficiency"))
        assert found.taken.parts == (("ggml:Vulkan0", 9),)


def every(costs: Costs, devices: list[SplitDevice]) -> float:
    """The best score of all divisions there are, one after the other."""
    best = math.inf
    for count in range(1, len(devices) + 2):
        for chain in permutations([costs.host, *devices], count):
            if costs.host in chain[1:]:
                continue
            for cuts in product(range(1, costs.places), repeat=count - 1):
                ends = (0, *cuts, costs.places)
                if any(a >= b for a, b in pairwise(ends)):
                    continue
                parts = [(each, ends[place], ends[place + 1]) for place, each in enumerate(chain)]
                pool = 0 if costs.host in chain else costs.bytes_of(costs.host, 0, 0)
                score, fits = 0.0, True
                before: SplitDevice | None = None
                for device, begin, end in parts:
                    needed = costs.bytes_of(device, begin, end)
                    fits &= device is costs.host or needed <= device.free_bytes
                    pool += needed if device is costs.host or device.shares_host else 0
                    score += costs.score(device, before, begin, end)
                    before = device
                if fits and pool <= costs.host.free_bytes:
                    best = min(best, score)
    return best


def test_the_search_finds_what_trying_everything_finds() -> None:
    sizes = [40, 160, 90, 90, 200, 10]
    layers = tuple(Layer(weights_bytes=each * MB, cache_bytes=each * MB // 10, flops=each * 2e6) for each in sizes)
    checked = 0
    for room, first, second, shared in product((150, 400, 900), (90, 250, 600), (90, 330), (False, True)):
        sizes_of = ModelSizes(
            layers=layers, output=Layer(weights_bytes=70 * MB, flops=1e8), width_bytes=8192, host_bytes=20 * MB,
            host_step_bytes=7 * MB, device_step_bytes=9 * MB, output_step_bytes=3 * MB,
        )  # fmt: skip
        processor = host(free_bytes=room * MB)
        devices = [
            gpu("ggml:A", free_bytes=first * MB),
            gpu("ggml:B", free_bytes=second * MB, bytes_s=5e10, shares_host=shared, launch_s=1e-5),
        ]
        found = split(sizes_of, processor, devices, ON)
        fitting = [each.score for each in found.looked_at if not each.refused]
        best = every(Costs(sizes_of, processor, devices, Objective.LATENCY), devices)
        assert min(fitting, default=math.inf) == pytest.approx(best, rel=1e-12)
        checked += best < math.inf
    assert checked > 15


def test_as_json() -> None:
    import json

    found = split(model(), host(), [gpu(free_bytes=520 * MB), gpu("ggml:soft", software=True)], ON)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["parts"] == [{"device": "cpu", "layers": 4}, {"device": "ggml:Vulkan0", "layers": 5}]
    assert values["decode_s"] > 0 < values["prefill_s"]
    assert values["left_out"] == {"ggml:soft": "it computes on the processor"}
    assert any(each["refused"] for each in values["alternatives"])
