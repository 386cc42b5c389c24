"""Runs a plan: requests in flight beside each other, results in the host's memory, and on without a lost device."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from ai_assistant.errors import AIAssistantError, BackendFailed, Cancelled, DeviceLost, InvalidArgument, Timeout
from ai_assistant.hal.graph import Array
from ai_assistant.hal.hetero.loaded import Loaded, LostDevice, Slot, Step
from ai_assistant.hal.hetero.plans import Plan

MAX_DEPTH = 16
_LOG = logging.getLogger(__name__)
Inputs = Sequence[Array] | Mapping[str, Array]


class Run:
    """A request that was submitted. Its inputs must stay as they are until `result` has returned."""

    def __init__(self, executor: Executor, inputs: Mapping[int, Array]) -> None:
        self._executor = executor
        self.inputs = inputs
        self.loaded: Loaded | None = None
        self.slot: Slot | None = None
        self.steps: list[Step] = []
        self._cancelled = False
        self._lock = threading.Lock()
        self._outcome: list[Array] | AIAssistantError | None = None

    @property
    def done(self) -> bool:
        """Nothing of it runs any more, well or not. A device that was lost meanwhile is seen by `result`."""
        return self._outcome is not None or all(step.event.done for step in self.steps)

    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Parts that have not begun do not begin; `result` raises Cancelled. Idempotent, nothing after the end."""
        self._cancelled = True

    def result(self, timeout_s: float | None = None) -> list[Array]:
        """Wait for the outputs of the graph, in its order; they are the caller's own.

        Raises:
            Timeout: not within that time; it goes on, and may be asked again.
            Cancelled
            DeviceLost: a device went away and no other can do its work.
            OutOfMemory, BackendFailed, InvalidArgument, …: what a device failed of.
        """
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            raise Timeout(f"the result is not there within {timeout_s} s")
        try:
            if self._outcome is None:
                try:
                    self._outcome = self._executor.finish(self, end)
                except Timeout as error:
                    if self.slot is not None:
                        raise
                    self._outcome = error
                except AIAssistantError as error:
                    self._outcome = error
            if isinstance(self._outcome, AIAssistantError):
                raise self._outcome
            return self._outcome
        finally:
            self._lock.release()

    def __del__(self) -> None:
        # Nobody asks for the result any more: what it holds is for the next one.
        if getattr(self, "slot", None) is not None:
            self._cancelled = True
            self._executor.abandon(self)


