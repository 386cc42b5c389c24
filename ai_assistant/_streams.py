"""An answer in the making: an iterator of text that knows the whole answer when it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from ai_assistant._results import Completion, Message
from ai_assistant.engines.contract import Chunk, Event, Finished, FinishReason, TokenLogprob, ToolCall, Usage


class _Collected:
    """What has arrived so far; the base of both streams."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finished: Finished | None = None
        self._closed = False

    def _is_closed(self) -> bool:
        return self._closed

    def _take(self, event: Event) -> str:
        if isinstance(event, Chunk):
            self._logprobs.extend(event.logprobs)
            if event.text:
                self._parts.append(event.text)
            return event.text
        if isinstance(event, Finished):
            self._finished = event
        return ""

    @property
    def text(self) -> str:
        """What has been generated so far."""
        return "".join(self._parts)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while the answer is incomplete, and for ever if it was closed early."""
        return self._finished.reason if self._finished else None

    @property
    def usage(self) -> Usage | None:
        """None while the answer is incomplete."""
        return self._finished.usage if self._finished else None

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Empty while the answer is incomplete."""
        return self._finished.tool_calls if self._finished else ()

    def _end(self) -> Finished:
        return self._finished or Finished(FinishReason.STOP, Usage())

    def _message(self) -> Message:
        end = self._end()
        return Message(
            content=self.text,
            tool_calls=end.tool_calls,
            finish_reason=end.reason,
            usage=end.usage,
            model=self.model,
            logprobs=tuple(self._logprobs),
        )

    def _completion(self) -> Completion:
        end = self._end()
        return Completion(
            self.text, finish_reason=end.reason, usage=end.usage, model=self.model, logprobs=tuple(self._logprobs)
        )


class TextStream(_Collected, Iterator[str]):
    """Pieces of text as they are generated.

    Closing it – by `close`, by leaving its `with` block, or by dropping it – cancels the generation and
    frees its slot. After the last piece `usage`, `finish_reason` and `tool_calls` are set.
    """

    def __init__(self, events: Iterator[Event], cancel: Callable[[], None], model: str) -> None:
        super().__init__(model)
        self._events = events
        self._cancel = cancel

    def __next__(self) -> str:
        while not self._is_closed():
            try:
                event = next(self._events)
            except StopIteration:
                self.close()
                break
            except Exception:
                if self._is_closed():  # by another thread, meanwhile: that is an end, not a failure
                    break
                self.close()
                raise
            except BaseException:
                self.close()
                raise
            if text := self._take(event):
                return text
        raise StopIteration

    def message(self) -> Message:
        """Read to the end and return the whole turn."""
        for _ in self:
            pass
        return self._message()

    def completion(self) -> Completion:
        """Read to the end and return the whole text."""
        for _ in self:
            pass
        return self._completion()

    def close(self) -> None:
        """Cancel if it still runs; idempotent, from any thread."""
        if not self._closed:
            self._closed = True
            self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Late in the interpreter's life anything may already be gone.
        with contextlib.suppress(Exception):
            self.close()


class AsyncTextStream(_Collected, AsyncIterator[str]):
    """The asynchronous twin of `TextStream`."""

    def __init__(self, events: AsyncIterator[Event], cancel: Callable[[], None], model: str) -> None:
        super().__init__(model)
        self._events = events
        self._cancel = cancel

    async def __anext__(self) -> str:
        while not self._is_closed():
            try:
                event = await anext(self._events)
            except StopAsyncIteration:
                self.close()
                break
            except Exception:
                if self._is_closed():  # by another task, meanwhile: that is an end, not a failure
                    break
                self.close()
                raise
            except BaseException:
                self.close()
                raise
            if text := self._take(event):
                return text
        raise StopAsyncIteration

    async def message(self) -> Message:
        """Read to the end and return the whole turn."""
        async for _ in self:
            pass
        return self._message()

    async def completion(self) -> Completion:
        """Read to the end and return the whole text."""
        async for _ in self:
            pass
        return self._completion()

    def close(self) -> None:
        """Cancel if it still runs; idempotent, from the loop's thread."""
        if not self._closed:
            self._closed = True
            self._cancel()

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the loop may be closed by now
            self.close()
