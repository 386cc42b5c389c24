"""What a command says, and to whom: people on a terminal, pipes, or programs that asked for JSON."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ai_assistant.errors import AIAssistantError, NotAuthorized, ServiceUnavailable

if TYPE_CHECKING:
    from ai_assistant.client import Job

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_AUTHORIZED = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


def exit_status(error: AIAssistantError) -> int:
    if isinstance(error, NotAuthorized):
        return EXIT_NOT_AUTHORIZED
    return EXIT_UNAVAILABLE if isinstance(error, ServiceUnavailable) else EXIT_ERROR


@dataclass(slots=True)
class Output:
    """Passed to every command as the context's object."""

    json: bool = False
    debug: bool = False

    def terminal(self, stream: TextIO | None = None) -> bool:
        target = sys.stdout if stream is None else stream
        return target is not None and target.isatty()

    def document(self, value: Any) -> None:
        """One JSON document on one line."""
        # Elsewhere than in UTF-8, escapes keep the document whole.
        escaped = sys.stdout is not None and not (sys.stdout.encoding or "").lower().startswith("utf")
        self.write(json.dumps(value, ensure_ascii=escaped, default=_plain) + "\n")

    def write(self, text: str) -> None:
        """Text as it is, at once: a stream's reader should not wait for a full buffer."""
        if sys.stdout is not None:
            sys.stdout.write(printable(text) if self.terminal() else text)
            sys.stdout.flush()

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def note(self, text: str) -> None:
        """Something for the person, not part of the result."""
        if sys.stderr is not None and not self.json:
            print(printable(text), file=sys.stderr)

    def error(self, name: str, message: str, hint: str = "") -> None:
        if sys.stderr is None:
            return
        if self.json:
            body = {"error": {"name": name, "message": message, "hint": hint}}
            print(json.dumps(body, ensure_ascii=False), file=sys.stderr)
            return
        print(f"{paint('error:', '1;31')} {printable(message)}", file=sys.stderr)
        if hint:
            print(f"{paint('hint:', '36')} {printable(hint)}", file=sys.stderr)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Aligned columns; headings only for people, so that a pipe gets nothing but rows."""
        cells = [[printable(cell) for cell in row] for row in rows]
        if self.terminal():
            cells = [list(columns), *cells]
        if not cells:
            return
        widths = [max(width(row[i]) for row in cells) for i in range(len(columns))]
        for number, row in enumerate(cells):
            padded = [cell + " " * (widths[i] - width(cell)) for i, cell in enumerate(row)]
            text = "  ".join(padded).rstrip()
            self.line(text if number or not self.terminal() else text.upper())

    def fields(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Name and value, one pair on a line."""
        listed = list(pairs)
        longest = max((width(name) for name, _ in listed), default=0)
        for name, value in listed:
            self.line(f"{name}{' ' * (longest - width(name))}  {value}".rstrip())


def _plain(value: Any) -> Any:
    if isinstance(value, AIAssistantError):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def printable(text: str) -> str:
    """Without control characters: a model's answer or a file's name must not steer somebody's terminal."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "�" for c in text)


def width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def paint(text: str, code: str) -> str:
    """Colour for stderr, where it is a terminal that can and may show it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or sys.stderr is None or not sys.stderr.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def size(count: float | None) -> str:
    """Bytes for people, in binary units."""
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(count: float) -> str:
    """A count of parameters or tokens for people: 482 M, 7.2 B."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{value} {unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if value]
    return " ".join(parts) or f"{rest} s"


def follow(out: Output, job: Job, what: str) -> Mapping[str, Any]:
    """Wait for a job with a progress bar, on a terminal only; Ctrl-C cancels the job. Returns its result.

    Raises:
        AIAssistantError: why the job failed.
    """
    result: Mapping[str, Any] = {}
    try:
        with progress_bar(out, what) as update:
            for status in job.watch():
                update(status.progress, status.message)
                result = status.result
                if status.error is not None:
                    raise status.error
    except KeyboardInterrupt:
        job.cancel()
        raise
    return result


@contextmanager
def progress_bar(out: Output, what: str) -> Iterator[Any]:
    """On a terminal a bar on stderr; gives a function of the share that is done (0 to 1) and what is being done."""
    if out.json or sys.stderr is None or not sys.stderr.isatty():
        yield lambda progress, message: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=1.0)

        def update(value: float, message: str) -> None:
            progress.update(task, completed=value, description=printable(message) or what)

        yield update