class Executor:
    """Programs, queues and buffers for a plan. Any thread may submit.

    Args:
        depth: requests in flight at once; 0: one more than there are devices at work.
        replans: when a device is lost, divide the graph among those that are left and repeat the request.

    Raises:
        NotSupported, OutOfMemory, DeviceLost, BackendFailed, …: a part cannot be made ready.
    """

    def __init__(self, plan: Plan, *, depth: int = 0, replans: bool = True) -> None:
        if not 0 <= depth <= MAX_DEPTH:
            raise InvalidArgument(f"between 0 and {MAX_DEPTH} requests can be in flight, not {depth}", param="depth")
        self._wanted = depth
        self._replans = replans
        self._lock = threading.Condition()
        self._replanning = threading.Lock()
        self._closed = False
        self._free: deque[Slot] = deque()
        self._loaded: Loaded
        self._specs = plan.graph.input_specs
        self._names = {plan.graph.values[index].name: place for place, index in enumerate(plan.graph.inputs)}
        self._load(plan)

    @property
    def plan(self) -> Plan:
        """The one that is in force: another one after a device was lost."""
        return self._loaded.plan

    @property
    def depth(self) -> int:
        return len(self._loaded.slots)

    def run(self, inputs: Inputs, timeout_s: float | None = None) -> list[Array]:
        """One request: the graph's outputs in their order.

        Args:
            inputs: arrays in the order of the graph's inputs, or by their names.

        Raises: as `submit` and `Run.result`.
        """
        run = self.submit(inputs, timeout_s)
        try:
            return run.result(timeout_s)
        except Timeout:
            run.cancel()
            raise

    def submit(self, inputs: Inputs, timeout_s: float | None = None) -> Run:
        """Begin a request. Waits while as many as `depth` are in flight.

        Raises:
            InvalidArgument: an input has the wrong type, shape or name; or the executor was closed.
            Timeout: all places were taken for so long.
            DeviceLost, …: as `Run.result`.
        """
        run = Run(self, self._checked(inputs))
        end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._begin(run, end)
        return run

    def close(self) -> None:
        """Give everything back but the devices; what was submitted may still be asked for its result. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
            loaded = self._loaded
            loaded.retired = True
            idle = loaded.in_flight == 0
        if idle:
            loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- requests

    def finish(self, run: Run, end: float) -> list[Array]:
        """Wait for a request, repeat it elsewhere if its device went away, and free its place."""
        while True:
            loaded, slot = run.loaded, run.slot
            if loaded is None or slot is None:
                raise Cancelled("the request was given up")
            try:
                for step in run.steps:
                    self._wait(step, end)
                found = loaded.outputs(slot, run.inputs)
                if run.cancelled():
                    raise Cancelled("the request was cancelled")
            except Timeout:
                raise
            except LostDevice as lost:
                self._release(run, dirty=True)
                self._recover(run, loaded, lost, end)
            except AIAssistantError as error:
                self._release(run, dirty=True)
                if run.cancelled() and not isinstance(error, Cancelled):
                    raise Cancelled("the request was cancelled") from error
                raise
            except Exception as error:
                self._release(run, dirty=True)
                raise BackendFailed(f"{type(error).__name__}: {str(error)[:300]}") from error
            else:
                self._release(run, dirty=False)
                return found

    def abandon(self, run: Run) -> None:
        self._release(run, dirty=True)

    def _wait(self, step: Step, end: float) -> None:
        left = None if end == math.inf else max(0.0, end - time.monotonic())
        try:
            step.event.wait(left)
        except DeviceLost as error:
            raise LostDevice(step.device, error) from error
        except Timeout:
            if step.event.done:  # the device's own: the work has failed of it
                raise BackendFailed(f"{step.device} took too long") from None
            raise

    def _begin(self, run: Run, end: float) -> None:
        """Find a place and submit; a device that is lost meanwhile is replaced."""
        while True:
            loaded, slot = self._acquire(end)
            run.loaded, run.slot, run.steps = loaded, slot, []
            try:
                loaded.start(slot, run.inputs, run.cancelled, run.steps)
            except LostDevice as lost:
                self._release(run, dirty=True)
                if run.cancelled():
                    raise Cancelled("the request was cancelled") from lost
                self._replace(loaded, lost)
            except BaseException:
                self._release(run, dirty=True)
                raise
            else:
                return

    def _recover(self, run: Run, loaded: Loaded, lost: LostDevice, end: float) -> None:
        if run.cancelled():
            raise Cancelled("the request was cancelled") from lost
        self._replace(loaded, lost)
        self._begin(run, end)

    def _acquire(self, end: float) -> tuple[Loaded, Slot]:
        with self._lock:
            while not self._closed and not self._free:
                left = None if end == math.inf else end - time.monotonic()
                if left is not None and left <= 0:
                    raise Timeout("as many requests as possible were in flight all the time")
                self._lock.wait(left)
            if self._closed:
                raise InvalidArgument("the executor was closed")
            slot = self._free.popleft()
            loaded = self._loaded
            loaded.in_flight += 1
        if slot.dirty:
            loaded.drain(slot)
        return loaded, slot

    def _release(self, run: Run, *, dirty: bool) -> None:
        loaded, slot = run.loaded, run.slot
        run.loaded = run.slot = None
        run.steps = []
        if loaded is None or slot is None:
            return
        slot.dirty |= dirty
        with self._lock:
            loaded.in_flight -= 1
            last = loaded.retired and loaded.in_flight == 0
            if loaded is self._loaded and not loaded.retired:
                self._free.append(slot)
                self._lock.notify()
        if last:
            loaded.close()

    # ---- plans

    def _load(self, plan: Plan) -> None:
        """Make a plan ready, and put it in force."""
        while True:
            try:
                loaded = Loaded(plan, self._wanted or len(plan.devices) + 1)
                break
            except LostDevice as lost:
                plan = self._without(plan, lost)
        with self._lock:
            old: Loaded | None = getattr(self, "_loaded", None)
            self._loaded = loaded
            self._free = deque(loaded.slots)
            if self._closed:
                loaded.retired = True
            idle = False
            if old is not None:
                old.retired = True
                idle = old.in_flight == 0
            self._lock.notify_all()
        if old is not None and idle:
            old.close()

    def _replace(self, loaded: Loaded, lost: LostDevice) -> None:
        """Put a plan without a lost device in force, unless somebody did already."""
        with self._replanning:
            if self._loaded is loaded:
                self._load(self._without(loaded.plan, lost))

    def _without(self, plan: Plan, lost: LostDevice) -> Plan:
        from ai_assistant.hal.hetero import planner  # it imports this module

        if not self._replans:
            raise lost.error
        left = plan.without(lost.device)
        _LOG.warning("%s was lost (%s); the graph is divided anew", lost.device, lost.error.message)
        if not left:
            raise lost.error
        names = tuple(name for name in planner.chosen_devices(plan.contexts, plan.intent) if name != lost.device)
        # Where none of those that were asked for is left, the others are better than nothing.
        intent = replace(plan.intent, devices=names if plan.intent.devices else ())
        try:
            return planner.plan(plan.graph, left, intent, costs=plan.costs, memory_limits=plan.memory_limits)
        except AIAssistantError as error:
            raise DeviceLost(
                f"{lost.device} was lost, and the others cannot take over: {error.message}", hint=error.hint
            ) from error

    # ---- inputs

    def _checked(self, inputs: Inputs) -> dict[int, Array]:
        indices = self._loaded.plan.graph.inputs
        if isinstance(inputs, Mapping):
            if unknown := [name for name in inputs if name not in self._names]:
                raise InvalidArgument(
                    f"there is no input {str(unknown[0])[:60]!r}", hint=f"there are {', '.join(self._names)[:300]}"
                )
            given = [inputs.get(name) for name in self._names]
        else:
            given = list(inputs)
        if len(given) != len(indices):
            raise InvalidArgument(f"the graph has {len(indices)} inputs, {len(given)} were given", param="inputs")
        found = {}
        for name, index, spec, array in zip(self._names, indices, self._specs, given, strict=True):
            if not isinstance(array, np.ndarray):
                what = "missing" if array is None else f"no array but {type(array).__name__}"
                raise InvalidArgument(f"input {name[:60]!r} is {what}", param="inputs")
            wanted = spec.dtype.numpy
            if array.dtype != wanted or len(array.shape) != len(spec.shape) or any(
                size not in (None, mine) for mine, size in zip(array.shape, spec.shape, strict=True)
            ):  # fmt: skip
                raise InvalidArgument(
                    f"input {name[:60]!r} is {array.dtype}{list(array.shape)}, the graph wants {spec}", param="inputs"
                )
            found[index] = np.ascontiguousarray(array)
        return found
