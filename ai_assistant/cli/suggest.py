"""`ai-assistant model suggest`: what fits this machine, and about how fast it would be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json
from ai_assistant.cli.output import Output, size

_UNKNOWN = 1 << 62
"""A disk that nobody has measured is no reason against a model."""


def suggest(
    context: typer.Context,
    context_length: Annotated[
        int, typer.Option("--context", "-c", metavar="TOKENS", min=256, max=1 << 20, help="Length of a conversation.")
    ] = 8192,
    every: Annotated[bool, typer.Option("--all", help="Show what does not fit, too.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the memory again: the last time the machine was busy.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what sizes of model fit this machine and how fast they would answer, roughly.

    The speed of an answer is bounded by how fast the memory is read; that is measured once, in a second. Real answers
    are between the two numbers.

    \b
    Examples:
      ai-assistant model suggest
      ai-assistant model suggest --context 32768 --all
    """
    from ai_assistant.cli.media import model_files, mounted
    from ai_assistant.client import Client
    from ai_assistant.engines import bandwidth
    from ai_assistant.engines import suggest as rules

    out: Output = context.obj
    with Client() as client:
        status, models = client.status(), client.models()
    machine = f"{status['cpu']}, {status['cores']} cores"
    rate = bandwidth.measured_once(machine, again=measure)
    total, free = _memory(status)
    disk = status["disk_free_bytes"]
    found = rules.suggest(
        memory_bytes=total,
        disk_bytes=_UNKNOWN if disk is None else int(disk),
        bandwidth=rate,
        context_length=context_length,
    )
    here = [
        {
            "name": each.name,
            "memory_bytes": each.memory_estimate_bytes,
            "fits_memory": each.memory_estimate_bytes <= total,
            **dict(zip(("slowest", "fastest"), rules.speed(rate, each.size_bytes), strict=True)),
        }
        for each in models
    ]
    stick = model_files(mounted())
    if out.json:
        out.document(
            {
                "machine": machine,
                "bandwidth_bytes_per_s": rate,
                "memory_bytes": total,
                "memory_available_bytes": free,
                "disk_bytes": disk,
                "suggestions": [{**asdict(each), "fits": each.fits} for each in found],
                "installed": here,
                "on_media": [{"name": each.name, "size_bytes": each.size_bytes} for each in stick],
            }
        )
        return
    out.note(f"{machine}; memory {rate / 1e9:.0f} GB/s, {size(total)} for models ({size(free)} free now)")
    shown = [each for each in found if every or each.fits]
    out.table(
        ("shape", "quantization", "file", "memory", "tokens/s", "fits"),
        [
            (f"a {each.shape} model", each.quantization, size(each.file_bytes), size(each.memory_bytes),
             _range(each.slowest, each.fastest), _fits(each.fits_memory, each.fits_disk))
            for each in shown
        ],
    )  # fmt: skip
    if not shown:
        out.note("no common size of model fits; --all shows what they would need")
    for row in here:
        speed = _range(row["slowest"], row["fastest"])  # type: ignore[arg-type]
        out.note(f"installed: {row['name']}, {speed} tokens/s{'' if row['fits_memory'] else ', does not fit'}")
    for each in stick:
        out.note(f"on a stick: {each.name} ({size(each.size_bytes)}): ai-assistant model pull usb:{each.name}")


def _memory(status: Mapping[str, Any]) -> tuple[int, int]:
    """(what models may take of the machine's memory, what is free now), in bytes. The workers' slice has 90 %."""
    total = int(status["memory_total_bytes"] or 0)
    return total * 9 // 10, int(status["memory_available_bytes"] or 0)


def _range(slowest: float, fastest: float) -> str:
    return f"{slowest:.2g}–{fastest:.2g}" if fastest < 100 else f"{slowest:.0f}–{fastest:.0f}"


def _fits(memory: bool, disk: bool) -> str:
    return "yes" if memory and disk else "too large for the memory" if not memory else "too large for the disk"


def register(app: typer.Typer) -> None:
    """Add the command to `ai-assistant model`."""
    app.command("suggest", cls=Command)(suggest)
