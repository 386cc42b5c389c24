"""`ai-assistant ask "…"`: one sentence to the appliance, in English or Chinese."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ai_assistant._loop import LoopThread
from ai_assistant.cli.options import Debug, Json, Yes, confirm
from ai_assistant.cli.output import Output


def ask(
    context: typer.Context,
    question: Annotated[list[str], typer.Argument(metavar="QUESTION", help="What you want to know, or want done.")],
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be done.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask the appliance something, or tell it to do something, in English or Chinese.

    The built-in model turns the sentence into one of the appliance's own actions; it refuses when it is not
    sure. What only looks is done at once. What changes something is asked about first, and without a
    terminal to ask on it needs --yes. "ai-assistant ask help" lists what it can do.

    \b
    Examples:
      ai-assistant ask "how warm is it?"
      ai-assistant ask 磁盘还有多少空间
      ai-assistant ask "restart the machine" --dry-run
      ai-assistant ask "load writer" --yes --json
    """
    out: Output = context.obj
    with _asker() as (asker, loop):
        proposal = loop.run(asker.propose(" ".join(question)))
        found: dict[str, Any] = {**asdict(proposal), "answer": None}
        if not dry_run:
            if proposal.changes:
                confirm(out, _question(proposal.description, proposal.chinese), yes)
            found["answer"] = loop.run(asker.perform(proposal, confirm=proposal.changes))
    if out.json:
        out.document(found)
    elif dry_run:
        sure = f"{proposal.confidence:.0%} sure"
        out.line(f"{proposal.description} ({proposal.action}, {sure}{', changes the system' * proposal.changes})")
    else:
        out.line(found["answer"])


def _question(description: str, chinese: bool) -> str:
    return f"{description}？" if chinese else f"{description[:1].upper()}{description[1:]}?"


@contextmanager
def _asker() -> Iterator[tuple[Any, LoopThread]]:
    """The asker, and the loop that its coroutines run on; apart from this thread, where a person is asked."""
    from ai_assistant.actions.ask import Asker
    from ai_assistant.actions.bus import SystemBus
    from ai_assistant.client import AsyncClient

    client = AsyncClient()

    async def complete(body: dict[str, Any]) -> Mapping[str, Any]:
        choice: Mapping[str, Any] = (await client.post("/v1/chat/completions", body))["choices"][0]
        return choice

    loop, bus = LoopThread(), SystemBus()
    try:
        loop.run(bus.__aenter__())
        yield Asker(complete, bus), loop
    finally:
        loop.run(bus.__aexit__(None, None, None))
        loop.close()
