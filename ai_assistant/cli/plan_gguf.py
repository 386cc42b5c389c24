"""`ai-assistant plan MODEL.gguf`: which layers of a language model would run on which device, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ai_assistant.cli.options import usage_error
from ai_assistant.cli.output import Output, size

if TYPE_CHECKING:
    from ai_assistant.engines.split import Candidate, Split
    from ai_assistant.engines.split_cost import SplitDevice
    from ai_assistant.hal.hetero.intent import Intent


def is_gguf(path: Path) -> bool:
    """By its first bytes; what cannot be read is none."""
    from ai_assistant.engines.gguf import MAGIC

    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def show(
    out: Output,
    path: Path,
    intent: Intent,
    limits: Mapping[str, int],
    *,
    measure: bool,
    context_length: int = 0,
    sequences: int = 0,
) -> None:
    """Print the plan.

    Args:
        limits: bytes that a device may hold, by its name.
        measure: measure rates that are not known.
        context_length, sequences: as the model would be loaded; 0: as by default.
    """
    from ai_assistant.engines import gguf_rules, memory
    from ai_assistant.engines.contract import LoadOptions
    from ai_assistant.engines.gguf import opened, read_gguf
    from ai_assistant.engines.gguf_layers import sizes_of
    from ai_assistant.engines.placing import look
    from ai_assistant.engines.split import split
    from ai_assistant.errors import NotSupported

    with opened(path) as fd:
        header = read_gguf(fd)
    info = gguf_rules.check(header)
    if header.architecture not in gguf_rules.DECODERS:
        raise NotSupported(f"models of architecture {info.architecture} run on the processor as a whole")
    asked = LoadOptions(context_length=context_length, sequences=sequences or LoadOptions().sequences)
    shape = gguf_rules.memory_shape(header)
    options = memory.settled(shape, asked)
    host, others, missing = look(intent, measure=measure)
    if unknown := [name for name in limits if name not in {host.name, *(each.name for each in others)}]:
        raise usage_error(f"--memory: there is no device {unknown[0]!r}")
    host, *others = (replace(each, free_bytes=limits.get(each.name, each.free_bytes)) for each in (host, *others))
    found = split(sizes_of(header, shape, options), host, others, intent)
    if out.json:
        out.document(
            {
                **found.to_dict(),
                "intent": str(intent),
                "context_length": options.context_length,
                "sequences": options.sequences,
                "devices": [_device(each) for each in (host, *others)],
                "missing": dict(missing),
                "measured": measure,
            }
        )
        return
    _print(out, found, (host, *others), missing)


def _device(each: SplitDevice) -> dict[str, Any]:
    """As JSON, which has no infinity."""
    values = {name: None if value in (float("inf"), float("-inf")) else value for name, value in asdict(each).items()}
    return {**values, "speed_known": each.usable}


def _print(out: Output, found: Split, devices: tuple[SplitDevice, ...], missing: Mapping[str, str]) -> None:
    from ai_assistant.hal.hetero.plans import milliseconds

    taken = found.taken
    out.fields(
        [
            ("plan", taken.name),
            ("why", found.why),
            ("one token", f"{milliseconds(taken.decode_s)} written, {milliseconds(taken.prefill_s)} read"),
            ("host memory", size(taken.host_bytes)),
        ]
    )
    out.line()
    rows, first = [], 1
    for name, count in taken.parts:
        last = first + count - 1
        rows.append((name, f"{first}–{last}" if count > 1 else str(first), size(taken.memory_bytes[name])))
        first = last + 1
    out.table(("device", "layers, the output last", "memory"), rows)
    out.line()
    out.table(
        ("looked at", "written", "read", "host memory", ""),
        [_row(each, each is taken) for each in found.looked_at],
    )
    for name, reason in {**found.left_out, **missing}.items():
        out.note(f"{name} is left out: {reason}")
    for each in devices:
        if not each.usable and each.name in taken.devices:
            out.note(f"the speed of {each.name} is assumed" + ("" if each.software else "; --measure finds out"))


def _row(each: Candidate, taken: bool) -> tuple[str, ...]:
    from ai_assistant.hal.hetero.plans import milliseconds

    told = each.refused or ("taken" if taken else "")
    if not each.memory_bytes:
        return each.name, "-", "-", "-", told
    return each.name, milliseconds(each.decode_s), milliseconds(each.prefill_s), size(each.host_bytes), told
