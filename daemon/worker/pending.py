"""A request to a worker and what has come for it, in bounded memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from ai_assistant.engines.contract import Chunk
from ai_assistant.errors import AIAssistantError

_MERGE_ABOVE = 32
"""Unread chunks of plain text beyond these are joined, so that a slow reader costs bytes, not objects."""
MAX_UNREAD = 16 << 20
"""Bytes of events that one request may leave unread."""
MAX_ANSWER = 64 << 20
"""Bytes of frames for one request, read or not."""


class Pending:
    """What has arrived for one request and was not read yet."""

    __slots__ = ("_failure", "_items", "_waiter", "ended", "op", "progress", "room", "unread")

    def __init__(self, op: str, room: int = MAX_ANSWER) -> None:
        self.op = op
        self.room = room
        """Bytes that may still come."""
        self.ended = False
        self.progress: Callable[[float], None] | None = None
        self.unread = 0
        self._items: deque[tuple[Any, int]] = deque()
        self._failure: AIAssistantError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> bool:
        """Keep an item until it is read; False, and nothing is kept, if too much is unread."""
        size = _weight(item)
        self.unread += size
        if self.unread > MAX_UNREAD:
            self._items.clear()
            return False
        if len(self._items) >= _MERGE_ABOVE and isinstance(item, Chunk) and not item.logprobs:
            last, before = self._items[-1]
            if isinstance(last, Chunk) and not last.logprobs and len(last.text) < 4096:
                self._items[-1] = (Chunk(last.text + item.text), before + size)
                return True
        self._items.append((item, size))
        self._notify()
        return True

    def end(self, error: AIAssistantError) -> None:
        self.ended = True
        self._failure = error
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        """The next item; after the last one, the error that ended the request."""
        while not self._items:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item, size = self._items.popleft()
        self.unread -= size
        return item


def _weight(item: Any) -> int:
    """About the bytes that an item takes while it waits."""
    if not isinstance(item, Chunk):
        return 0  # The last one of its request.
    return len(item.text) + sum(256 * (1 + len(each.top)) + len(each.bytes) for each in item.logprobs) + 1
