"""Compare two builds of one image, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from image.rebuild.disk import Partition, outside, partitions
from image.rebuild.errors import RebuildError

BLOCK = 1 << 20
# In the order in which a build makes them, the cheapest to look at first.
ARTEFACTS = ("initrd.manifest", "manifest", "efi", "raw")


@dataclass(frozen=True)
class Pair:
    """The same thing in both builds. Hashes are SHA-256; `first_difference` is an offset in bytes."""

    what: str
    a: str
    b: str
    first_difference: int | None

    @property
    def identical(self) -> bool:
        return self.first_difference is None

    def as_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "a": self.a,
            "b": self.b,
            "identical": self.identical,
            "first_difference": self.first_difference,
        }


@dataclass(frozen=True)
class Comparison:
    """All artefacts of one image, and the parts of its disk."""

    name: str
    artefacts: list[Pair]
    parts: list[Pair] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return all(pair.identical for pair in (*self.artefacts, *self.parts))

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "identical": self.identical,
            "artefacts": [pair.as_json() for pair in self.artefacts],
            "partitions": [pair.as_json() for pair in self.parts],
        }


def _blocks(path: Path, areas: Sequence[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """The offset and content of each block of these areas; shorter when the file ends."""
    with path.open("rb") as file:
        for offset, size in areas:
            file.seek(offset)
            end = offset + size
            while offset < end and (block := file.read(min(BLOCK, end - offset))):
                yield offset, block
                offset += len(block)


def compare(what: str, a: Path, b: Path, areas: Sequence[tuple[int, int]] | None = None) -> Pair:
    """Compares two files, or the same areas (offset, size) of both."""
    sums, first = [hashlib.sha256(), hashlib.sha256()], None
    whole = areas is None
    spans = [[(0, path.stat().st_size)] if whole else list(areas or []) for path in (a, b)]
    streams = [_blocks(path, span) for path, span in zip((a, b), spans, strict=True)]
    while True:
        (at, left), (_, right) = (next(stream, (-1, b"")) for stream in streams)
        if not left and not right:
            break
        sums[0].update(left)
        sums[1].update(right)
        if first is None and left != right:
            same = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), None)
            first = max(at, 0) + (min(len(left), len(right)) if same is None else same)
    return Pair(what, sums[0].hexdigest(), sums[1].hexdigest(), first)


def compare_disks(a: Path, b: Path) -> list[Pair]:
    """Each partition by name, and what lies outside of them."""
    left, right = partitions(a), partitions(b)
    if [(label(each), each.start, each.size) for each in left] != [
        (label(each), each.start, each.size) for each in right
    ]:
        return [compare("partition table (partitions lie elsewhere)", a, b, [(0, 64 * 512)])]
    found = [compare(label(each), a, b, [(each.start, each.size)]) for each in left]
    return [*found, compare("outside of partitions", a, b, outside(left, a.stat().st_size))]


def label(partition: Partition) -> str:
    return f"{partition.number} {partition.kind} {partition.label}".strip()


def compare_builds(name: str, a: Path, b: Path) -> Comparison:
    """`a` and `b` are the folders build/unsigned of two checkouts. Raises RebuildError when an artefact is missing."""
    pairs = []
    for suffix in ARTEFACTS:
        files = [folder / f"{name}.{suffix}" for folder in (a, b)]
        for path in files:
            if not path.is_file():
                raise RebuildError(f"{path} is missing", "image/reproduce --again")
        pairs.append(compare(suffix, files[0], files[1]))
    return Comparison(name, pairs, compare_disks(a / f"{name}.raw", b / f"{name}.raw"))


def table(comparison: Comparison) -> str:
    """For people: one line per artefact and per partition."""
    lines = [comparison.name]
    for indent, pairs in ((2, comparison.artefacts), (6, comparison.parts)):
        for pair in pairs:
            verdict = "identical" if pair.identical else f"DIFFERS, first at byte {pair.first_difference}"
            sums = pair.a[:16] if pair.identical else f"{pair.a[:16]} {pair.b[:16]}"
            lines.append(f"{' ' * indent}{pair.what:<{36 - indent}} {sums}  {verdict}")
    return "\n".join(lines)
