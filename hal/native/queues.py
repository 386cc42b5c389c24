"""Queues and events behind the C ABI. `submit` is the hot path: no structure is made, no array allocated."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import addressof, byref
from typing import Any, ClassVar

from ai_assistant.errors import AIAssistantError, BackendFailed, InvalidArgument, Timeout
from ai_assistant.hal.contract import Event, Program, Queue, Tensor
from ai_assistant.hal.host import check
from ai_assistant.hal.native import abi
from ai_assistant.hal.native.abi import Status
from ai_assistant.hal.native.library import Library, status_of
from ai_assistant.hal.native.memory import Memory, NativeBuffer, Opened
from ai_assistant.hal.native.programs import NativeProgram

SLICE_S = 0.5
"""How long the library is waited in at once, so that Ctrl-C is heard."""


_DESCRIPTORS = threading.Lock()
"""So that no event asks for two."""
_STANDARD = 2
"""The last of those that are everybody's, and would be closed."""


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class Ended:
    """An event of the library, given back when nobody refers to it."""

    __slots__ = ("_destroy", "_query", "fd", "handle", "opened", "over")

    def __init__(self, opened: Opened, handle: int) -> None:
        library = opened.library
        self.opened = opened
        self.handle = handle
        self.over = False
        self.fd = -1
        self._query = library.function("event_query")
        self._destroy = library.function("event_destroy")
        opened.hold(self)

    @property
    def done(self) -> bool:
        if not self.over:
            self.over = self._query(self.handle) == 1
        return self.over

    def descriptor(self) -> int:
        """Raises NotSupported, BackendFailed, …"""
        with _DESCRIPTORS:
            if self.fd < 0:
                library, found = self.opened.library, ctypes.c_int32(-1)
                library.call("event_fd", self.handle, byref(found))
                if found.value <= _STANDARD or not _is_open(found.value):
                    raise BackendFailed(f"{library.name} gave {found.value} as a descriptor")
                self.fd = found.value
            return self.fd

    def __del__(self) -> None:
        self._destroy(self.handle)
        if self.fd >= 0:
            os.close(self.fd)
        self.opened.release(self)


class Running:
    """A queue of the library, and what its work uses until it has ended."""

    in_use: ClassVar[dict[int, deque[tuple[Ended, tuple[Memory, ...]]]]] = {}
    """What the work of each queue uses, by the queue's id. Held from here, since garbage that refers to itself in a
    circle ends in no order, and memory must not go before the queue whose work writes to it."""

    def __init__(self, opened: Opened, handle: int) -> None:
        self.opened = opened
        self.handle = handle
        self.lock = threading.Condition(threading.Lock())
        self.closed = False
        self.inside = 0
        """Calls that block on the queue now."""
        self.failures: list[AIAssistantError] = []
        """What a callback raised, until synchronize has told so."""
        self._calling: list[int] = [0]
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._pending: deque[tuple[Ended, tuple[Memory, ...]]] = deque()
        self.in_use[id(self)] = self._pending
        opened.hold(self)
        self._pruning = threading.Lock()
        self.trampoline = _trampoline(self._callbacks, self.failures, self._calling)
        self._gone = False

    def hold(self, ended: Ended, memories: tuple[Memory, ...]) -> None:
        self._pending.append((ended, memories))
        self.prune()

    def prune(self) -> None:
        """Let go of what was used by work that has ended."""
        pending = self._pending
        if self._pruning.acquire(blocking=False):
            try:
                while pending and pending[0][0].done:
                    pending.popleft()
            finally:
                self._pruning.release()

    def register(self, function: Callable[[], None]) -> int:
        number = next(self._numbers)
        self._callbacks[number] = function
        return number

    def forget(self, number: int) -> None:
        self._callbacks.pop(number, None)

    def told(self) -> None:
        """The failure was told: callbacks that were passed over never come."""
        self.failures.clear()

    def raised(self, error: AIAssistantError) -> AIAssistantError:
        """What a callback raised, in the place of the library's word that one failed."""
        if status_of(error) == Status.CALLBACK_FAILED and self.failures:
            return self.failures[0]
        return error

    def calls_here(self) -> bool:
        """Whether this thread is the queue's own, within a callback."""
        return self._calling[0] == threading.get_ident()

    def finish(self) -> None:
        """Wait for the calls that block on the queue, then destroy it."""
        with self.lock:
            self.lock.wait_for(lambda: not self.inside)
        self.destroy()

    def destroy(self) -> None:
        """End after what was submitted. From a callback of this queue, another thread does it."""
        if self._gone:
            return
        self._gone = True
        if self.calls_here():
            threading.Thread(target=self._destroy, daemon=True).start()
        else:
            self._destroy()

    def _destroy(self) -> None:
        self.opened.library.function("queue_destroy")(self.handle)
        self.in_use.pop(id(self), None)
        self._pending.clear()
        self._callbacks.clear()
        self.opened.release(self)

    def __del__(self) -> None:
        self.destroy()


def _trampoline(callbacks: dict[int, Callable[[], None]], failures: list[AIAssistantError], calling: list[int]) -> Any:
    """The one function that the library calls, on its own thread; `user` is the number of what is meant."""

    def call(user: int | None) -> int:
        function = callbacks.pop(user or 0, None)
        if function is None:
            return Status.CALLBACK_FAILED  # called twice, or with a number that was never given
        calling[0] = threading.get_ident()
        try:
            function()
        except AIAssistantError as error:
            failures.append(error)
            return Status.CALLBACK_FAILED
        except BaseException as error:
            failures.append(BackendFailed(f"{type(error).__name__}: {str(error)[:300]}"))
            return Status.CALLBACK_FAILED
        finally:
            calling[0] = 0
        return Status.OK

    return abi.CALLBACK(call)


