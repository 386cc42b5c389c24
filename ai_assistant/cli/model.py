"""`ai-assistant model …`: look after the models."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ai_assistant.cli import memory, pull, suggest
from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, ModelName, Yes, confirm, is_path, usage_error
from ai_assistant.cli.output import Output, follow, number, size

if TYPE_CHECKING:
    from ai_assistant._results import Model

app = typer.Typer(help="List, get, load and remove models.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", cls=Command)
def list_models(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List all models. On a pipe there are no headings.

    \b
    Examples:
      ai-assistant model list
      ai-assistant model list --json | jq -r '.[].name'
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        found = client.models()
    if out.json:
        out.document([asdict(each) for each in found])
        return
    if not found:
        out.note("there are no models: import one with ai-assistant model import FILE")
    out.table(
        ("name", "state", "size", "parameters", "quantization", "context", "memory"),
        [
            (
                each.name,
                each.state
                + (" (built in)" if each.builtin else " (transient)" if each.transient else "")
                + (" (pinned)" if each.pinned else ""),
                size(each.size_bytes),
                number(each.parameters),
                each.quantization or "-",
                str(each.context_length),
                size(each.resident_bytes or each.memory_estimate_bytes),
            )
            for each in found
        ],
    )


@app.command("show", cls=Command)
def show(context: typer.Context, model: ModelName, json: Json = False, debug: Debug = False) -> None:
    """Show everything that is known of a model.

    \b
    Examples:
      ai-assistant model show assistant
      ai-assistant model show assistant:1 --json
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        found = client.model(model)
    if out.json:
        out.document(asdict(found))
        return
    origin = "built in" if found.builtin else "passed by a program, transient" if found.transient else "imported"
    pairs = [
        ("name", found.name),
        ("state", found.state),
        ("origin", origin),
        ("format", f"{found.format}, {found.architecture}"),
        ("parameters", number(found.parameters)),
        ("quantization", found.quantization or "-"),
        ("context", f"{found.context_length} tokens"),
        ("file", size(found.size_bytes)),
        ("memory", _memory(found)),
        ("pinned", "yes" if found.pinned else "no"),
    ]
    if found.created:
        pairs.append(("since", f"{datetime.fromtimestamp(found.created).astimezone():%Y-%m-%d %H:%M}"))
    if found.error:
        pairs.append(("error", found.error))
    out.fields(pairs)


def _memory(found: Model) -> str:
    if found.resident_bytes:
        return f"{size(found.resident_bytes)} set aside"
    return f"about {size(found.memory_estimate_bytes)} when loaded"


@app.command("import", cls=Command)
def import_model(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A GGUF file, or an ONNX model: its folder, or an uncompressed .tar or .zip of that.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Option("--name", "-n", metavar="NAME", help="name or name:version; default: from the file's name.")
    ] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a model file and copy it into the appliance, for everybody. Ctrl-C undoes it.

    \b
    Examples:
      ai-assistant model import qwen2.5-0.5b-instruct-q4_0.gguf
      ai-assistant model import model.gguf --name helper:2
      ai-assistant model import ./all-MiniLM-L6-v2 --name minilm
    """
    from ai_assistant._results import slug
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        job = client.import_model(file, name or slug(file.stem))
        result = follow(out, job, f"importing {file.name}")
    given = str(result.get("name", name or slug(file.stem)))
    if out.json:
        out.document({"name": given})
    else:
        out.line(f"imported {given}; try it with: ai-assistant run {given}")


memory.register(app)
pull.register(app)
suggest.register(app)


@app.command("remove", cls=Command)
def remove(
    context: typer.Context, model: ModelName, yes: Yes = False, json: Json = False, debug: Debug = False
) -> None:
    """Delete a model from the appliance. Asks first.

    \b
    Examples:
      ai-assistant model remove helper:2
      ai-assistant model remove helper:2 --yes
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        found = client.model(model)
        confirm(out, f"Delete {found.name} ({size(found.size_bytes)}) from this appliance?", yes)
        client.remove(found.name)
    if out.json:
        out.document({"name": found.name, "removed": True})
    else:
        out.line(f"removed {found.name}")


@app.command("load", cls=Command)
def load(context: typer.Context, model: ModelName, json: Json = False, debug: Debug = False) -> None:
    """Load a model now instead of at its first request. Ctrl-C cancels.

    \b
    Examples:
      ai-assistant model load assistant
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    if is_path(model):
        raise usage_error("a file is loaded by ai-assistant run FILE, or first imported by ai-assistant model import")
    with Client() as client:
        follow(out, client.load(model), f"loading {model}")
        found = client.model(model)
    if out.json:
        out.document(asdict(found))
    else:
        out.line(f"{found.name} is {found.state}")


@app.command("unload", cls=Command)
def unload(context: typer.Context, model: ModelName, json: Json = False, debug: Debug = False) -> None:
    """Free a model's memory. The model stays, and is loaded again when it is needed.

    \b
    Examples:
      ai-assistant model unload assistant
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        client.unload(model)
        found = client.model(model)
    if out.json:
        out.document(asdict(found))
    else:
        out.line(f"{found.name} is {found.state}")
