"""The operators that L3 tries: one table per family. A row says how a random example of an operator is made."""

from __future__ import annotations

from ai_assistant.hal.conformance.families import elementwise, matrices, networks, reductions, selection, shapes
from ai_assistant.hal.conformance.families.row import Row

ROWS: tuple[Row, ...] = (
    *matrices.ROWS,
    *elementwise.ROWS,
    *networks.ROWS,
    *reductions.ROWS,
    *shapes.ROWS,
    *selection.ROWS,
)
FAMILIES = {
    "matrices": matrices.ROWS,
    "elementwise": elementwise.ROWS,
    "networks": networks.ROWS,
    "reductions": reductions.ROWS,
    "shapes": shapes.ROWS,
    "selection": selection.ROWS,
}
