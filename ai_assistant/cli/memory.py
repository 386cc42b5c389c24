"""`ai-assistant model pin|unpin|drain|estimate`: which models stay in memory, and what they take of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, ModelName
from ai_assistant.cli.output import Output, follow, size

_PARTS = (
    ("weights", "weights_bytes"),
    ("repacked", "repacked_bytes"),
    ("cache", "kv_bytes"),
    ("compute", "compute_bytes"),
    ("process", "runtime_bytes"),
    ("total", "total_bytes"),
)


def register(app: typer.Typer) -> None:
    """Add these commands to `ai-assistant model`."""
    for name, function in (("pin", pin), ("unpin", unpin), ("drain", drain), ("estimate", estimate)):
        app.command(name, cls=Command)(function)


def pin(context: typer.Context, model: ModelName, json: Json = False, debug: Debug = False) -> None:
    """Keep a model in memory once it is loaded, over restarts.

    \b
    Examples:
      ai-assistant model pin assistant
    """
    _pin(context.obj, model, True)


def unpin(context: typer.Context, model: ModelName, json: Json = False, debug: Debug = False) -> None:
    """Let a pinned model go again when memory is needed or nobody uses it.

    \b
    Examples:
      ai-assistant model unpin assistant
    """
    _pin(context.obj, model, False)


def _pin(out: Output, model: str, pinned: bool) -> None:
    from ai_assistant.client import Client

    with Client() as client:
        client.pin(model, pinned)
        found = client.model(model)
    if out.json:
        out.document(asdict(found))
    else:
        out.line(f"{found.name} is {'pinned' if found.pinned else 'not pinned'}")


def drain(context: typer.Context, model: ModelName, json: Json = False, debug: Debug = False) -> None:
    """Take no more requests for a model, let those that run finish, then unload it. Ctrl-C ends the wait.

    \b
    Examples:
      ai-assistant model drain assistant
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        follow(out, client.drain(model), f"draining {model}")
        found = client.model(model)
    if out.json:
        out.document(asdict(found))
    else:
        out.line(f"{found.name} is {found.state}")


def estimate(
    context: typer.Context,
    model: ModelName,
    context_length: Annotated[
        int, typer.Option("--context", "-c", min=0, max=1 << 24, help="tokens per sequence; 0: as configured.")
    ] = 0,
    sequences: Annotated[
        int, typer.Option("--sequences", "-s", min=0, max=256, help="generations at once; 0: as configured.")
    ] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what loading a model takes of the memory. Nothing is loaded.

    \b
    Examples:
      ai-assistant model estimate assistant
      ai-assistant model estimate assistant --context 32768 --sequences 1
    """
    from ai_assistant.client import Client

    out: Output = context.obj
    with Client() as client:
        found = client.estimate(model, context_length=context_length, sequences=sequences)
    if out.json:
        out.document(found)
    else:
        out.fields([(label, size(found[key])) for label, key in _PARTS])
