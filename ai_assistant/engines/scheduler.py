"""Continuous batching: one thread that decodes all running sequences of a model together.

Each step takes one token of every sequence that is generating (or several, where they are guessed) and fills
what is left of its time with pieces of the prompts that are being read, all of them alike, so that neither a
long prompt stops the others nor the first of many prompts the rest.
"""

from __future__ import annotations

import threading
import time

from ai_assistant.engines.admission import Line, expected_seconds
from ai_assistant.engines.batch import Batch, Tokens
from ai_assistant.engines.caches import Caches
from ai_assistant.engines.context import Context
from ai_assistant.engines.contract import Chunk, EngineStats, FinishReason, Queued, TokenLogprob
from ai_assistant.engines.native import last_messages
from ai_assistant.engines.placement import WORTH, leader_of, pick
from ai_assistant.engines.rates import Mean, Rate
from ai_assistant.engines.sampling import logprobs_of
from ai_assistant.engines.shares import prompt_parts, step_room
from ai_assistant.engines.speculation import Speculation, first_reach, next_reach
from ai_assistant.engines.spill import SpillStore
from ai_assistant.engines.task import Slot, Task
from ai_assistant.engines.trimming import Wish, resident_bytes
from ai_assistant.engines.vocabulary import Vocabulary
from ai_assistant.errors import AIAssistantError, Busy, Cancelled, InternalError, InvalidModel

__all__ = ["MAX_UNREAD", "Scheduler", "Task"]

MAX_UNREAD = 4096
"""Events that a slow reader may leave behind before its sequence waits for it."""
_HANDOVER_S = 0.001
# After somebody's first token the cores are left alone for a moment: what carries it to the reader (worker, daemon,
# client) would otherwise wait a scheduler's slice, 3–5 ms, behind the threads of the next step. Once per generation.
_TELL_S = 1.0
"""Least time between two things that somebody who waits is told."""
_RATED = 16
"""Prompt tokens from which a step says something about the speed of reading."""


