"""`ai-assistant ask "…"`: one sentence to the appliance, in English or Chinese."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from ai_assistant._loop import LoopThread
from ai_assistant.cli.options import Debug, Json, Yes, confirm, optional
from ai_assistant.cli.output import Output
from ai_assistant.errors import AIAssistantError, ServiceUnavailable


def ask(
    context: typer.Context,
    question: Annotated[
        list[str] | None,
        typer.Argument(metavar=optional("QUESTION"), help="What you want to know, or want done.", show_default=False),
    ] = None,
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be done.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask the appliance something, or tell it to do something, in English or Chinese.

    The built-in model turns the sentence into one of the appliance's own actions; it refuses when it is not
    sure. What only looks is done at once. What changes something is asked about first, and without a
    terminal to ask on it needs --yes. Without a QUESTION each line of the input is one; on a terminal
    Ctrl-D leaves. "ai-assistant ask help" lists what it can do.

    \b
    Examples:
      ai-assistant ask "how warm is it?"
      ai-assistant ask 磁盘还有多少空间
      ai-assistant ask "restart the machine" --dry-run
      ai-assistant ask "load writer" --yes --json
    """
    out: Output = context.obj
    with _asker() as (asker, loop):
        once = _Ask(out, asker, loop, yes, dry_run)
        if question:
            once(" ".join(question))
        else:
            _loop(once)


@dataclass(frozen=True, slots=True)
class _Ask:
    out: Output
    asker: Any
    loop: LoopThread
    yes: bool
    dry_run: bool

    def __call__(self, question: str) -> None:
        proposal = self.loop.run(self.asker.propose(question))
        found: dict[str, Any] = {**asdict(proposal), "answer": None}
        if not self.dry_run:
            if proposal.changes:
                confirm(self.out, _question(proposal.description, proposal.chinese), self.yes)
            found["answer"] = self.loop.run(self.asker.perform(proposal, confirm=proposal.changes))
        if self.out.json:
            self.out.document(found)
        elif self.dry_run:
            sure = f"{proposal.confidence:.0%} sure"
            change = ", changes the system" if proposal.changes else ""
            self.out.line(f"{proposal.description} ({proposal.action}, {sure}{change})")
        else:
            self.out.line(found["answer"])


def _loop(once: _Ask) -> None:
    """One question after the other. On a terminal, one that fails, or that nobody agrees to, does not end it."""
    from ai_assistant.cli.talk import line_editing, read_turn

    out = once.out
    interactive = sys.stdin.isatty() and out.terminal() and not out.json
    if interactive:
        line_editing()
    while True:
        try:
            text = read_turn(interactive)
            if text is None or text.strip() in ("/quit", "/exit"):
                return
            if text.strip():
                once(text)
        except KeyboardInterrupt:
            if not interactive:
                raise
            out.note("")
        except typer.Abort:
            out.note("not done")
        except AIAssistantError as error:
            if not interactive or isinstance(error, ServiceUnavailable):
                raise
            out.error(error.name, error.message, error.hint)


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
