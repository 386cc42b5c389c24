"""`ai-assistant version`: what runs here, and what answers there."""

from __future__ import annotations

import platform

import typer

from ai_assistant import __version__
from ai_assistant.cli.options import Debug, Json
from ai_assistant.cli.output import Output
from ai_assistant.errors import AIAssistantError


def version(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Show the versions of command and daemon.

    A daemon that is not there is no error.

    \b
    Examples:
      ai-assistant version
      ai-assistant --version     only this command's, and at once
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    daemon: str | None = None
    with Client() as client:
        try:
            daemon = client.status()["version"]
        except AIAssistantError:
            daemon = None
    if out.json:
        out.document({"version": __version__, "daemon": daemon, "python": platform.python_version()})
        return
    out.fields(
        [
            ("ai-assistant", __version__),
            ("daemon", daemon or "not reachable"),
            ("python", platform.python_version()),
        ]
    )
