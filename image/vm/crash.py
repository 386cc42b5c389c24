"""The states that a power cut may leave on a disk, out of a recording of its writes.

What a disk promises: a write that completed before a completed flush is on the medium, and so is a completed write
with FUA. Any other may be there or not, each block of it by itself, in any order. A state is therefore a cut – nothing
after it was ever asked for –, everything up to the last flush before it, and some of the blocks of the writes since.

The choice is seeded. First comes what is most likely to hurt: around each write that `important` names – tables,
superblocks – everything but it, nothing but it, half of it. Then random cuts, more often near those writes.
"""

from __future__ import annotations

import bisect
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from image.vm.process import tool
from image.vm.writelog import Entry, WriteLog

SECTOR = 512
SMALL = 1 << 20
Blocks = tuple[tuple[int, int], ...]  # ranges [first, last) of the blocks of a write


@dataclass(frozen=True)
class Piece:
    """The blocks [first, last) of an entry that reached the medium."""

    entry: Entry
    first: int
    last: int

    @property
    def start(self) -> int:
        return self.entry.start + self.first * SECTOR

    @property
    def size(self) -> int:
        return (self.last - self.first) * SECTOR

    @property
    def whole(self) -> bool:
        return self.size == self.entry.size


@dataclass(frozen=True)
class State:
    """Every entry below `durable`, and `kept` of those from there to `cut`."""

    cut: int
    durable: int
    kept: tuple[Piece, ...]
    how: str

    @property
    def key(self) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        """Equal for equal content."""
        return self.durable, tuple((each.entry.number, each.first, each.last) for each in self.kept)

    def __str__(self) -> str:
        return f"cut before entry {self.cut}, durable below {self.durable}, {len(self.kept)} pieces since ({self.how})"


