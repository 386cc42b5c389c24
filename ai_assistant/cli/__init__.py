"""The command line. `main` is what the two entry points and `python -m ai_assistant` run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; what can be said without the big imports is said first."""
    # Where the locale is not UTF-8, Python reads the arguments in something else; they are UTF-8 all the same.
    given = [os.fsencode(each).decode("utf-8", "surrogateescape") for each in sys.argv[1:]] if args is None else [*args]
    _repair_standard_streams()
    if given in (["--version"], ["-V"]):
        from ai_assistant import __version__

        print(__version__)
        return 0
    if given == ["banner"]:
        from ai_assistant.cli import banner

        return banner.run()
    from ai_assistant.cli.app import run

    return run(given)


def _repair_standard_streams() -> None:
    # A descriptor 0–2 that was closed by the caller would be reused by the first socket that is opened.
    for wanted in (0, 1, 2):
        try:
            os.fstat(wanted)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # What a terminal with a poor locale cannot show becomes a question mark, not an exception.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
