"""Reads the table of figures in models/MODEL_CARD.md, so that what is claimed is what is tested."""

from __future__ import annotations

from pathlib import Path

CARD = Path(__file__).parents[2] / "models" / "MODEL_CARD.md"
COLUMNS = ("questions", "accuracy", "refused_in_scope", "refused_out_of_scope", "wrong", "wrong_changes")


def claims(name: str) -> dict[str, float]:
    """The row of one set (dev, test or hard); shares are 0 to 1.

    Raises:
        AssertionError: the card has no such row.
    """
    for line in CARD.read_text("utf-8").splitlines():
        cells = [each.strip() for each in line.strip().strip("|").split("|")]
        if cells[0] == f"`{name}`" and len(cells) == len(COLUMNS) + 1:
            values = [float(each.removesuffix("%")) / (100 if each.endswith("%") else 1) for each in cells[1:]]
            return dict(zip(COLUMNS, values, strict=True))
    raise AssertionError(f"the model card has no row for {name}")
