"""An engine in this process, as the streams and coroutines of the SDK."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ai_assistant import _wire
from ai_assistant._results import Ranked, Results, ranked
from ai_assistant._streams import AsyncTextStream, TextStream
from ai_assistant._transport import check_folder, hetero_compute, open_model_file
from ai_assistant.engines.contract import Engine, Event, GenerateRequest, Generation, LoadOptions
from ai_assistant.engines.hetero import Divisible, Wish, honour, reader, told
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


class _Told:
    """A generation whose end says which devices it ran on."""

    def __init__(self, generation: Generation, wish: Wish) -> None:
        self._generation = generation
        self._wish = wish
        self.cancel = generation.cancel

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return told(next(self._generation), self._wish)


def begun(engine: Engine, request: GenerateRequest) -> Generation:
    """A generation; raises NotSupported: its model is not on the devices that the request names."""
    wish = Wish.of(request.hetero_compute)
    if wish is None:
        return engine.generate(request)
    honour(engine, wish)
    return _Told(engine.generate(request), wish)


def wish_of(engine: Engine, *given: str | None) -> Wish | None:
    """What a request that reads texts wishes for.

    Args:
        given: its own, and that of all requests, which like the environment's only counts where it can: a language
            model has been loaded accordingly.
    """
    return Wish.of(hetero_compute(*given) if isinstance(engine, Divisible) else given[0])


def stream(engine: Engine, request: GenerateRequest, name: str) -> TextStream:
    generation = begun(engine, request)
    return TextStream(generation, generation.cancel, name)


def several(engine: Engine, request: GenerateRequest, n: int) -> list[_wire.Answer]:
    """`n` answers that are made side by side; each with the usage of all."""
    generations: list[Generation] = []
    try:
        for each in seeded(request, n):
            generations.append(begun(engine, each))
        found = [_wire.answer(list(each)) for each in generations]
    except BaseException:
        for each_generation in generations:
            each_generation.cancel()
        raise
    usage = together([each.end.usage for each in found])
    return [replace(each, end=replace(each.end, usage=usage)) for each in found]


def embed(engine: Engine, texts: Sequence[str], *wishes: str | None) -> Results[list[float]]:
    """As the method of `InferenceEngine`.

    Args:
        wishes: as for `wish_of`.
    """
    wish = wish_of(engine, *wishes)
    return Results(reader(engine, wish).embed(texts)[0], wish.devices if wish is not None else ())


def rerank(
    engine: Engine, query: str, documents: Sequence[str], top_n: int | None, *wishes: str | None
) -> Results[Ranked]:
    wish = wish_of(engine, *wishes)
    scores = reader(engine, wish).rerank(query, list(documents))[0]
    return Results(ranked(scores, top_n), wish.devices if wish is not None else ())


def classify(engine: Engine, texts: Sequence[str], *wishes: str | None) -> Results[list[tuple[str, float]]]:
    wish = wish_of(engine, *wishes)
    return Results(reader(engine, wish).classify(list(texts))[0], wish.devices if wish is not None else ())


async def async_stream(engine: Engine, request: GenerateRequest, name: str) -> AsyncTextStream:
    generation = await asyncio.to_thread(begun, engine, request)
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


def load_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The load options that were really given: zero means "choose", so it need not be said."""
    return {key: value for key, value in given.items() if value}
