"""The parts of a disk image: its partitions, and what lies outside of them."""

from __future__ import annotations

from pathlib import Path

from image.rebuild.errors import RebuildError
from image.vm.gpt import BrokenTable, Partition, layout_problems, read_table

__all__ = ["Partition", "outside", "partitions"]


def partitions(path: Path) -> list[Partition]:
    """In the table's order. Raises RebuildError when there is no table, or a damaged one."""
    end = path.stat().st_size
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size).ljust(size, b"\0")

        try:
            table = read_table(read, 1)
        except BrokenTable as error:
            raise RebuildError(f"{path.name} has no good partition table: {error}") from error
    if problems := layout_problems(table, end):
        raise RebuildError(f"{path.name}: {', '.join(problems)}")
    return list(table.partitions)


def outside(found: list[Partition], end: int) -> list[tuple[int, int]]:
    """Offset and size of what no partition covers: the tables and the gaps."""
    gaps, position = [], 0
    for each in sorted(found, key=lambda partition: partition.start):
        if each.start > position:
            gaps.append((position, each.start - position))
        position = max(position, each.end)
    if end > position:
        gaps.append((position, end - position))
    return gaps
