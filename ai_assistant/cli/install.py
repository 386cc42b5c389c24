"""`ai-assistant install`: the running system, from a stick or any disk, onto another disk of this computer."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from ai_assistant.cli.options import Debug, Json, Yes, optional, usage_error
from ai_assistant.cli.output import EXIT_ERROR, Output, duration


def complete_disk(incomplete: str) -> list[str]:
    """The disks that nothing uses, for the shell."""
    from ai_assistant.provisioning.disks import Machine

    try:
        paths = [str(disk.path) for disk in Machine().disks() if not disk.reasons()]
    except OSError:
        return []
    return [path for path in paths if path.startswith(incomplete)]


def install(
    context: typer.Context,
    device: Annotated[
        str,
        typer.Argument(
            metavar=optional("DEVICE"),
            help="The whole disk to install on, like /dev/nvme0n1.",
            show_default=False,
            autocompletion=complete_disk,
        ),
    ] = "",
    show: Annotated[bool, typer.Option("--list", help="List the disks, and why one cannot be used.")] = False,
    yes: Yes = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Install the running system on another disk. Erases that disk.

    Started from a USB stick, or from any other disk, it copies what this system runs from – boot
    files, root and its verity tree – and checks every block of it. Settings, models and everything
    else in /var are not copied: the new disk makes its own at its first start.

    The disk must not be in use, and must hold the boot partition, two slots and some room for /var;
    --list says how much that is. It asks for the disk's name before it erases anything. Needs root,
    and no daemon. Until the last step the disk starts nothing, so an interruption leaves no half of
    a system behind: run it again.

    Afterwards remove the stick and restart.

    \b
    Examples:
      ai-assistant install --list
      ai-assistant install /dev/nvme0n1
      ai-assistant install /dev/disk/by-id/nvme-Samsung_990_S6Z2 --yes --json
    """
    from ai_assistant.cli.disk import Meter, agreed, as_json, can_ask, listed
    from ai_assistant.errors import NotAuthorized
    from ai_assistant.provisioning import install as installing
    from ai_assistant.provisioning.disks import Machine

    out: Output = context.obj
    if bool(device) is show:
        raise usage_error("give a disk, or --list")
    if os.geteuid() != 0:
        raise NotAuthorized("only root may look at and write to disks", hint="sudo ai-assistant install …")
    machine = Machine()
    source = installing.running(machine)
    if show:
        out.note(f"{source.label} runs from {source.disk.path}; a disk needs {source.least_bytes:,} bytes")
        listed(out, machine.disks(), source.least_bytes)
        return
    disk = machine.disk(device)
    installing.refuse(source, disk)
    if not yes and not can_ask(out):
        raise usage_error(f"{disk.path} would be erased, and there is no terminal to ask on: say --yes")
    if not yes and not agreed(out, disk, f"Installing {source.label} on"):
        raise typer.Exit(EXIT_ERROR)
    started = time.monotonic()
    try:
        with Meter(out) as progress:
            parts = installing.install(source, disk, progress=progress)
    except KeyboardInterrupt as interrupt:
        out.error("Cancelled", str(interrupt) or "interrupted; nothing was changed")
        raise
    seconds = time.monotonic() - started
    if out.json:
        rows = [{"label": each.label, "uuid": str(each.uuid), "start": each.start, "size": each.size} for each in parts]
        found = {"installed": source.label, "root_hash": source.root_hash, "partitions": rows}
        out.document({**as_json(disk), **found, "verified": True, "seconds": round(seconds, 1)})
        return
    out.line(f"installed {source.label} on {disk.path} and verified it in {duration(seconds)}")
    out.note("remove the stick and restart: systemctl reboot")
