"""One request, one or several answers: the generations behind it, and their events as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ai_assistant.engines.contract import Event, GenerateRequest
from ai_assistant.engines.usage import seeded

Numbered = tuple[int, Event]
"""An event, and which answer it belongs to, from 0."""
Start = Callable[[GenerateRequest], AsyncGenerator[Event]]

_AHEAD = 16
"""Events of each answer that wait to be written before its generation is not asked for more."""


async def numbered(start: Start, request: GenerateRequest, n: int) -> AsyncGenerator[Numbered]:
    """Events of `n` answers as they come; closing it, or the failure of one of them, ends all.

    Raises:
        AIAssistantError: of the first answer that failed.
    """
    if n == 1:
        # No task and no queue between: this is nearly every request.
        async with aclosing(start(request)) as events:
            async for event in events:
                yield 0, event
        return
    async with aclosing(_side_by_side([start(each) for each in seeded(request, n)])) as merged:
        async for pair in merged:
            yield pair


async def _side_by_side(sources: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Numbered]:
    queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue(_AHEAD * len(sources))

    async def pump(index: int, source: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(source) as events:
                async for event in events:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(index, each), name="api: an answer") for index, each in enumerate(sources)]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        # Not before each has ended is its slot free for others.
        await asyncio.gather(*tasks, return_exceptions=True)
