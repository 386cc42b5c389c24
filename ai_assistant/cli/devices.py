"""`ai-assistant devices`: the hardware that was found, and what keeps the rest from working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ai_assistant.cli.options import Debug, Json
from ai_assistant.cli.output import Output, follow, size

if TYPE_CHECKING:
    from ai_assistant.hal.device import Device


def devices(
    context: typer.Context,
    kind: list[str] = typer.Option(  # noqa: B008 - typer's way
        [], "--kind", "-k", metavar="KIND", help="Only cpu, gpu, npu, memory, tpm or sensor; may be repeated."
    ),
    tree: bool = typer.Option(False, "--tree", "-t", help="Everything that is known of each device."),
    local: bool = typer.Option(False, "--local", help="Look now, without the daemon, with your own rights."),
    measure: bool = typer.Option(False, "--measure", help="First measure processor and memory; it is kept."),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the hardware: processors, memory, TPM and sensors.

    Each with its driver and its state. A device that does not work says what helps: a package, a group or a setting.

    \b
    Examples:
      ai-assistant devices
      ai-assistant devices --kind npu --tree
      ai-assistant devices --measure
      ai-assistant devices --json | jq '.[] | select(.state != "working") | .hint'
    """
    from ai_assistant.errors import InvalidArgument
    from ai_assistant.hal.device import DeviceKind

    out: Output = context.obj
    wrong = [each for each in kind if each not in set(DeviceKind)]
    if wrong:
        kinds = ", ".join(DeviceKind)
        raise InvalidArgument(f"{wrong[0][:40]!r} is no kind of device", hint=f"one of {kinds}", param="kind")
    if local and measure:
        raise InvalidArgument("--local keeps nothing, and so measures nothing", hint="leave one of the two out")
    if local:
        from ai_assistant.hal.detect import detect

        found = list(detect())
    else:
        from ai_assistant.client import Client

        with Client() as client:
            if measure:
                follow(out, client.measure_devices(), "measuring")
            found = client.devices()
    found = [each for each in found if not kind or each.kind in kind]
    if out.json:
        out.document([each.to_dict() for each in found])
        return
    if not found:
        out.note("no device was found" + (" of that kind" if kind else ""))
    elif tree:
        for line in _tree(found):
            out.line(line)
    else:
        rows = [(str(each.kind), _name(each), each.driver or "–", str(each.state), _speed(each)) for each in found]
        out.table(("kind", "device", "driver", "state", "speed"), rows)
        for each in found:
            if each.hint:
                out.note(f"{_name(each)}: {each.hint}")


def _name(device: Device) -> str:
    if device.vendor and not device.name.startswith(device.vendor):
        return f"{device.vendor} {device.name}"
    return device.name


def _speed(device: Device) -> str:
    return "; ".join(str(each) for each in device.throughput)


def _tree(found: Sequence[Device]) -> Iterator[str]:
    for each in found:
        yield f"{_name(each)} ({each.kind})"
        facts = [
            ("id", each.id),
            ("place", " ".join(filter(None, (each.bus, each.address)))),
            ("ids", ":".join(filter(None, (each.vendor_id, each.product_id)))),
            ("driver", each.driver),
            ("state", str(each.state)),
            ("hint", each.hint),
            ("nodes", ", ".join(each.nodes)),
            *((f"{one.dtype} {one.unit}".strip(), _measured(one)) for one in each.throughput),
            *_flat(each.attributes),
        ]
        known = [(name, value) for name, value in facts if value]
        widest = max(len(name) for name, _ in known)
        for number, (name, value) in enumerate(known):
            yield f"{'└─' if number == len(known) - 1 else '├─'} {name.ljust(widest)}  {value}"


def _measured(one: Any) -> str:
    return f"{one.value:g}, {one.source}" + (f" ({one.reference})" if one.reference else "")


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list | tuple):
            yield (
                f"{before}{name}",
                " ".join(
                    ", ".join(f"{k}={v}" for k, v in each.items()) + ";" if isinstance(each, Mapping) else str(each)
                    for each in value
                ),
            )
        elif name.endswith("bytes") and isinstance(value, int):
            yield f"{before}{name}", f"{value} ({size(value)})"
        elif value not in (None, ""):
            yield f"{before}{name}", str(value)
