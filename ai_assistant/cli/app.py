"""The command tree: every command is registered here, in the order in which help shows them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from ai_assistant.cli import (
    api,
    ask,
    banner,
    chat,
    config,
    devices,
    doctor,
    hal,
    install,
    model,
    plan,
    status,
    storage,
    top,
    verify_boot,
    version,
)
from ai_assistant.cli import run as run_command
from ai_assistant.cli.group import Command, RootGroup
from ai_assistant.cli.options import Debug, Json

HELP = """Talk to AI Assistant OS: ask the appliance, run models, and look after them.

Exit status: 0 done, 1 error, 2 wrong usage, 3 not authorised, 4 the daemon cannot be reached, 130 interrupted.
"""

app = typer.Typer(
    cls=RootGroup,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        from ai_assistant import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    show_version: bool = typer.Option(
        False, "--version", "-V", callback=_show_version, is_eager=True, help="Print the version."
    ),
    json: Json = False,
    debug: Debug = False,
) -> None:
    pass


app.command("status", cls=Command)(status.status)
app.command("top", cls=Command)(top.top)
app.command("ask", cls=Command)(ask.ask)
app.command("chat", cls=Command)(chat.chat)
app.command("run", cls=Command)(run_command.run)
app.add_typer(model.app, name="model")
app.command("devices", cls=Command)(devices.devices)
app.command("plan", cls=Command)(plan.plan)
app.add_typer(hal.app, name="hal")
app.add_typer(config.app, name="config")
app.add_typer(api.app, name="api")
app.add_typer(storage.app, name="storage")
app.command("doctor", cls=Command)(doctor.doctor)
app.command("install", cls=Command)(install.install)
app.command("verify-boot", cls=Command)(verify_boot.verify_boot)
app.command("version", cls=Command)(version.version)
app.command("banner", cls=Command, hidden=True)(banner.banner)


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    command = typer.main.get_command(app)
    status: int = command.main(list(args), prog_name="ai-assistant", standalone_mode=False)
    return status