class History:
    """A recording, cut where flushes ended."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        # What is durable at a cut is everything below the first entry after the last flush.
        self._flushed = [0, *(each.number + 1 for each in entries if each.flushes)]

    def durable(self, cut: int) -> int:
        return self._flushed[bisect.bisect_right(self._flushed, cut) - 1]

    def epoch_end(self, durable: int) -> int:
        """The first cut at which more than `durable` is durable, less one."""
        at = bisect.bisect_right(self._flushed, durable)
        return self._flushed[at] - 1 if at < len(self._flushed) else len(self.entries)

    def pending(self, cut: int) -> list[Entry]:
        """Writes since the last flush; those with FUA are durable all the same, and `state` keeps them."""
        return [each for each in self.entries[self.durable(cut) : cut] if each.size]

    def state(self, cut: int, how: str, others: bool, parts: Mapping[int, Blocks] | None = None) -> State:
        """`parts` has the blocks that reached the medium of the writes it names; of `others` all or none did."""
        kept = []
        for entry in self.pending(cut):
            whole: Blocks = ((0, entry.size // SECTOR),)
            blocks: Blocks = whole if others else ()
            if entry.forced:
                blocks = whole
            elif parts and entry.number in parts:
                blocks = parts[entry.number]
            kept += [Piece(entry, first, last) for first, last in blocks if first < last]
        return State(cut, self.durable(cut), tuple(kept), how)


def crash_states(
    history: History, count: int, seed: int, important: Callable[[Entry], int] = lambda _: 0
) -> list[State]:
    """`count` different legal states, in the order of their durable part; fewer only if there are no more. Of writes
    that `important` gives more than 0 the highest come first."""
    choose = random.Random(seed)
    found: dict[object, State] = {}
    targeted = []
    ranks = {each: important(each) for each in history.entries}
    for rank in sorted({*ranks.values()} - {0}, reverse=True):
        ranked = list(_targeted(history, [each for each in history.entries if ranks[each] == rank], choose))
        choose.shuffle(ranked)
        targeted += ranked
    for state in targeted[: count // 2]:
        found.setdefault(state.key, state)
    # Everything flushed before, and everything written since, at each end of an epoch, is in the random part as well.
    weighted = _weights(history, important)
    tries = 0
    while len(found) < count and weighted and tries < 50 * count:
        tries += 1
        state = _random_state(history, choose.choices(weighted[0], weighted[1])[0], choose, important)
        found.setdefault(state.key, state)
    for state in targeted[count // 2 :]:
        if len(found) >= count:
            break
        found.setdefault(state.key, state)
    return sorted(found.values(), key=lambda each: (each.durable, each.cut))


def _targeted(history: History, targets: Sequence[Entry], choose: random.Random) -> Iterator[State]:
    for entry in targets:
        if not entry.size:
            continue
        number, end = entry.number, history.epoch_end(history.durable(entry.number))
        whole = ((0, entry.size // SECTOR),)
        for cut in sorted({number + 1, end}):
            yield history.state(cut, f"all but entry {number}", True, {number: ()})
            yield history.state(cut, f"nothing but entry {number}", False, {number: whole})
            for _ in range(8):
                yield history.state(cut, f"entry {number} torn", True, {number: _torn(entry, choose)})
                yield history.state(cut, f"only a part of entry {number}", False, {number: _torn(entry, choose)})


def _torn(entry: Entry, choose: random.Random) -> Blocks:
    """Some blocks of a write: its begin, its end, both, or any."""
    count = entry.size // SECTOR
    first, last = sorted((_edge(count, choose), _edge(count, choose)))
    match choose.randrange(4):
        case 0:
            return ((0, first),)
        case 1:
            return ((last, count),)
        case 2:
            return ((0, first), (last, count))
        case _ if count <= 128:
            return tuple((each, each + 1) for each in range(count) if choose.random() < 0.5)
        case _:
            return ((first, last),)


def _edge(count: int, choose: random.Random) -> int:
    """Anywhere, but mostly near an end: headers and the few entries in use are there, and zeros between."""
    near = min(count, 4)
    return choose.choice((choose.randint(0, near), count - choose.randint(0, near), choose.randint(0, count)))


def _weights(history: History, important: Callable[[Entry], int]) -> tuple[list[int], list[float]] | None:
    """The epochs, by their first entry, and how often each is to be chosen."""
    weights: dict[int, float] = {}
    for entry in history.entries:
        if entry.size:
            start = history.durable(entry.number)
            weights[start] = weights.get(start, 0.0) + (20.0 if important(entry) else 1.0)
    return (list(weights), [min(each, 200.0) for each in weights.values()]) if weights else None


def _random_state(history: History, durable: int, choose: random.Random, important: Callable[[Entry], int]) -> State:
    cut = choose.randint(durable + 1, history.epoch_end(durable))
    pending = history.pending(cut)
    if not pending:
        return history.state(cut, "nothing pending", True)
    favourites = [each for each in pending if important(each)] or pending
    one = choose.choice(favourites if choose.random() < 0.5 else pending)
    share = choose.choice((0.1, 0.5, 0.9))
    some = {each.number: ((0, each.size // SECTOR),) for each in pending if choose.random() < share}
    match choose.randrange(7):
        case 0:
            return history.state(cut, "nothing of what was not flushed", False)
        case 1:
            return history.state(cut, "all that was asked for", True)
        case 2:
            return history.state(cut, f"all but entry {one.number}", True, {one.number: ()})
        case 3:
            last = pending[-1]
            return history.state(cut, "only the last", False, {last.number: ((0, last.size // SECTOR),)})
        case 4:
            return history.state(cut, f"entry {one.number} torn", True, {one.number: _torn(one, choose)})
        case 5:
            return history.state(cut, f"each with {share:.0%}", False, some)
        case _:
            torn = {each.number: _torn(each, choose) for each in pending if each.number in some}
            return history.state(cut, f"{share:.0%}, each torn", False, torn)


class Medium:
    """The disk in a state. It goes forward only: ask for states in the order of their durable part."""

    def __init__(self, log: WriteLog, base: Path) -> None:
        """`base` is a copy of the disk from before the recording, and is written to."""
        self._log = log
        self._path = base
        # Unbuffered: holes are made and looked for behind the file object's back.
        self._file = base.open("r+b", buffering=0)
        self._durable = 0
        self._state: State | None = None

    @property
    def size(self) -> int:
        return self._path.stat().st_size

    def become(self, state: State) -> None:
        if state.durable < self._durable:
            raise ValueError("states must come in the order of their durable part")
        for entry in self._log.entries[self._durable : state.durable]:
            self._apply(self._file, self._path, Piece(entry, 0, entry.size // SECTOR))
        self._durable = state.durable
        self._state = state

    def read(self, start: int, size: int, *, durable_only: bool = False) -> bytes:
        """As the disk would read in this state; or if nothing had reached it since the last flush."""
        assert self._state is not None
        self._file.seek(start)
        data = bytearray(self._file.read(size))
        for piece in () if durable_only else self._state.kept:
            first, last = max(start, piece.start), min(start + len(data), piece.start + piece.size)
            if first >= last:
                continue
            if piece.entry.discards:
                data[first - start : last - start] = bytes(last - first)
            else:
                origin = piece.entry.start
                data[first - start : last - start] = self._log.data(piece.entry, first - origin, last - origin)
        return bytes(data)

    def save(self, target: Path, start: int = 0, size: int | None = None) -> None:
        """The disk in this state, or a part of it, as a sparse file."""
        assert self._state is not None
        end = self.size if size is None else start + size
        with target.open("w+b", buffering=0) as file:
            file.truncate(end - start)
            copy_data(self._file, file, start, end, 0)
            for piece in self._state.kept:
                if piece.start < end and piece.start + piece.size > start:
                    self._apply(file, target, piece, shift=start, end=end)

    def _apply(self, file: FileIO, path: Path, piece: Piece, shift: int = 0, end: int | None = None) -> None:
        first = max(piece.start, shift)
        last = piece.start + piece.size if end is None else min(piece.start + piece.size, end)
        if first >= last:
            return
        origin = piece.entry.start
        if not piece.entry.discards and last - first <= SMALL:
            file.seek(first - shift)
            file.write(self._log.data(piece.entry, first - origin, last - origin))
            return
        # A discard, or many zeros, which the log has as a hole: a hole here as well, with the data in it.
        tool("fallocate", "--punch-hole", "-o", str(first - shift), "-l", str(last - first), path)
        if not piece.entry.discards:
            at = piece.entry.data_at - origin
            with self._log.path.open("rb", buffering=0) as log:
                copy_data(log, file, at + first, at + last, first - shift)

    def close(self) -> None:
        self._file.close()


def data_extents(file: FileIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where [start, end) of a sparse file has data."""
    at = start
    while at < end:
        try:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:  # nothing but holes from here
            return
        hole = min(os.lseek(file.fileno(), at, os.SEEK_HOLE), end)
        if at < hole:
            yield at, hole
        at = hole


def copy_data(source: FileIO, target: FileIO, start: int, end: int, to: int) -> None:
    """Copy [start, end) to `to` in `target`, holes left out."""
    for first, last in list(data_extents(source, start, end)):
        source.seek(first)
        target.seek(first - start + to)
        left = last - first
        while left > 0 and (chunk := source.read(min(left, 1 << 22))):
            target.write(chunk)
            left -= len(chunk)
