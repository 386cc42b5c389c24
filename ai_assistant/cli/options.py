"""Options and arguments that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from ai_assistant.cli.output import Output


def _set_json(context: typer.Context, value: bool) -> bool:
    if value and isinstance(context.obj, Output):
        context.obj.json = True
    return value


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value and isinstance(context.obj, Output):
        context.obj.debug = True
    return value


def complete_model(incomplete: str) -> list[str]:
    """Names of the daemon's models for the shell; nothing at all when it cannot be asked at once."""
    from ai_assistant.client import Client
    from ai_assistant.errors import AIAssistantError

    try:
        with Client(timeout=1.0) as client:
            names = [str(row.get("id", "")) for row in client.served_models()]
    except (AIAssistantError, KeyError, TypeError):
        return []
    return [name for name in names if name.startswith(incomplete)]


_PATH = re.compile(r"/|\.(gguf|onnx)$")


def is_path(model: str) -> bool:
    """Whether MODEL means a file: it has a slash, or ends like a model file. A name has no slash."""
    return bool(_PATH.search(model))


def optional(name: str) -> str:
    """The metavar of an optional argument: newer versions of typer put the brackets themselves."""
    return f"[{name}]" if typer.BadParameter.__module__.startswith("click.") else name


Json = Annotated[bool, typer.Option("--json", callback=_set_json, help="Print JSON instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, help="Show tracebacks of errors.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before changing something.")]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name, as in name:version.", autocompletion=complete_model)
]


def usage_error(message: str) -> Exception:
    """For a mistake that only the command itself can see."""
    from ai_assistant.cli.group import UsageError

    made: Any = UsageError(message)
    return made  # type: ignore[no-any-return]


def require_terminal(out: Output) -> None:
    """For a command that must ask before it changes something."""
    import sys

    if out.json or sys.stdin is None or not sys.stdin.isatty() or not out.terminal(sys.stderr):
        raise usage_error("this changes the system, and there is no terminal to ask on: say --yes")


def confirm(out: Output, question: str, yes: bool) -> None:
    """Ask before a change; without a terminal to ask on, only --yes will do.

    Raises:
        typer.Abort: the answer was no.
    """
    if yes:
        return
    require_terminal(out)
    if not typer.confirm(question, err=True):
        raise typer.Abort
