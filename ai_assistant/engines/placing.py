"""Where a language model's layers go on this machine: its devices as `split.py` wants them, and the decision.

Looked at are the devices that the native library has loaded plug-ins for. Where it has none beside the processor, which
costs nothing to see, nothing else happens. Rates are those of `hal.hetero`: measured once for a device and its driver,
and kept in the user's cache where there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ai_assistant.engines import gguf_rules
from ai_assistant.engines.contract import LoadOptions, Placement
from ai_assistant.engines.gguf import Gguf
from ai_assistant.errors import AIAssistantError, InvalidArgument
from ai_assistant.hal.hetero.intent import Intent, from_environment, parse
from ai_assistant.hal.meminfo import memory

RESERVE_BYTES = 128 << 20
"""Of another device's memory, what a model leaves: programs and scratch that the library counts nowhere."""
MAX_AVOIDED = 16
_SOFTWARE = ("llvmpipe", "lavapipe", "swiftshader", "softpipe")
"""In the descriptions of devices that are programs on the processor."""


def intent_of(options: LoadOptions) -> Intent:
    """What is wanted of several devices.

    Raises:
        InvalidArgument: `hetero_compute`, or the variable of the environment, is not understood.
    """
    return parse(options.hetero_compute) if options.hetero_compute else from_environment()


def avoided(options: LoadOptions) -> tuple[str, ...]:
    """Devices that are not to be used, whatever else is wanted.

    Raises:
        InvalidArgument
    """
    names = options.extra.get("avoid_devices", ())
    if (
        not isinstance(names, list | tuple)
        or len(names) > MAX_AVOIDED
        or not all(isinstance(each, str) and len(each) <= 200 for each in names)
    ):
        raise InvalidArgument("avoid_devices must be a short list of names", param="avoid_devices")
    return tuple(names)


def decide(header: Gguf, options: LoadOptions) -> Placement:
    """Where a model goes; without parts: to the processor, as always.

    Args:
        options: settled, see `memory.settled`.

    Raises:
        InvalidArgument: `hetero_compute` is not understood, or names a device that is not here.
    """
    intent = intent_of(options)
    without = avoided(options)
    if header.architecture not in gguf_rules.DECODERS:
        return Placement()
    from ai_assistant.engines import native

    if not (known := native.devices()) and not intent.devices:
        return Placement()
    if intent.devices and all(each in ("cpu", "ggml:CPU") for each in intent.devices):
        return Placement()
    from ai_assistant.engines.gguf_layers import sizes_of
    from ai_assistant.engines.split import UNKNOWN_SPEED, split

    shape = gguf_rules.memory_shape(header)
    bad = sorted(set(without) & {f"ggml:{each}" for each in known})
    warning = f"{', '.join(bad)} not used: its driver ended a process with this model before" if bad else ""
    remaining = tuple(each for each in intent.devices if each not in bad)
    if intent.devices and not remaining:
        return Placement(warning=warning)
    wanted = Intent(intent.mixed, intent.objective, remaining)
    host, others, missing = look(wanted, options.threads, without=bad)
    decided = split(sizes_of(header, shape, options), host, others, wanted)
    found = decided.taken
    unknown = {name: why for name, why in decided.left_out.items() if why == UNKNOWN_SPEED}
    told = [f"{name} not used: {why}" for name, why in {**missing, **unknown}.items()]
    warning = "; ".join(filter(None, (warning, *told)))
    placed = Placement(found.parts, found.memory_bytes, found.host_bytes, warning)
    return placed if placed.devices else Placement(warning=warning)


def look(
    intent: Intent,
    threads: int = 0,
    *,
    without: Collection[str] = (),
    measure: bool = True,
    costs_folder: Path | None = None,
) -> tuple[Any, list[Any], Mapping[str, str]]:
    """The processor, the other devices, and which could not be opened, with the reason.

    Args:
        threads: of the processor; 0: as the engine has it.
        without: names that are left alone.
        measure: measure rates that are not known; otherwise devices without any have none.
        costs_folder: where rates are kept; default: the user's cache.
    """
    from ai_assistant.engines import native
    from ai_assistant.engines.split_cost import SplitDevice

    natives = {f"ggml:{name}": each for name, each in native.devices().items()}
    # What is a program on the processor is never predicted to be faster, and would take a minute to show it.
    measured = [
        name
        for name, each in natives.items()
        if name not in without
        and not _software(each.description)
        and (not intent.devices or name in intent.devices or "ggml" in intent.devices)
    ]
    for name in measured:
        native.claim(natives[name])
    rates, missing = _rates(("ggml:CPU", *measured), threads or native.default_threads(), measure, costs_folder)
    _, available = memory()
    host = SplitDevice(name="cpu", kind="cpu", free_bytes=available or 0, shares_host=True, **rates.get("ggml:CPU", {}))
    others = []
    for name in natives:
        if name in without or name in missing:
            continue
        each = natives[name]
        soft = _software(each.description)
        # A share is kept free; what has less than that has nothing to give.
        free = max(0, each.free_bytes - RESERVE_BYTES)
        others.append(
            SplitDevice(
                name=name, free_bytes=free, shares_host=each.integrated or soft, software=soft, **rates.get(name, {})
            )
        )
    return host, others, {name: why for name, why in missing.items() if name in natives}


def _software(description: str) -> bool:
    return any(each in description.lower() for each in _SOFTWARE)


def _rates(
    names: Sequence[str], threads: int, measure: bool, folder: Path | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    from ai_assistant.hal.backends.ggml import GgmlBackend
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import open_devices

    backends = {"ggml": GgmlBackend(threads=threads)}
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            with open_devices((name,), fallback=name, backends=backends) as opened:
                costs = CostModel(opened, folder=folder)
                if measure:
                    costs.measure_resident((name,))
                flops_s, bytes_s = costs.resident(name)
                found[name] = {
                    "flops_s": flops_s,
                    "bytes_s": bytes_s,
                    "launch_s": costs.launch_s(name),
                    "copy_bytes_s": costs.moved_s(name),
                    "watts": costs.watts(name),
                }
        except AIAssistantError as error:
            missing[name] = error.message[:200]
    return found, missing
