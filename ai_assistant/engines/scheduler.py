"""Continuous batching: one thread that decodes all running sequences of a model together.

Each step takes one token of every sequence that is generating and fills the rest of the batch with
prompts that wait to be read, so a long prompt never stops the others for longer than one step.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from ai_assistant.engines.contract import Chunk, EngineStats, Event, Finished, FinishReason, TokenLogprob, Usage
from ai_assistant.engines.native import last_messages
from ai_assistant.engines.output import Output
from ai_assistant.engines.sampling import Logits, Sampler, Scratch, logprobs_of
from ai_assistant.engines.vocabulary import Vocabulary
from ai_assistant.errors import AIAssistantError, Busy, Cancelled, InternalError, InvalidModel

MAX_UNREAD = 4096
# After somebody's first token the cores are left alone for a moment: what carries it to the reader (worker, daemon,
# client) would otherwise wait a scheduler's slice, 3–5 ms, behind the threads of the next step. Once per generation.
_HANDOVER_S = 0.001
"""Events that a slow reader may leave behind before its sequence waits for it."""

_WORTH_KEEPING = 16
"""Tokens of a shared prefix below which a slot is as good as any other."""

Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Task:
    """A generation from the scheduler's side. `events` carries Event values and, last, perhaps an error."""

    __slots__ = (
        "cached", "cancelled", "ended", "events", "first", "last_token", "limit", "output", "paused", "produced",
        "prompt", "sampler", "started", "submitted", "top",
    )  # fmt: skip

    def __init__(self, prompt: Tokens, limit: int, sampler: Sampler, output: Output, top: int | None) -> None:
        self.prompt = prompt
        self.limit = limit
        self.sampler = sampler
        self.output = output
        self.top = top
        self.events: queue.SimpleQueue[Event | AIAssistantError] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.cancelled = False
        self.paused = False
        self.produced = 0
        self.cached = 0
        self.last_token = -1
        self.submitted = time.monotonic()
        self.started = 0.0
        self.first = 0.0

    def finish(self, reason: FinishReason) -> None:
        now = time.monotonic()
        rest, calls = self.output.finish()
        if rest:
            self.events.put(Chunk(rest))
        if calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        first = self.first or now
        usage = Usage(
            len(self.prompt), self.produced, self.cached,
            queue_s=self.started - self.submitted, prefill_s=first - self.started, decode_s=now - first,
        )  # fmt: skip
        self.events.put(Finished(reason, usage, calls))
        self.ended.set()
        self.sampler.close()

    def fail(self, error: AIAssistantError) -> None:
        self.sampler.close()
        self.events.put(error)
        self.ended.set()


class _Slot:
    """One sequence of the context: what its cache holds, and the task that uses it."""

    __slots__ = ("cells", "id", "length", "read", "task", "used")

    def __init__(self, number: int, context: int) -> None:
        self.id = number
        self.cells: Tokens = np.zeros(context, dtype=np.int32)
        self.length = 0
        """Tokens in the cache."""
        self.read = 0
        """Tokens of the prompt that are in the cache or in the current batch."""
        self.task: Task | None = None
        self.used = 0.0

    def common(self, prompt: Tokens) -> int:
        """Length of the prefix that the cache and `prompt` share."""
        count = min(self.length, len(prompt))
        different = np.flatnonzero(self.cells[:count] != prompt[:count])
        return int(different[0]) if len(different) else count


