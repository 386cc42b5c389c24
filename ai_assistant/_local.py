"""An engine in this process, as the streams and coroutines of the SDK."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ai_assistant import _wire
from ai_assistant._streams import AsyncTextStream, TextStream
from ai_assistant._transport import check_folder, open_model_file
from ai_assistant.engines.contract import Engine, Event, GenerateRequest, Generation, LoadOptions
from ai_assistant.engines.usage import seeded, together
from ai_assistant.errors import NotSupported


def load(path: str | os.PathLike[str], options: Mapping[str, Any]) -> Engine:
    """
    Raises:
        NotSupported: no engine is installed here.
        AIAssistantError: the file cannot be opened, or the model cannot be loaded.
    """
    # A bad path is the same error with and without a daemon.
    if os.path.isdir(path):  # noqa: PTH112 - false where the path is impossible
        check_folder(path)
    else:
        os.close(open_model_file(path))
    try:
        from ai_assistant.engines import open_model
    except ImportError as error:
        raise NotSupported(
            f"models cannot be loaded in this process: {error}",
            hint="install the engines with pip install 'ai-assistant[local]', or use a machine where the daemon runs",
        ) from error
    engine: Engine = open_model(os.fspath(path), LoadOptions(**options))
    return engine


def stream(engine: Engine, request: GenerateRequest, name: str) -> TextStream:
    generation = engine.generate(request)
    return TextStream(generation, generation.cancel, name)


def several(engine: Engine, request: GenerateRequest, n: int) -> list[_wire.Answer]:
    """`n` answers that are made side by side; each with the usage of all."""
    generations: list[Generation] = []
    try:
        for each in seeded(request, n):
            generations.append(engine.generate(each))
        found = [_wire.answer(list(each)) for each in generations]
    except BaseException:
        for each_generation in generations:
            each_generation.cancel()
        raise
    usage = together([each.end.usage for each in found])
    return [replace(each, end=replace(each.end, usage=usage)) for each in found]


async def async_stream(engine: Engine, request: GenerateRequest, name: str) -> AsyncTextStream:
    generation = await asyncio.to_thread(engine.generate, request)
    return AsyncTextStream(_pumped(generation), generation.cancel, name)


async def _pumped(generation: Generation) -> AsyncGenerator[Event]:
    """The events of a generation, whose iteration blocks, read by a thread of their own."""
    loop = asyncio.get_running_loop()
    # Not bounded: the model's context bounds it already, and a full queue would hold up other generations.
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

    def put(item: Event | BaseException | None) -> bool:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, item)
        except RuntimeError:  # the loop has ended, so nobody will read this
            generation.cancel()
            return False
        return True

    def pump(events: Iterator[Event]) -> None:
        try:
            for event in events:
                if not put(event):
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=pump, args=(generation,), name="ai-assistant-generation", daemon=True).start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        generation.cancel()


def load_options(given: Mapping[str, Any]) -> dict[str, int]:
    """The load options that were really given: zero means "choose", so it need not be said."""
    return {key: value for key, value in given.items() if value}
