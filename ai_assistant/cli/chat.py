"""`ai-assistant chat`: a conversation with the default model."""

from __future__ import annotations

from typing import Annotated

import typer

from ai_assistant.cli.options import Debug, Json, complete_model
from ai_assistant.cli.output import Output
from ai_assistant.cli.run import Hetero, MaxTokens, Seed, Stats, System, Temperature, given


def chat(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="Not the default model.", autocompletion=complete_model),
    ] = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    hetero_compute: Hetero = None,
    stats: Stats = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk to the default model. It remembers the conversation until you leave or /clear it.

    The default is your own newest model, a loaded one first; the built-in model only when there is no
    other. On a terminal: /help shows the commands, triple quotes enclose a text of several lines, Ctrl-C
    stops an answer, and Ctrl-D leaves. From a pipe, each line is one turn.

    \b
    Examples:
      ai-assistant chat
      ai-assistant chat --model helper --system "Answer in Chinese."
      printf 'Hello!\\nWhat did I say?\\n' | ai-assistant chat --json
    """
    from ai_assistant.cli.talk import Conversation
    from ai_assistant.inference import InferenceEngine

    out: Output = context.obj
    params = given(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with InferenceEngine(model or None, hetero_compute=hetero_compute) as engine:
        Conversation(engine, out, params, system=system, stats=stats).loop()
