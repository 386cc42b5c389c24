"""Write the table in docs/performance.md from what the serving bench has kept: `python3 -m bench._page`."""

from __future__ import annotations

import sys
from pathlib import Path

from bench._records import PATH, done, table
from bench.serving import ONCE, PARTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def filled(page: str, made: str) -> str:
    """The page with the table between its marks. Raises ValueError when it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no place for the table")
    return head + begin + made + end + tail


def main() -> int:
    wanted = {part: ("-",) if part in ONCE else ("0.5B", "1B") for part in PARTS}
    PAGE.write_text(filled(PAGE.read_text(), table(done(PATH), wanted)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
