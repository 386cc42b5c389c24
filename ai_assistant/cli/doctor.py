"""`ai-assistant doctor`: is everything there that the appliance needs, and if not, what to do."""

from __future__ import annotations

import typer

from ai_assistant.cli import checks
from ai_assistant.cli.options import Debug, Json
from ai_assistant.cli.output import EXIT_ERROR, Output

_MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}


def doctor(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Check that everything works, and say what to do.

    The daemon on bus and socket, polkit, your groups, disk, memory, units, configuration and engine.
    Exit status 1 if something fails; warnings alone are no failure.

    \b
    Examples:
      ai-assistant doctor
      ai-assistant doctor --json | jq '.[] | select(.state != "ok")'
    """
    out: Output = context.obj
    found = []
    for check in checks.CHECKS:
        result = checks.run(check)
        found.append(result)
        if not out.json:
            out.line(f"{_MARKS[result.state]} {result.name}: {result.detail}")
            if result.hint and result.state != "ok":
                out.line(f"    hint: {result.hint}")
    if out.json:
        out.document(found)
    if any(each.state == "failed" for each in found):
        raise typer.Exit(EXIT_ERROR)
