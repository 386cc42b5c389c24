"""`ai-assistant config …`: the daemon's configuration, as it is in force."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, optional, usage_error
from ai_assistant.cli.output import Output

app = typer.Typer(help="Show and check the configuration.", no_args_is_help=True, rich_markup_mode=None)

Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="Read the files below DIR.", show_default=False)]


def explained(root: Path) -> list[tuple[str, Any, str]]:
    # The only use of the daemon's package by a client: its files are read here, nothing of it runs.
    from ai_assistant.daemon.config import explain

    return explain(root)


@app.command("show", cls=Command)
def show(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar=optional("KEY"), help="Only this one.", show_default=False)] = "",
    root: Root = Path("/"),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the values in force, or one of them.

    \b
    Examples:
      ai-assistant config show
      ai-assistant config show models.default
    """
    out: Output = context.obj
    values = {name: value for name, value, _ in explained(root)}
    if key and key not in values:
        raise usage_error(f"there is no setting {key!r}; ai-assistant config show lists all")
    if out.json:
        out.document(values[key] if key else values)
    elif key:
        out.line(str(values[key]))
    else:
        out.fields([(name, str(value)) for name, value in values.items()])


@app.command("check", cls=Command)
def check(context: typer.Context, root: Root = Path("/"), json: Json = False, debug: Debug = False) -> None:
    """Check the configuration files, and show where each value comes from.

    The daemon reads /usr/lib/ai-assistant/config.d, /etc/ai-assistant/config.d and
    /run/ai-assistant/config.d, in this order; later files win, and unknown keys are errors.

    \b
    Examples:
      ai-assistant config check
      ai-assistant config check --json | jq '.[] | select(.source != "default")'
    """
    out: Output = context.obj
    rows = explained(root)
    if out.json:
        out.document([{"key": key, "value": value, "source": source} for key, value, source in rows])
    else:
        out.table(("key", "value", "source"), [(key, str(value), source) for key, value, source in rows])