class Scheduler:
    """Owns a context and the thread that decodes it.

    Args:
        context: for `sequences` sequences of `context_length` tokens each; closed by `close`.
        batch_tokens: most tokens per step.
        max_queued: tasks that may wait; more are `Busy`.
        spill: where states of idle conversations go; closed by `close`.
        speculation: guesses tokens ahead; None: nobody does. Closed by `close`.
    """

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        *,
        context_length: int,
        sequences: int,
        batch_tokens: int,
        max_queued: int,
        spill: SpillStore | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._context = context
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._max_queued = max_queued
        self._slots = [Slot(number, context_length) for number in range(sequences)]
        self._spill = SpillStore(0) if spill is None else spill
        self._caches = Caches(context, self._slots, self._spill)
        self._speculation = speculation
        self._batch = Batch(batch_tokens)
        self._entries: list[tuple[Slot, int, int, Tokens | None]] = []
        """Of the batch: slot, index of its first token, tokens, guesses among them."""
        self._line = Line()
        self._wake = threading.Condition()
        self._closing = False
        self._broken: AIAssistantError | None = None
        self._trimming: list[Wish] = []
        self._admitted = 0
        self._running = 0
        self._reading = Rate()
        self._writing = Rate()
        self._answer = Mean()
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
            free = len(self._slots) - self.running
            if len(self._line) >= self._max_queued + free:
                raise Busy(f"{len(self._slots)} generations run and {len(self._line)} wait", hint="try again later")
            self._line.add(task)
            self._wake.notify()

    def wake(self) -> None:
        """Something changed that the thread must look at: a cancellation, or a reader that caught up."""
        with self._wake:
            self._wake.notify()

    def trim(self) -> int:
        """Drop spilled states in memory, and the whole context if nothing runs. Returns bytes freed."""
        wish = Wish()
        with self._wake:
            if self._broken is not None or self._closing:
                return 0
            self._trimming.append(wish)
            self._wake.notify()
        wish.done.wait()
        return wish.freed

    def close(self) -> None:
        """Cancel everything, stop the thread and free the context; idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()
            self._spill.close()
            if self._speculation is not None:
                self._speculation.close()
            self._context.close()

    @property
    def broken(self) -> bool:
        """The thread has ended, and not because of `close`."""
        return self._broken is not None and not self._closing

    @property
    def running(self) -> int:
        return self._running

    def stats(self) -> EngineStats:
        """What goes on, roughly: read without stopping the thread."""
        caches, speculation = self._caches, self._speculation
        return EngineStats(
            running=self.running,
            waiting=len(self._line),
            sequences=len(self._slots),
            kv_cells=self._context_length * len(self._slots),
            kv_used=sum(each.length for each in self._slots),
            kv_untouched_bytes=self._context.untouched_bytes,
            prefix_hits=caches.prefix_hits,
            prefix_tokens=caches.prefix_tokens,
            spilled_bytes=self._spill.size_bytes,
            restored=caches.restored,
            draft_tokens=speculation.drafted if speculation else 0,
            draft_accepted=speculation.accepted if speculation else 0,
            prefill_tokens_per_s=self._reading.per_s,
            decode_tokens_per_s=self._writing.per_s,
        )

    # Everything below runs on the thread alone.

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._trimming:
                    self._trim()
                started = time.perf_counter()
                self._admit()
                if self._fill():
                    self._decode(started)
                else:
                    self._wait()
            reason: AIAssistantError = Cancelled("the model was unloaded")
        except AIAssistantError as error:
            reason = error
        except Exception as error:
            reason = InternalError(f"the engine failed: {type(error).__name__}: {error}")
        with self._wake:
            self._broken = reason
            waiting = self._line.clear()
            wishes, self._trimming = self._trimming, []
        for task in [*waiting, *(each.task for each in self._slots if each.task is not None)]:
            task.fail(reason)
        for wish in wishes:
            wish.done.set()

    def _wait(self) -> None:
        with self._wake:
            # Looked at again under the lock, so that nothing that was notified before is lost.
            if self._closing or self._trimming or (len(self._line) and self.running < len(self._slots)):
                return
            if not self._is_ready():
                self._wake.wait()

    def _is_ready(self) -> bool:
        for slot in self._slots:
            task = slot.task
            if task is not None and (task.cancelled or not self._must_pause(task)):
                return True
        return self._line.any_cancelled

    @staticmethod
    def _must_pause(task: Task) -> bool:
        unread = task.events.qsize()
        task.paused = unread > (MAX_UNREAD // 2 if task.paused else MAX_UNREAD)
        return task.paused

    # Admission

    def _admit(self) -> None:
        """Free what was cancelled, and give free slots to those who wait."""
        for slot in self._slots:
            if slot.task is not None and slot.task.cancelled:
                self._release(slot).fail(Cancelled("the generation was cancelled"))
        if not len(self._line):
            return
        with self._wake:
            gone = self._line.take_cancelled() if self._line.any_cancelled else []
        for task in gone:
            task.fail(Cancelled("the generation was cancelled"))
        while len(self._line) and self.running < len(self._slots):
            with self._wake:
                task = self._line.next()
            self._start(task)
        if len(self._line):
            self._tell()

    def _start(self, task: Task) -> None:
        try:
            self._context.open()
        except AIAssistantError as error:
            task.fail(error)
            return
        self._admitted += 1
        task.order = self._admitted
        slot = pick(self._slots, task.prompt, whole=self._context.whole)
        slot.task = task
        slot.reach = 0
        self._running += 1
        task.started = time.monotonic()
        self._lead(slot, task)

    def _lead(self, slot: Slot, task: Task) -> None:
        """Wait for somebody who reads the same beginning, or take what there is and read on."""
        slot.leader = None
        leader = None if self._context.whole else leader_of(self._slots, task)
        if leader is not None:
            there = max((each.common(task.prompt) for each in self._slots), default=0)
            if leader.tokens >= there + WORTH:
                slot.leader, slot.goal = leader.task, leader.tokens
                return
        task.cached = self._caches.prepare(slot, task.prompt)

    def _follow(self, slot: Slot, task: Task) -> bool:
        """Whether the slot still waits for its leader."""
        for other in self._slots:
            if other.task is slot.leader and other.task is not None and other.task.last_token < 0:
                if (other.length if other.leader is None else 0) < slot.goal:
                    return True
                break
        self._lead(slot, task)
        return slot.leader is not None

    def _tell(self) -> None:
        """Let those who wait know where they stand."""
        now = time.monotonic()
        with self._wake:
            waiting = list(self._line)
        if all(task.told >= 0 and now - task.told_at < _TELL_S for task in waiting):
            return
        starts = expected_seconds(
            waiting, self._slots, reading=self._reading.per_s, writing=self._writing.per_s, usual=self._answer.value
        )
        for position, task in enumerate(waiting):
            if task.told != position and (task.told < 0 or now - task.told_at >= _TELL_S):
                task.told, task.told_at = position, now
                task.events.put(Queued(position, None if starts is None else round(starts[position], 3)))

    def _release(self, slot: Slot) -> Task:
        task = slot.task
        assert task is not None
        slot.task = slot.leader = None
        slot.used = time.monotonic()
        self._running -= 1
        return task

    # A step

    def _fill(self) -> bool:
        """Make the next batch; False if there is nothing to decode."""
        batch = self._batch
        batch.count = 0
        self._entries.clear()
        writing: list[Slot] = []
        reading: list[Slot] = []
        for slot in self._slots:
            task = slot.task
            if task is None:
                continue
            if task.last_token >= 0:
                if not self._must_pause(task):
                    writing.append(slot)
            elif slot.leader is None or not self._follow(slot, task):
                reading.append(slot)
        if not reading:
            guesses = self._guess(writing) if self._speculation is not None and writing else None
            for index, slot in enumerate(writing):
                self._add_writer(slot, None if guesses is None else guesses[index])
        else:
            parts = prompt_parts(reading, step_room(batch.size, len(writing), self._reading.per_s))
            # In the order of their numbers: see Batch.
            for slot in self._slots:
                if slot in parts:
                    self._add_reader(slot, parts[slot])
                elif slot in writing:
                    self._add_writer(slot, None)
        return batch.count > 0

    def _guess(self, writing: list[Slot]) -> list[Tokens] | None:
        room, wanted = self._batch.size // len(writing) - 1, []
        for slot in writing:
            task = slot.task
            assert task is not None
            room = min(
                room, first_reach(slot.reach), task.limit - task.produced - 1, self._context_length - slot.length - 1
            )
            if room < 1:
                return None
            slot.cells[slot.length] = task.last_token
            wanted.append((slot.id, slot.cells[: slot.length + 1]))
        assert self._speculation is not None
        return self._speculation.propose(wanted, room)

    def _add_writer(self, slot: Slot, guesses: Tokens | None) -> None:
        task = slot.task
        assert task is not None
        batch, at = self._batch, slot.length
        slot.cells[at] = task.last_token
        if guesses is None:
            self._entries.append((slot, batch.add(slot.id, task.last_token, at), 1, None))
            return
        count = 1 + len(guesses)
        slot.cells[at + 1 : at + count] = guesses
        index = batch.extend(slot.id, slot.cells[at : at + count], at, count)
        self._entries.append((slot, index, count, guesses))

    def _add_reader(self, slot: Slot, count: int) -> None:
        task = slot.task
        assert task is not None
        at, end = slot.length, slot.length + count
        slot.cells[at:end] = task.prompt[at:end]
        last = end == len(task.prompt)
        self._entries.append((slot, self._batch.extend(slot.id, slot.cells[at:end], at, int(last)), count, None))

    def _decode(self, started: float) -> None:
        code = self._context.decode(self._batch)
        self.steps += 1
        if code != 0:
            self._recover(code)
            return
        began = False
        read = produced = drafted = 0
        for slot, index, count, guesses in self._entries:
            task = slot.task
            assert task is not None
            if task.last_token < 0:
                read += count
                slot.length += count
                if slot.length < len(task.prompt):
                    continue
                began = True
            elif guesses is not None:
                drafted += len(guesses)
                produced += self._check(slot, task, index, guesses)
                continue
            else:
                slot.length += 1
                produced += 1
            self._advance(slot, task, index + count - 1)
        self._measure(time.perf_counter() - started, read, produced, drafted)
        if began:
            time.sleep(_HANDOVER_S)

    def _measure(self, seconds: float, read: int, produced: int, drafted: int) -> None:
        if read >= _RATED:
            self._reading.add(read, seconds)
        if read or not produced:
            return
        self._writing.add(produced, seconds)
        if self._speculation is not None:
            count = len(self._entries)
            if drafted:
                self._speculation.guessed(count, drafted, produced - count, seconds)
            else:
                self._speculation.plain(count, seconds)

    def _check(self, slot: Slot, task: Task, index: int, guesses: Tokens) -> int:
        """Take of the guesses what the sampler chooses as well, and its first other choice. Returns tokens taken."""
        length = slot.length
        taken = 0
        for guess in (*guesses.tolist(), -1):
            slot.length = length + taken + 1
            taken += 1
            going = self._advance(slot, task, index + taken - 1)
            if not going or task.last_token != guess:
                break
        slot.reach = next_reach(slot.reach, len(guesses), taken - 1)
        kept = slot.length
        slot.length = length + 1 + len(guesses)
        self._caches.cut(slot, kept)
        if slot.length < kept and slot.task is not None:
            # A cache that cannot be cut; guessing is not offered for those, so the weights lie about their kind.
            self._release(slot).fail(InvalidModel("the model's cache cannot be cut back"))
        return taken

    def _advance(self, slot: Slot, task: Task, index: int) -> bool:
        """Sample one token of a sequence, and tell its reader. Returns whether it goes on."""
        try:
            logits = self._context.row(index)
            token = task.sampler.choose(logits, self._context.scratch)
            if task.first == 0.0:
                task.first = time.monotonic()
            vocabulary = self._vocabulary
            if not task.ignore_end and vocabulary.is_end(token):
                self._end(slot, FinishReason.STOP)
                return False
            task.last_token = token
            task.produced += 1
            text = task.output.feed(vocabulary.piece(token))
            extra: tuple[TokenLogprob, ...] = ()
            if task.top is not None:
                extra = (logprobs_of(logits, token, task.top, vocabulary.piece),)
        except AIAssistantError as error:
            self._release(slot).fail(error)
            return False
        if text or extra:
            task.events.put(Chunk(text, extra))
        if task.output.stopped or task.output.complete or task.sampler.complete:
            # A complete answer needs no further step in which only an end token would be allowed.
            self._end(slot, FinishReason.STOP)
            return False
        if task.produced >= task.limit or slot.length >= self._context_length:
            self._end(slot, FinishReason.LENGTH)
            return False
        return True

    def _end(self, slot: Slot, reason: FinishReason) -> None:
        task = self._release(slot)
        self._answer.add(task.produced)
        task.finish(reason)

    def _recover(self, code: int) -> None:
        """A decode failed: those in the batch get an error, the caches start anew, the engine goes on."""
        reason = last_messages() or f"code {code}"
        error = InvalidModel(f"the inference library cannot run this model: {reason[:400]}")
        self._context.clear()
        self._caches.forget()
        for slot in self._slots:
            if slot.task is not None:
                self._release(slot).fail(error)

    def _trim(self) -> None:
        with self._wake:
            wishes, self._trimming = self._trimming, []
        before = resident_bytes()
        idle = not self.running and not len(self._line)
        if idle and self._context.is_open:
            self._caches.put_all_aside()
            self._caches.forget()
            self._context.close()
            if self._speculation is not None:
                self._speculation.trim()
        self._spill.clear_memory()
        freed = max(0, before - resident_bytes())
        for wish in wishes:
            wish.freed = freed
            wish.done.set()
