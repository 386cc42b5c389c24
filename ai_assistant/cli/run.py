"""`ai-assistant run MODEL [PROMPT]`: one answer, or a conversation, with a model of your choice."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ai_assistant.cli.options import Debug, Json, ModelName, is_path, optional, usage_error
from ai_assistant.cli.output import Output

System = Annotated[str, typer.Option("--system", "-s", metavar="TEXT", help="How the model should behave.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-m", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", min=0.0, max=2.0, help="0 always takes the likeliest token.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before TEXT; repeatable.")]
Hetero = Annotated[
    str | None,
    typer.Option(
        "--hetero-compute",
        metavar="WISH",
        help="Devices that may share the work: ON, OFF, …; default: $HETERO_COMPUTE.",
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Say on stderr what each answer cost.")]


def run(
    context: typer.Context,
    model: ModelName,
    prompt: Annotated[
        str | None, typer.Argument(metavar=optional("PROMPT"), help="The question; - reads stdin.", show_default=False)
    ] = None,
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling.")] = None,
    seed: Seed = None,
    stop: Stop = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", metavar="FILE", help="A JSON schema that the answer must match.")
    ] = None,
    context_length: Annotated[int, typer.Option("--context", min=0, help="Context of a model FILE, in tokens.")] = 0,
    hetero_compute: Hetero = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    stats: Stats = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask MODEL one thing, or talk to it when there is no PROMPT.

    MODEL is the name of a model, or a path to a file (with a slash, or ending in .gguf). A file is served
    by the daemon without a copy and forgotten afterwards; without a daemon it is loaded in this process.

    With --json the answer comes as JSON lines: {"event": "text", "text": …} for each piece, and at last
    {"event": "end", "finish_reason": …, "model": …, "tool_calls": […], "usage": {…}}.

    \b
    Examples:
      ai-assistant run helper "Why is the sky blue?"
      ai-assistant run ./model.gguf --max-tokens 100 --raw "Once upon a time"
      git diff | ai-assistant run helper --system "Summarise in one line." -
      ai-assistant run helper --schema person.json "Ada Lovelace, born 1815" | jq .
    """
    from ai_assistant.cli.talk import Conversation
    from ai_assistant.inference import InferenceEngine

    out: Output = context.obj
    params = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    if schema is not None:
        if raw:
            raise usage_error("--schema does not go with --raw")
        params["response_schema"] = read_schema(schema)
    if prompt == "-":
        prompt = sys.stdin.read()
    where: dict[str, Any] = {"model_path": model} if is_path(model) else {"model": model}
    if context_length:
        if "model" in where:
            raise usage_error("--context is for a model FILE; the daemon's own models follow its configuration")
        where["context_length"] = context_length
    if hetero_compute is not None:
        where["hetero_compute"] = hetero_compute
    with InferenceEngine(**where) as engine:
        conversation = Conversation(engine, out, params, system=system, raw=raw, stats=stats)
        if prompt is None:
            conversation.loop()
        else:
            conversation.say(prompt)


def given(**params: Any) -> dict[str, Any]:
    """Only what was said; the rest is the model's own default."""
    return {name: value for name, value in params.items() if value is not None}


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a usage error."""
    try:
        found = json_format.loads(path.read_bytes())
    except OSError as error:
        raise usage_error(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise usage_error(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise usage_error(f"{path} is not a JSON schema: it is no object")
    return found
