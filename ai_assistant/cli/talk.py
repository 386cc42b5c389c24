"""Conversations on a terminal or through a pipe: what `run` and `chat` have in common."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ai_assistant._streams import TextStream
from ai_assistant.cli.output import Output
from ai_assistant.engines.contract import Usage
from ai_assistant.errors import AIAssistantError, ServiceUnavailable
from ai_assistant.inference import InferenceEngine

HELP = """/help      this help
/clear     forget the conversation
/system …  say how the model should behave, and start anew
/quit      leave (or Ctrl-D)
\"\"\"        begin and end a text of several lines
Ctrl-C     stop an answer"""

PROMPT, MORE = "> ", "… "


def speak(out: Output, stream: TextStream, *, stats: bool = False) -> str:
    """Write an answer as it is generated and return it. Ctrl-C cancels the generation and is passed on."""
    ended = True
    with stream:
        for text in stream:
            ended = text.endswith("\n")
            if out.json:
                out.document({"event": "text", "text": text})
            else:
                out.write(text)
    usage = stream.usage or Usage()
    calls = [asdict(call) for call in stream.tool_calls]
    if out.json:
        reason = str(stream.finish_reason or "")
        end = {"event": "end", "finish_reason": reason, "model": stream.model, "tool_calls": calls}
        out.document({**end, "usage": asdict(usage)})
        return stream.text
    for call in calls:
        out.line(f"{call['name']}({call['arguments']})")
    if not calls and (not ended or not stream.text):
        out.line()
    if stats:
        out.note(described(usage))
    return stream.text


def described(usage: Usage) -> str:
    """What an answer cost, for people."""
    parts = [f"{usage.prompt_tokens} tokens read in {usage.prefill_s:.2f} s"]
    speed = f" ({usage.completion_tokens / usage.decode_s:.1f}/s)" if usage.decode_s > 0 else ""
    parts.append(f"{usage.completion_tokens} written in {usage.decode_s:.2f} s{speed}")
    parts.append("energy not measured" if usage.energy_j is None else f"{usage.energy_j:.1f} J")
    if usage.devices:
        parts.append(f"on {', '.join(usage.devices)}")
    return ", ".join(parts)


@dataclass(slots=True)
class Conversation:
    """Turns with one model, which remembers them unless `raw`: then each text is continued by itself."""

    engine: InferenceEngine
    out: Output
    params: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    raw: bool = False
    stats: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """One turn. What failed or was interrupted is not remembered."""
        if self.raw:
            speak(self.out, self.engine.stream(text, **self.params), stats=self.stats)
            return
        opening = [{"role": "system", "content": self.system}] if self.system else []
        turn = {"role": "user", "content": text}
        stream = self.engine.stream([*opening, *self.history, turn], **self.params)
        answer = speak(self.out, stream, stats=self.stats)
        self.history += [turn, {"role": "assistant", "content": answer}]

    def loop(self) -> None:
        """Read turns up to the end of the input."""
        interactive = sys.stdin.isatty() and self.out.terminal() and not self.out.json
        if interactive:
            line_editing()
            self.out.note(f"{self.engine.model} – /help for help, Ctrl-D to leave")
        while True:
            try:
                text = read_turn(interactive)
                if text is None:
                    return
                if interactive and text.startswith("/"):
                    if not self._command(text):
                        return
                elif text.strip():
                    self.say(text)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self.out.note("")
            except ServiceUnavailable:
                raise
            except AIAssistantError as error:
                # One bad turn, such as one that is too long, need not end a conversation.
                if not interactive:
                    raise
                self.out.error(error.name, error.message, error.hint)

    def _command(self, text: str) -> bool:
        word, _, rest = text.strip().partition(" ")
        if word in ("/quit", "/exit", "/bye"):
            return False
        if word == "/clear":
            self.history.clear()
        elif word == "/system":
            self.system = rest.strip()
            self.history.clear()
        else:
            self.out.note(HELP if word in ("/help", "/?") else f"there is no {word}\n{HELP}")
        return True


def line_editing() -> None:
    """Line editing and history for what is typed from here on, where Python has it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def read_turn(interactive: bool) -> str | None:
    """One turn of the input, None at its end. On a terminal, lines between triple quotes are one turn."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        text = input(PROMPT)
        if not text.startswith('"""'):
            return text
        lines = [text[3:]]
        while not lines[-1].endswith('"""'):
            lines.append(input(MORE))
    except EOFError:
        print()
        return None
    lines[-1] = lines[-1][:-3]
    return "\n".join(lines).strip("\n")