class Scheduler:
    """Owns a context and the thread that decodes it.

    Args:
        context: the native context, made for `sequences` sequences of `context_length` tokens each.
        batch_tokens: most tokens per step.
        max_queued: tasks that may wait; more are `Busy`.
    """

    def __init__(
        self,
        lib: Any,
        context: Any,
        vocabulary: Vocabulary,
        *,
        context_length: int,
        sequences: int,
        batch_tokens: int,
        max_queued: int,
    ) -> None:
        self._lib = lib
        self._context = context
        self._memory = lib.llama_get_memory(context)
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._max_queued = max_queued
        self._slots = [_Slot(number, context_length) for number in range(sequences)]
        self._batch = _Batch(lib, batch_tokens)
        self._scratch = Scratch(lib, vocabulary.size)
        self._logits = Logits(lib, context, vocabulary.size)
        self._waiting: deque[Task] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._broken: AIAssistantError | None = None
        self.steps = 0
        """Batches decoded so far."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Queue a task.

        Raises:
            Busy: too many wait already.
        """
        with self._wake:
            if self._broken is not None or self._closing:
                raise self._broken or Cancelled("the model is being unloaded")
            free = sum(each.task is None for each in self._slots)
            if len(self._waiting) >= self._max_queued + free:
                raise Busy(f"{len(self._slots)} generations run and {len(self._waiting)} wait", hint="try again later")
            self._waiting.append(task)
            self._wake.notify()

    def wake(self) -> None:
        """Something changed that the thread must look at: a cancellation, or a reader that caught up."""
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Cancel everything and stop the thread; idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def broken(self) -> bool:
        """The thread has ended, and not because of `close`."""
        return self._broken is not None and not self._closing

    @property
    def running(self) -> int:
        return sum(each.task is not None for each in self._slots)

    def stats(self) -> EngineStats:
        """What goes on, roughly: read without stopping the thread."""
        return EngineStats(
            running=self.running,
            waiting=len(self._waiting),
            sequences=len(self._slots),
            kv_cells=self._context_length * len(self._slots),
            kv_used=sum(each.length for each in self._slots),
        )

    def trim(self) -> int:
        """Nothing yet that the cache's fixed buffer could give back."""
        return 0

    # Everything below runs on the thread alone.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._admit()
                if self._fill():
                    self._decode()
                else:
                    self._wait()
            reason: AIAssistantError = Cancelled("the model was unloaded")
        except AIAssistantError as error:
            reason = error
        except Exception as error:
            reason = InternalError(f"the engine failed: {type(error).__name__}: {error}")
        with self._wake:
            self._broken = reason
            waiting, self._waiting = self._waiting, deque()
        for task in [*waiting, *(each.task for each in self._slots if each.task is not None)]:
            task.fail(reason)

    def _wait(self) -> None:
        with self._wake:
            # Looked at again under the lock, so that nothing that was notified before is lost.
            if self._closing or (self._waiting and self.running < len(self._slots)) or self._is_ready():
                return
            self._wake.wait()

    def _is_ready(self) -> bool:
        for slot in self._slots:
            task = slot.task
            if task is not None and (task.cancelled or not self._must_pause(task)):
                return True
        return any(each.cancelled for each in self._waiting)

    @staticmethod
    def _must_pause(task: Task) -> bool:
        unread = task.events.qsize()
        task.paused = unread > (MAX_UNREAD // 2 if task.paused else MAX_UNREAD)
        return task.paused

    def _admit(self) -> None:
        """Free what was cancelled, and give free slots to those who wait, first come, first served."""
        for slot in self._slots:
            if slot.task is not None and slot.task.cancelled:
                self._release(slot).fail(Cancelled("the generation was cancelled"))
        while self._waiting:
            task = self._waiting[0]
            if task.cancelled:
                with self._wake:
                    self._waiting.popleft()
                task.fail(Cancelled("the generation was cancelled"))
                continue
            free = [each for each in self._slots if each.task is None]
            if not free:
                break
            with self._wake:
                self._waiting.popleft()
            self._start(max(free, key=lambda each: self._fitness(each, task.prompt)), task)
        if len(self._waiting) and any(each.cancelled for each in self._waiting):
            self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [each for each in self._waiting if each.cancelled]
            self._waiting = deque(each for each in self._waiting if not each.cancelled)
        for task in gone:
            task.fail(Cancelled("the generation was cancelled"))

    def _fitness(self, slot: _Slot, prompt: Tokens) -> tuple[int, bool, float]:
        """Which free slot a prompt goes to: the one with the longest shared prefix, if that is worth keeping;
        then one beside a running sequence, since the library decodes neighbours in one pass; then the one
        that was idle longest."""
        common = slot.common(prompt)
        beside = any(each.task is not None and abs(each.id - slot.id) == 1 for each in self._slots)
        return common if common >= _WORTH_KEEPING else 0, beside, -slot.used

    def _start(self, slot: _Slot, task: Task) -> None:
        # At least one token must be decoded to have logits to sample from.
        keep = min(slot.common(task.prompt), len(task.prompt) - 1)
        lib = self._lib
        if slot.length > keep and not lib.llama_memory_seq_rm(self._memory, slot.id, keep, -1):
            # A recurrent state cannot be cut back, only cleared.
            lib.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
            keep = 0
        slot.length = slot.read = task.cached = keep
        slot.task = task
        task.started = time.monotonic()

    def _release(self, slot: _Slot) -> Task:
        task = slot.task
        assert task is not None
        slot.task = None
        slot.used = time.monotonic()
        return task

    def _fill(self) -> bool:
        """Make the next batch; False if there is nothing to decode."""
        batch = self._batch
        batch.clear()
        reading: list[_Slot] = []
        for slot in self._slots:
            task = slot.task
            if task is None:
                continue
            if task.last_token < 0:
                reading.append(slot)
            elif not self._must_pause(task):
                batch.add(slot, task.last_token, slot.length)
        for slot in reading:
            room = batch.room
            if room <= 0:
                break
            assert slot.task is not None
            batch.add_prompt(slot, slot.task.prompt[slot.read : slot.read + room], len(slot.task.prompt))
        return batch.count > 0

    def _decode(self) -> None:
        batch = self._batch
        code = self._lib.llama_decode(self._context, batch.native)
        self.steps += 1
        if code != 0:
            self._recover(code)
            return
        for slot, count in batch.entries:
            at = batch.start_of(slot)
            slot.cells[slot.length : slot.length + count] = batch.tokens[at : at + count]
            slot.length += count
        began = False
        for slot, index in batch.outputs:
            task = slot.task
            assert task is not None
            began = began or task.first == 0.0
            try:
                self._advance(slot, task, index)
            except AIAssistantError as error:
                self._release(slot)
                task.fail(error)
        if began:
            time.sleep(_HANDOVER_S)

    def _advance(self, slot: _Slot, task: Task, index: int) -> None:
        """Sample one token of a sequence, and tell its reader."""
        logits = self._logits.row(index)
        token = task.sampler.choose(logits, self._scratch)
        if task.first == 0.0:
            task.first = time.monotonic()
        vocabulary = self._vocabulary
        if vocabulary.is_end(token):
            self._release(slot)
            task.finish(FinishReason.STOP)
            return
        task.last_token = token
        task.produced += 1
        text = task.output.feed(vocabulary.piece(token))
        extra: tuple[TokenLogprob, ...] = ()
        if task.top is not None:
            extra = (logprobs_of(logits, token, task.top, vocabulary.piece),)
        if text or extra:
            task.events.put(Chunk(text, extra))
        if task.output.stopped or task.output.complete or task.sampler.complete:
            # A complete answer needs no further step in which only an end token would be allowed.
            self._release(slot)
            task.finish(FinishReason.STOP)
        elif task.produced >= task.limit or slot.length >= self._context_length:
            self._release(slot)
            task.finish(FinishReason.LENGTH)

    def _recover(self, code: int) -> None:
        """A decode failed: those in the batch get an error, the caches start anew, the engine goes on."""
        reason = last_messages() or f"code {code}"
        error = InvalidModel(f"the inference library cannot run this model: {reason[:400]}")
        self._lib.llama_memory_clear(self._memory, False)
        for slot in self._slots:
            slot.length = slot.read = 0
            if slot.task is not None:
                self._release(slot).fail(error)


class _Batch:
    """The library's batch over numpy buffers, so that a prompt is copied in one piece."""

    def __init__(self, lib: Any, size: int) -> None:
        self.size = size
        self.count = 0
        self.tokens: Tokens = np.zeros(size, dtype=np.int32)
        self._positions: Tokens = np.zeros(size, dtype=np.int32)
        self._sequences: Tokens = np.zeros(size, dtype=np.int32)
        self._ones: Tokens = np.ones(size, dtype=np.int32)
        self._wanted = np.zeros(size, dtype=np.int8)
        address = self._sequences.ctypes.data
        self._pointers = np.arange(address, address + 4 * size, 4, dtype=np.uint64)
        self._range: Tokens = np.arange(1 << 20, dtype=np.int32) if size > 1 << 16 else np.arange(size, dtype=np.int32)
        native = lib.llama_batch()
        for name, array in (
            ("token", self.tokens), ("pos", self._positions), ("n_seq_id", self._ones), ("seq_id", self._pointers),
            ("logits", self._wanted),
        ):  # fmt: skip
            kind = dict(lib.llama_batch._fields_)[name]
            setattr(native, name, ctypes.cast(array.ctypes.data, kind))
        self.native = native
        self.entries: list[tuple[_Slot, int]] = []
        self.outputs: list[tuple[_Slot, int]] = []
        self._starts: dict[int, int] = {}

    @property
    def room(self) -> int:
        return self.size - self.count

    def clear(self) -> None:
        self.count = 0
        self.entries.clear()
        self.outputs.clear()
        self._starts.clear()

    def start_of(self, slot: _Slot) -> int:
        return self._starts[slot.id]

    def add(self, slot: _Slot, token: int, position: int) -> None:
        at = self.count
        self.tokens[at] = token
        self._positions[at] = position
        self._sequences[at] = slot.id
        self._wanted[at] = 1
        self._starts[slot.id] = at
        self.entries.append((slot, 1))
        self.outputs.append((slot, at))
        self.count = self.native.n_tokens = at + 1

    def add_prompt(self, slot: _Slot, part: Tokens, total: int) -> None:
        """A part of a prompt of `total` tokens; its last token asks for logits."""
        at, count = self.count, len(part)
        end = at + count
        self.tokens[at:end] = part
        self._positions[at:end] = self._range[:count] + slot.length
        self._sequences[at:end] = slot.id
        self._wanted[at:end] = 0
        self._starts[slot.id] = at
        self.entries.append((slot, count))
        slot.read += count
        if slot.read == total:
            self._wanted[end - 1] = 1
            self.outputs.append((slot, end - 1))
        self.count = self.native.n_tokens = end
