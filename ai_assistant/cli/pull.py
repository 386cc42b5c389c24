"""`ai-assistant model pull`: get a model from a hub, an address, a file, or a stick."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, is_path, usage_error
from ai_assistant.cli.output import Output, follow, printable, size

if TYPE_CHECKING:
    from ai_assistant._results import JobStatus
    from ai_assistant.client import Client, Job

TOKEN_ENV = "HF_TOKEN"  # noqa: S105 - where a token is, not one
USB = "usb:"
_MAX_TOKEN = 4096


def pull(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="hf:owner/name[:file or quantisation][@revision], https://…, a file, usb: or usb:FILE.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", "-n", metavar="NAME", help="name or name:version; default: from the file's name.")
    ] = "",
    endpoint: Annotated[
        str, typer.Option("--endpoint", metavar="URL", help="Another hub than the configured one.")
    ] = "",
    sha256: Annotated[str, typer.Option("--sha256", metavar="HEX", help="What the file must be.")] = "",
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help=f"Token of the hub, - for stdin; or in ${TOKEN_ENV}."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Get a model and import it, for everybody. Ctrl-C stops; the next pull of the same source goes on.

    With --json, each line is what happens, and the last one has the model's name.

    \b
    Examples:
      ai-assistant model pull hf:owner/name:Q4_K_M
      ai-assistant model pull https://example.com/model.gguf --name mine:2
      ai-assistant model pull usb:
      ai-assistant model pull usb:model.gguf
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    if source == USB:
        _list_media(out)
        return
    if source.startswith(USB) or (is_path(source) and not source.startswith(("hf:", "https://", "http://"))):
        if endpoint or sha256 or token_file is not None:
            raise usage_error("--endpoint, --sha256 and --token-file are for what comes from the network")
        _import(out, _on_media(source.removeprefix(USB)) if source.startswith(USB) else Path(source), name)
        return
    token = read_token(token_file)
    with Client() as client:
        job = client.pull_model(source, name, token=token, endpoint=endpoint, sha256=sha256)
        _say(out, _follow(out, client, job, source))


def read_token(file: Path | None) -> str:
    """From the file, or stdin for "-", else from the environment; never from an argument, which everybody could read.

    Raises:
        UsageError: the file cannot be read.
    """
    if file is None:
        return os.environ.get(TOKEN_ENV, "").strip()
    try:
        if str(file) == "-":
            text = sys.stdin.read(_MAX_TOKEN + 1) if sys.stdin is not None else ""
        else:
            with file.open(encoding="ascii") as stream:
                text = stream.read(_MAX_TOKEN + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise usage_error(f"the token cannot be read from {file}: {why}") from None
    token = text.strip()
    if not token or len(text) > _MAX_TOKEN or any(each.isspace() for each in token):
        raise usage_error(f"{file} holds no token")
    return token


def _import(out: Output, file: Path, name: str) -> None:
    from ai_assistant._results import slug
    from ai_assistant.client import Client

    with Client() as client:
        job = client.import_model(file, name or slug(file.stem))
        if out.json:
            _say(out, _follow(out, client, job, str(file)))
        else:
            _say(out, follow(out, job, f"importing {file.name}"))


def _say(out: Output, result: Mapping[str, Any]) -> None:
    name = str(result.get("name", ""))
    if out.json:
        out.document({"phase": "done", "name": name})
    else:
        out.line(f"{name} is here; try it with: ai-assistant run {name}")


def _follow(out: Output, client: Client, job: Job, source: str) -> Mapping[str, Any]:
    """Show a download until it ends; Ctrl-C stops it.

    Raises:
        AIAssistantError: why it failed.
    """
    from ai_assistant.errors import ServiceUnavailable

    result: Mapping[str, Any] = {}
    resumed = False
    try:
        with _shown(out, source) as show:
            for status in job.watch():
                if status.details.get("resumed_bytes") and not resumed:
                    resumed = True
                    out.note(f"going on after {size(status.details['resumed_bytes'])} that are here already")
                show(status)
                result = status.result
                if status.error is not None:
                    raise status.error
    except KeyboardInterrupt:
        job.cancel()
        out.note("stopped; what has come is kept, and the same command goes on with it")
        raise
    except ServiceUnavailable as error:
        if not error.hint:
            error.hint = "run the command again: it goes on where it stopped"
        raise
    return result


@contextmanager
def _shown(out: Output, source: str) -> Iterator[Any]:
    """A function that shows a state: JSON lines, a bar on a terminal, or only retries elsewhere."""
    last: list[Any] = [None]

    def lines(status: JobStatus) -> None:
        found = {"state": status.state, "progress": round(status.progress, 4), **status.details}
        if found != last[0] and status.error is None:
            last[0] = found
            out.document({"phase": "start", **found})

    def retries(status: JobStatus) -> None:
        if status.details.get("retry") and status.message != last[0]:
            last[0] = status.message
            out.note(status.message)

    if out.json:
        yield lines
        return
    if sys.stderr is None or not sys.stderr.isatty():
        yield retries
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, console=Console(file=sys.stderr, highlight=False), transient=True) as progress:
        task = progress.add_task(printable(source), total=1.0)

        def bar(status: JobStatus) -> None:
            progress.update(task, completed=status.progress, description=printable(status.message) or source)

        yield bar


def _on_media(wanted: str) -> Path:
    """The file of that name on an attached medium.

    Raises:
        NoSuchModel: there is none, or more than one.
    """
    from ai_assistant.cli.media import model_files, mounted
    from ai_assistant.errors import NoSuchModel

    files = model_files(mounted())
    fitting = [each for each in files if wanted in (each.name, each.path.name)]
    if len(fitting) != 1:
        listed = ", ".join(each.name for each in (fitting or files)[:20])
        what = "more than one file" if fitting else "no file"
        raise NoSuchModel(f"there is {what} {wanted!r} on a stick", hint=f"there is: {listed}" if listed else _NO_STICK)
    return fitting[0].path


_NO_STICK = "no removable medium with a model is mounted; mount one below /media"


def _list_media(out: Output) -> None:
    from ai_assistant.cli.media import model_files, mounted

    files = model_files(mounted())
    if out.json:
        out.document([{**asdict(each), "path": str(each.path)} for each in files])
        return
    if not files:
        out.note(_NO_STICK)
    out.table(("file", "size", "pull it with"), [(e.name, size(e.size_bytes), f"usb:{e.name}") for e in files])


def register(app: typer.Typer) -> None:
    """Add the command to `ai-assistant model`."""
    app.command("pull", cls=Command)(pull)
