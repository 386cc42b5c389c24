"""Run the benches: the one that is named, or all but those that take very long.

python3 -m bench [NAME] [--json] [ARGUMENT ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_NOT_A_BENCH = ("__init__", "__main__", "harness")
BY_NAME = {"soak": "half an hour at least"}
"""Benches that are run only when they are asked for, and why."""


def names() -> list[str]:
    return sorted(each.stem for each in _HERE.glob("*.py") if each.stem not in _NOT_A_BENCH and each.stem[0] != "_")


def main(arguments: list[str]) -> int:
    """Exit status 1 when a claim of any bench does not hold, 2 when there is no such bench."""
    chosen = names()
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        if name not in chosen:
            print(f"bench: there is no {name}; there are {', '.join(chosen)}", file=sys.stderr)
            return 2
        chosen = [name]
    else:
        for name, why in BY_NAME.items():
            print(f"bench: {name} is left out ({why}); ask for it: bench {name}", file=sys.stderr)
        chosen = [each for each in chosen if each not in BY_NAME]
    failed = 0
    for name in chosen:
        # A process each: what one loads must not slow the next.
        done = subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments], cwd=_HERE.parent, check=False)
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
