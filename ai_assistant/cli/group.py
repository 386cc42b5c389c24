"""The root of the command tree: whatever goes wrong below it ends in an error, a hint and an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ai_assistant.cli import output
from ai_assistant.cli.output import Output
from ai_assistant.errors import AIAssistantError

# typer carries its own copy of click in some versions and uses the installed one in others; these are
# the classes of whichever it is.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        # Older versions of typer escape brackets for rich even where rich does not print.
        formatter.buffer = [text.replace("\\[", "[") for text in formatter.buffer]


class RootGroup(TyperGroup):
    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        out = Output(json="--json" in options, debug="--debug" in options)

        def command() -> Any:
            return TyperGroup.main(self, given, prog_name, complete_var, False, obj=out, **extra)

        status = guard(out, command)
        if standalone_mode:
            sys.exit(status)
        return status

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # typer would call it a plain failure
            raise typer.Exit(output.EXIT_PIPE_CLOSED) from error


def guard(out: Output, command: Callable[[], Any]) -> int:
    """Run a command; report what it raises, and return the exit status."""
    try:
        result = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        status = result if isinstance(result, int) else 0
    except AIAssistantError as error:
        _trace(out)
        out.error(error.name, error.message, error.hint)
        status = output.exit_status(error)
    except (typer.Exit, SystemExit) as error:
        code = getattr(error, "exit_code", getattr(error, "code", 0))
        status = code if isinstance(code, int) else output.EXIT_ERROR
    except typer.Abort:
        out.note("\naborted")
        status = output.EXIT_ERROR
    except KeyboardInterrupt:
        status = output.EXIT_INTERRUPTED
    except BrokenPipeError:
        status = output.EXIT_PIPE_CLOSED
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # older versions print the help themselves
            print(_said(error))
            return 0
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context is not None else "see ai-assistant --help"
        out.error("Usage", _said(error), hint)
        status = output.EXIT_USAGE
    except ClickException as error:
        out.error("Error", _said(error))
        status = output.EXIT_ERROR
    except OSError as error:
        _trace(out)
        full = error.errno == errno.ENOSPC
        name, where = ("NoSpace" if full else "InternalError"), f"{error.filename}: " if error.filename else ""
        hint = "is the disk that the output goes to full?" if full else _DEFECT
        out.error(name, f"{where}{error.strerror or error}", hint)
        status = output.EXIT_ERROR
    except Exception as error:
        _trace(out)
        out.error("InternalError", f"{type(error).__name__}: {error}", _DEFECT)
        status = output.EXIT_ERROR
    _hush(status)
    return status


_DEFECT = "this is a defect of ours: run the command again with --debug and report what it shows"


def _said(error: Exception) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    return message


def _trace(out: Output) -> None:
    if out.debug:
        traceback.print_exc()


def _hush(status: int) -> None:
    """Nothing more can be written to a closed pipe or a full disk, so the flush at exit must not try."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
