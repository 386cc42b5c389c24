"""States of idle conversations, out of the way: in memory, and from there in a file.

The least recently used goes from memory to the file, and from the file to nowhere. A thread writes, since
a disk may take seconds and nobody's answer waits for it. Whatever fails there loses one state, which
costs reading its prompt again; after some failures in a row the file is left alone.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque

from ai_assistant.engines.batch import Tokens
from ai_assistant.engines.prefix import PrefixIndex

_MOST_FAILURES = 3


class _Entry:
    __slots__ = ("data", "key", "offset", "size", "tokens", "writing")

    def __init__(self, key: int, tokens: Tokens, data: bytearray) -> None:
        self.key = key
        self.tokens = tokens
        self.data: bytearray | None = data
        self.size = len(data)
        self.offset = -1
        """Where it lies, or will lie, in the file."""
        self.writing = False


class SpillStore:
    """States by the tokens that made them. `close` ends the thread; any thread may call.

    Args:
        memory_bytes, disk_bytes: what may be kept in each.
        file: descriptor of a file that nobody else writes; it is duplicated. None: memory only.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, file: int | None = None) -> None:
        self._memory_limit = memory_bytes
        self._file = os.dup(file) if file is not None and disk_bytes > 0 else None
        self._space = Extents(disk_bytes if self._file is not None else 0)
        self._index = PrefixIndex()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0
        self._in_memory = 0
        self._lock = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._failures = 0
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def enabled(self) -> bool:
        return self._memory_limit > 0 or self._space.size > 0

    @property
    def on_disk(self) -> bool:
        """Whether there is a file that still works."""
        return self._space.size > 0 and self._failures < _MOST_FAILURES

    @property
    def size_bytes(self) -> int:
        with self._lock:
            return sum(each.size for each in self._entries.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest state that has a chance."""
        return max(self._memory_limit, self._space.size)

    def __len__(self) -> int:
        return len(self._entries)

    def covers(self, tokens: Tokens) -> bool:
        """Whether a state begins with all of `tokens`."""
        with self._lock:
            return self._index.longest(tokens)[1] == len(tokens) > 0

    def put(self, tokens: Tokens, data: bytearray) -> None:
        """Keep a state, if there is room; it replaces the one that it continues."""
        with self._lock:
            if self._closing or not 0 < len(data) <= self.largest:
                return
            former, length = self._index.whole(tokens)
            if former is not None and 2 * length >= len(tokens):
                self._drop(former)
            entry = _Entry(self._next, tokens, data)
            self._next += 1
            same = self._index.insert(entry.key, tokens)
            if same is not None:
                self._forget(self._entries.pop(same))
            self._entries[entry.key] = entry
            self._in_memory += entry.size
            self._balance()

    def find(self, prompt: Tokens, *, whole: bool) -> tuple[int | None, int]:
        """The state that shares the longest beginning with `prompt`, and its tokens.

        Args:
            whole: only states all of which the prompt continues.
        """
        with self._lock:
            return self._index.whole(prompt) if whole else self._index.longest(prompt)

    def length(self, key: int) -> int:
        """Tokens of a state."""
        with self._lock:
            entry = self._entries.get(key)
            return 0 if entry is None else len(entry.tokens)

    def get(self, key: int) -> bytearray | None:
        """A state; None if it was lost."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            if entry.data is not None:
                return entry.data
            assert self._file is not None
            data = _read(self._file, entry.size, entry.offset)
            if data is None:
                self._drop(key)
            return data

    def drop(self, key: int) -> None:
        with self._lock:
            self._drop(key)

    def clear_memory(self) -> None:
        """Write what is in memory to the file, as far as it goes, and forget the rest."""
        with self._lock:
            self._wait()
            for entry in [each for each in self._entries.values() if each.data is not None]:
                # Room for a later one may have cost this one its place.
                if self._entries.get(entry.key) is entry:
                    if self._offer(entry):
                        self._wait()
                    else:
                        self._drop(entry.key)

    def settle(self) -> None:
        """Wait until nothing is left to write."""
        with self._lock:
            self._wait()

    def close(self) -> None:
        """Forget everything and end the thread; idempotent."""
        with self._lock:
            self._closing = True
            self._entries.clear()
            self._index.clear()
            self._queue.clear()
            self._in_memory = 0
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # Below, the lock is held.

    def _wait(self) -> None:
        self._lock.wait_for(lambda: not self._queue and not any(each.writing for each in self._entries.values()))

    def _balance(self) -> None:
        """Move what memory has no room for to the file, or drop it."""
        excess = self._in_memory - sum(each.size for each in self._entries.values() if each.writing)
        for entry in list(self._entries.values()):
            if excess <= self._memory_limit:
                break
            if entry.data is None or entry.writing:
                continue
            excess -= entry.size
            # One at a time waits for the disk: it may be slower than the conversations come.
            if self._queue or not self._offer(entry):
                self._drop(entry.key)

    def _offer(self, entry: _Entry) -> bool:
        """Hand a state to the thread that writes; False if there is no room."""
        if not self._make_room(entry):
            return False
        entry.writing = True
        self._queue.append(entry)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="spill", daemon=True)
            self._thread.start()
        self._lock.notify_all()
        return True

    def _make_room(self, entry: _Entry) -> bool:
        if self._failures >= _MOST_FAILURES or entry.size > self._space.size:
            return False
        while (offset := self._space.take(entry.size)) is None:
            oldest = next((each for each in self._entries.values() if each.offset >= 0 and not each.writing), None)
            if oldest is None:
                return False
            self._drop(oldest.key)
        entry.offset = offset
        return True

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._index.remove(key)
            self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        if entry.data is not None:
            self._in_memory -= entry.size
        # What is being written is given back by the writer.
        if entry.offset >= 0 and not entry.writing:
            self._space.give(entry.offset, entry.size)

    def _write(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._queue) or self._closing)
                if self._closing:
                    return
                entry = self._queue.popleft()
                data, file = entry.data, self._file
            assert data is not None
            assert file is not None
            written = _write(file, data, entry.offset)
            with self._lock:
                entry.writing = False
                self._failures = 0 if written else self._failures + 1
                if self._entries.get(entry.key) is not entry:
                    self._space.give(entry.offset, entry.size)
                elif written:
                    entry.data = None
                    self._in_memory -= entry.size
                else:
                    self._drop(entry.key)
                self._lock.notify_all()


class Extents:
    """Which parts of a file of `size` bytes are free: first fit, neighbours joined."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size > 0 else []

    @property
    def free(self) -> int:
        return sum(size for _, size in self._free)

    def take(self, size: int) -> int | None:
        """The offset of a part; None if no part is large enough."""
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        joined: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, size)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((start, room))
        self._free = joined


def _write(file: int, data: bytearray, offset: int) -> bool:
    view = memoryview(data)
    at = 0
    try:
        while at < len(view):
            count = os.pwrite(file, view[at : at + (8 << 20)], offset + at)
            if count <= 0:
                return False
            at += count
    except OSError:
        return False
    return True


def _read(file: int, size: int, offset: int) -> bytearray | None:
    try:
        data = bytearray(size)
        view = memoryview(data)
        at = 0
        while at < size:
            count = os.preadv(file, [view[at:]], offset + at)
            if count <= 0:
                return None
            at += count
    except (OSError, MemoryError):
        return None
    return data