class NativeEvent(Event):
    __slots__ = ("_running", "ended")

    def __init__(self, running: Running, ended: Ended) -> None:
        self._running = running
        self.ended = ended

    @property
    def done(self) -> bool:
        return self.ended.done

    def fileno(self) -> int:
        return self.ended.descriptor()

    def wait(self, timeout_s: float | None = None) -> None:
        running, ended = self._running, self.ended
        try:
            _waited(running.opened.library, "event_wait", ended.handle, timeout_s, ended)
        except Timeout:
            raise
        except AIAssistantError as error:
            raise running.raised(error) from error.__cause__
        finally:
            running.prune()


def _waited(library: Library, function: str, handle: int, timeout_s: float | None, ended: Ended | None = None) -> None:
    """Raises Timeout, or what the library says."""
    end = math.inf if timeout_s is None else time.monotonic() + max(0.0, timeout_s)
    while True:
        left = min(SLICE_S, end - time.monotonic())
        over = ended is not None and ended.done
        try:
            library.call(function, handle, max(0, int(left * 1e9)))
            return
        except Timeout:
            if over:  # No wait ended early: the work itself says so.
                raise
            if left < SLICE_S or end <= time.monotonic():
                raise Timeout(f"the device has not finished within {timeout_s} s") from None


class NativeQueue(Queue):
    def __init__(self, opened: Opened, handle: int) -> None:
        self._running = Running(opened, handle)
        self._opened = opened
        self._submit = opened.library.function("queue_submit")

    def submit(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> NativeEvent:
        if not isinstance(program, NativeProgram) or program.opened is not self._opened:
            raise InvalidArgument("the program belongs to another device")
        numbers: list[int] = []
        memories: list[Memory] = []
        tensors = (*inputs, *outputs)
        checks = program.checks
        if len(inputs) != len(program.inputs) or len(tensors) != len(checks):
            check(program, inputs, outputs)
        kept: list[Any] = []
        for tensor, (spec, nbytes) in zip(tensors, checks, strict=True):
            buffer = tensor.buffer
            given, offset = tensor.spec, tensor.offset
            if (given is not spec and given != spec) or not 0 <= offset <= buffer.nbytes - nbytes or nbytes < 0:
                check(program, inputs, outputs)
            if not isinstance(buffer, NativeBuffer) or (memory := buffer.memory) is None:
                raise InvalidArgument("a tensor's buffer was freed, or belongs to another device")
            if memory.opened is not self._opened:
                raise InvalidArgument("a tensor's buffer belongs to another device")
            dims = 0
            if nbytes < 0:
                kept.append((ctypes.c_int64 * len(given.sizes))(*given.sizes))
                dims = addressof(kept[-1])
            numbers += (memory.handle, offset, dims)
            memories.append(memory)
        compiled = program.compiled  # Held until the call is over, also if another thread closes the program.
        if compiled is None:
            raise InvalidArgument("the program was closed")
        slots = program.slots()
        slots.pack(slots.tensors, 0, *numbers)
        slots.event.value = slots.error.value = None
        running = self._running
        with running.lock:
            if running.closed:
                raise InvalidArgument("the queue was closed")
            status = self._submit(running.handle, slots.args_at, slots.event_at, slots.error_at)
        event, error = slots.event.value, slots.error.value
        if program.compiled is not None:
            program.free_slots.append(slots)
        if status or error:
            self._opened.library.check(status, error, "queue_submit")
        return self._event(event, tuple(memories))

    def _event(self, handle: int | None, memories: tuple[Memory, ...] = ()) -> NativeEvent:
        if not handle:
            raise BackendFailed(f"{self._opened.library.name} took work and gave no event")
        ended = Ended(self._opened, handle)
        self._running.hold(ended, memories)
        return NativeEvent(self._running, ended)

    def _locked(self, name: str, *arguments: Any) -> int:
        with self._running.lock:
            if self._running.closed:
                raise InvalidArgument("the queue was closed")
            return self._opened.library.handle(name, self._running.handle, *arguments)

    def record(self) -> NativeEvent:
        return self._event(self._locked("queue_record"))

    def wait(self, event: Event) -> None:
        """An event of another backend is waited for by a function of the host, in its turn."""
        if not isinstance(event, NativeEvent) or event.ended.opened is not self._opened:
            self.callback(event.wait)
            return
        with self._running.lock:
            if self._running.closed:
                raise InvalidArgument("the queue was closed")
            self._opened.library.call("queue_wait", self._running.handle, event.ended.handle)

    def callback(self, function: Callable[[], None]) -> NativeEvent:
        running = self._running
        number = running.register(function)
        try:
            handle = self._locked("queue_callback", running.trampoline, number)
        except BaseException:
            running.forget(number)
            raise
        return self._event(handle)

    def synchronize(self, timeout_s: float | None = None) -> None:
        running = self._running
        with running.lock:
            if running.closed:
                raise InvalidArgument("the queue was closed")
            running.inside += 1
        try:
            _waited(self._opened.library, "queue_synchronize", running.handle, timeout_s)
        except Timeout:
            raise
        except AIAssistantError as error:
            raised = running.raised(error)
            running.told()
            raise raised from error.__cause__
        finally:
            running.prune()
            with running.lock:
                running.inside -= 1
                running.lock.notify_all()

    def close(self) -> None:
        running = self._running
        with running.lock:
            running.closed = True
        if running.calls_here():
            # A callback of this queue closes it: whoever waits for that callback would never get out.
            threading.Thread(target=running.finish, daemon=True).start()
        else:
            running.finish()
