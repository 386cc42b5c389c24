"""`ai-assistant plan`: which device would run which part of a model, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ai_assistant.cli.options import Debug, Json, usage_error
from ai_assistant.cli.output import Output, size
from ai_assistant.cli.plan_gguf import is_gguf
from ai_assistant.cli.plan_gguf import show as show_gguf

if TYPE_CHECKING:
    from ai_assistant.hal.hetero.devices import OpenDevices
    from ai_assistant.hal.hetero.intent import Intent
    from ai_assistant.hal.hetero.plans import Alternative, Plan

MAX_BYTES = (2 << 30) - 1
"""What a protocol buffer can be."""


def plan(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX or GGUF file.", show_default=False)],
    devices: Annotated[
        str, typer.Option("--devices", "-d", metavar="NAME,…", help="BACKEND or BACKEND:DEVICE; default: all.")
    ] = "",
    intent: Annotated[
        str,
        typer.Option(
            "--intent", "-i", help="ON, OFF, performance, efficiency or latency; default: $HETERO_COMPUTE, or ON."
        ),
    ] = "",
    shape: Annotated[
        list[str] | None, typer.Option("--shape", "-s", metavar="INPUT=1,128", help="Fix the shape of an input.")
    ] = None,
    memory: Annotated[
        list[str] | None, typer.Option("--memory", metavar="DEVICE=BYTES", help="What a device may hold.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", "-m", help="Measure operators, and try the best plans. Takes seconds.")
    ] = False,
    dot: Annotated[bool, typer.Option("--dot", help="Print a drawing for Graphviz.")] = False,
    context_length: Annotated[
        int, typer.Option("--context", "-c", min=0, max=1 << 24, help="Of a GGUF model: tokens per sequence.")
    ] = 0,
    sequences: Annotated[
        int, typer.Option("--sequences", min=0, max=64, help="Of a GGUF model: generations at once.")
    ] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how a model would be divided among the devices of this machine. Nothing else is changed.

    Of an ONNX graph, operators; of a language model in GGUF, layers. Times are measured where they were measured before
    (--measure), and estimated otherwise.

    \b
    Examples:
      ai-assistant plan model.onnx
      ai-assistant plan model.onnx --shape input_ids=1,128 --measure
      ai-assistant plan model.onnx --devices cpu,onnxruntime --intent performance --json
      ai-assistant plan model.onnx --dot | dot -Tsvg > plan.svg
      ai-assistant plan model.gguf --measure
    """
    out: Output = context.obj
    if dot and out.json:
        raise usage_error("--dot and --json exclude each other")
    wish = _intent(intent, devices)
    shapes = {name: _sizes(value) for name, value in map(_pair, shape or ())}
    limits = {name: _count(value) for name, value in map(_pair, memory or ())}
    if is_gguf(model):
        if dot or shapes:
            raise usage_error("--dot and --shape are for ONNX models")
        show_gguf(out, model, wish, limits, measure=measure, context_length=context_length, sequences=sequences)
        return
    if context_length or sequences:
        raise usage_error("--context and --sequences are for GGUF models")
    content = _content(model)

    from ai_assistant.hal import onnx_graph
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.hetero.planner import plan as find

    graph = onnx_graph.read(content, shapes or None)
    with open_devices(wish.devices) as opened:
        if unknown := [name for name in limits if name not in opened]:
            raise usage_error(f"--memory: there is no device {unknown[0]!r}, there are {', '.join(opened)}")
        found = find(graph, opened, wish, costs=CostModel(opened), memory_limits=limits, measure=measure)
        if dot:
            out.write(found.dot())
        elif out.json:
            out.document({**found.to_dict(), "measured": measure, "missing": opened.missing})
        else:
            _show(out, found, opened)


def _intent(intent: str, devices: str) -> Intent:
    from dataclasses import replace

    from ai_assistant.hal.hetero.intent import Intent, from_environment, parse

    found = parse(intent) if intent else from_environment(default=Intent(mixed=True))
    if not devices:
        return found
    named = parse(devices)
    if found.devices and intent:
        raise usage_error("--devices and a list of devices as --intent exclude each other")
    if not named.devices:
        raise usage_error(f"--devices: {devices[:40]!r} is an intent, no device")
    return replace(found, devices=named.devices)


def _content(path: Path) -> bytes:
    from ai_assistant.errors import InvalidModel, NoSuchModel, NotAuthorized

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchModel(f"there is no file {str(path)!r}") from error
    except PermissionError as error:
        raise NotAuthorized(f"{str(path)!r} cannot be read") from error
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{str(path)!r} is no file that can be read") from error
    if len(content) > MAX_BYTES:
        raise InvalidModel(f"{str(path)!r} is larger than 2 GiB")
    return content


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise usage_error(f"{text[:60]!r} is not NAME=VALUE")
    return name, value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_count(each) for each in text.split(",")) if text else ()


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise usage_error(f"{text[:60]!r} is no whole number")
    return int(text)


def _show(out: Output, found: Plan, opened: OpenDevices) -> None:
    from ai_assistant.hal.hetero.plans import milliseconds

    predicted = found.predicted
    out.fields(
        [
            ("plan", found.name),
            ("devices", ", ".join(found.devices) or "none: there is nothing to run"),
            ("one request", milliseconds(predicted.latency_s)),
            ("many", f"{1 / predicted.period_s:.3g} per second" if predicted.period_s else "any number"),
        ]
    )
    out.line()
    out.table(
        ("part", "device", "predicted", "nodes", "after", "operators", "why"),
        [
            (
                str(row["part"]),
                row["device"],
                milliseconds(row["predicted_s"]),
                str(row["nodes"]),
                " ".join(map(str, row["after"])) or "-",
                row["operators"],
                row["why"] + "".join(f"; not {name}: {reason}" for name, reason in row["unsupported"].items()),
            )
            for row in found.explain()
        ],
    )
    out.line()
    out.table(
        ("looked at", "request", "measured", "parts", "memory", ""),
        [_alternative(each, each.name == found.name) for each in found.alternatives],
    )
    for name, reason in opened.missing.items():
        out.note(f"{name} is left out: {reason}")


def _alternative(each: Alternative, chosen: bool) -> tuple[str, ...]:
    from ai_assistant.hal.hetero.plans import milliseconds

    measured: Any = each.measured_s
    return (
        each.name,
        milliseconds(each.predicted.latency_s),
        "-" if measured is None else milliseconds(measured),
        str(each.parts),
        size(sum(each.memory_bytes.values())),
        each.refused or ("taken" if chosen else ""),
    )
