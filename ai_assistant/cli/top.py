"""`ai-assistant top`: what the models do, live."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ai_assistant.cli.options import Debug, Json
from ai_assistant.cli.output import Output
from ai_assistant.cli.top_view import view
from ai_assistant.errors import AIAssistantError, ServiceUnavailable, Timeout

if TYPE_CHECKING:
    from ai_assistant.client import Client

_WIDE = 160
"""Columns where there is no terminal."""


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.2, max=3600, help="Seconds between looks.")] = 2,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Watch what the models do.

    Load, memory, temperature and watts; for each model its state and memory, what runs and waits, tokens
    read and written per second, how full its cache is, and the time to the first token over the last
    minute. q ends it. Without a terminal it prints one look.

    \b
    Examples:
      ai-assistant top
      ai-assistant top --interval 5
      ai-assistant top --json | jq '.statistics.models[].decode_tokens_per_s'
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        if out.json:
            status, statistics = _look(client)
            out.document({"status": status, "statistics": statistics})
        elif once or not out.terminal():
            _print(*_look(client))
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _watch(client, interval)


def _look(client: Client) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return client.status(), client.statistics()


def _print(status: Mapping[str, Any], statistics: Mapping[str, Any]) -> None:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if terminal else _WIDE)
    console.print(view(status, statistics, console.width))


def _watch(client: Client, interval_s: float) -> None:
    """Until q, Ctrl-C or the end of the keyboard. A daemon that goes away is waited for."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    status: Mapping[str, Any] = {}
    statistics: Mapping[str, Any] = {}
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            problem = ""
            try:
                status, statistics = _look(client)
            except (ServiceUnavailable, Timeout) as error:
                # What is shown was true once.
                problem, statistics = f"{error.message}; waiting for it", {}
            except AIAssistantError as error:
                problem = error.message
            live.update(view(status, statistics, console.width, problem), refresh=True)
            if pressed(interval_s):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds and says whether q was pressed; the terminal is as before afterwards."""
    if sys.stdin is None or not sys.stdin.isatty():

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield wait
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0]:
                keys = os.read(fd, 64)
                # Nothing to read is a terminal that has gone.
                if not keys or b"q" in keys.lower():
                    return True
        return False

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
