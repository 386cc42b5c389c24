"""An ONNX model on the devices that a request wishes for: plans, made once and kept, and batches that fit them.

A plan needs fixed shapes, so batches are cut and padded to a few: `LEAST_TOKENS` × 2ⁿ tokens (the model's own length at
most), one row or `ROWS`. What is padded is masked, as in every batch, and cut off again.

A stranger chooses the wish, so what it can cost is bounded: `MAX_PLANS` are kept and `MAX_SETS` sets of devices open;
they live within the memory that the model was given; and making them takes `PLANNING_S` at once and `SHARE` of the time
in the long run, then new ones are `Busy`. Plans that are there go on working.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ai_assistant.engines.allowance import Allowance
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.hetero import PARAM, Wish
from ai_assistant.engines.native import default_threads
from ai_assistant.engines.onnx_file import INT32
from ai_assistant.engines.onnx_package import Member, pread
from ai_assistant.engines.onnx_rules import Plan as Model
from ai_assistant.engines.onnx_session import checked_output
from ai_assistant.engines.trimming import give_back, resident_bytes
from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    Cancelled,
    DeviceLost,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
    Timeout,
)

if TYPE_CHECKING:
    from ai_assistant.hal.graph import Graph
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import OpenDevices
    from ai_assistant.hal.hetero.executor import Executor
    from ai_assistant.hal.hetero.intent import Intent

Array = npt.NDArray[Any]
ROWS = 8
LEAST_TOKENS = 32
MAX_PLANS = 8
MAX_SETS = 3
RUN_S = 120.0
"""How long a batch may take on devices before they count as hung."""
_MEASURE_S = 1.0
"""For measuring operators that are not known yet, of each plan."""
PLAN_BYTES = 64 << 20
"""What a plan takes beside the model: the libraries at the first one, threads, what a device compiled."""
SESSION = "onnxruntime"
"""The device that the engine's own session is on."""
_SESSION_NAMES = (SESSION, f"{SESSION}:CPUExecutionProvider")
_COMPUTES_NOTHING = "null"
Shape = tuple[int, int]
Key = tuple[str, Shape]


@dataclass(eq=False, slots=True)
class Devices:
    """A set of open devices, what is known of their speed, and how many plans use them."""

    names: tuple[str, ...]
    opened: OpenDevices
    costs: CostModel
    plans: int = 0
    retired: bool = False
    closed: bool = False


@dataclass(eq=False, slots=True)
class Ready:
    """A plan that can run, and how many batches use it. Without an executor it is the engine's own session."""

    key: Key
    shape: Shape
    devices: Devices
    executor: Executor | None
    users: int = 0
    retired: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (SESSION,) if self.executor is None else self.executor.plan.devices


@dataclass(slots=True)
class _Kept:
    plans: OrderedDict[Key, Ready] = field(default_factory=OrderedDict)
    sets: OrderedDict[tuple[str, ...], Devices] = field(default_factory=OrderedDict)
    constants: dict[str, Array] = field(default_factory=dict)


def bucket(rows: int, tokens: int, longest: int) -> Shape:
    """The shape of the plan for a batch."""
    wide = max(LEAST_TOKENS, 1 << (tokens - 1).bit_length())
    return (1 if rows == 1 else ROWS), max(tokens, min(wide, longest))


class Divided:
    """The plans of one model.

    Args:
        model: where model.onnx is; its descriptor is duplicated.
        pad: the token that fills.
        needed_bytes: what making a plan takes at most.
        backends: what devices are looked for among; default: those that discovery finds.
    """

    def __init__(
        self,
        model: Member,
        plan: Model,
        options: LoadOptions,
        *,
        pad: int,
        needed_bytes: int,
        backends: Mapping[str, Any] | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        self._file = replace(model, fd=os.dup(model.fd))
        self._seen = _version(self._file.fd)
        self._plan = plan
        self._options = options
        self._pad = pad
        self._needed = needed_bytes
        self._backends = backends
        self._allowance = allowance or Allowance()
        self._kept = _Kept()
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._closed = False
        self._types = {each.name: np.dtype(np.int32 if each.type == INT32 else np.int64) for each in plan.inputs}

    @contextlib.contextmanager
    def lease(self, wish: Wish, rows: int, tokens: int) -> Iterator[Callable[[Mapping[str, Array]], Array] | None]:
        """What computes a batch of that shape as `Session.run` does; None: the session itself.

        Raises:
            InvalidArgument, NotSupported, Busy, OutOfMemory, DeviceLost, BackendFailed, Timeout: see `Divisible`.
        """
        devices = wish.intent.devices
        if wish.off or (devices and all(each in _SESSION_NAMES for each in devices)):
            wish.devices = (SESSION,)
            yield None
            return
        ready = self._ready(wish.intent, bucket(rows, tokens, self._plan.length))
        try:
            if ready.executor is None:
                yield None
            else:
                yield lambda values: self._run(ready, values)
            wish.devices = tuple(dict.fromkeys((*wish.devices, *ready.names)))
        except (BackendFailed, DeviceLost, OutOfMemory, Timeout):
            # The next request begins with new devices.
            self._retire(lambda each: each.devices is ready.devices, ready.devices)
            raise
        finally:
            self._release(ready)

    def drop(self) -> None:
        """Give everything back; what is in use, when it is not any more."""
        self._retire(lambda each: True)
        with self._lock:
            sets = list(self._kept.sets.values())
            for one in sets:
                self._forget(one)
        self._end([], sets)

    def close(self) -> None:
        with self._making, self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._file.fd)
        self.drop()

    @property
    def count(self) -> tuple[int, int]:
        """Plans and sets of devices that are kept."""
        return len(self._kept.plans), len(self._kept.sets)

    # ---- running

    def _run(self, ready: Ready, values: Mapping[str, Array]) -> Array:
        executor = ready.executor
        assert executor is not None
        rows, tokens = values["input_ids"].shape
        high, wide = ready.shape
        parts: list[Array] = []
        running: deque[Any] = deque()
        try:
            for start in range(0, rows, high):
                running.append(executor.submit(self._fitted(values, start, high, wide), RUN_S))
                if len(running) == executor.depth:
                    parts.append(running.popleft().result(RUN_S)[0])
            while running:
                parts.append(running.popleft().result(RUN_S)[0])
        finally:
            for each in running:
                each.cancel()
        found = [checked_output(each.astype(np.float32, copy=False), high, wide, self._plan) for each in parts]
        whole = np.concatenate(found)[:rows]
        return np.ascontiguousarray(whole[:, :tokens] if whole.ndim == 3 else whole)

    def _fitted(self, values: Mapping[str, Array], start: int, high: int, wide: int) -> dict[str, Array]:
        """Some rows of a batch in the plan's shape. Rows that are not there repeat the last: all of them are sound."""
        fitted = {}
        for name, kind in self._types.items():
            part = values[name][start : start + high]
            grown = np.zeros((high, wide), kind)
            if name == "position_ids":
                grown[:] = np.arange(wide)
            elif name == "input_ids":
                grown[:] = self._pad
            grown[: len(part), : part.shape[1]] = part
            grown[len(part) :] = grown[len(part) - 1]
            fitted[name] = grown
        return fitted

    # ---- making

    def _ready(self, intent: Intent, shape: Shape) -> Ready:
        """A plan, with one user more."""
        key = str(intent), shape
        if (found := self._use(key)) is not None:
            return found
        with self._making:
            if (found := self._use(key)) is not None:
                return found
            if self._closed:
                raise Cancelled("the model was closed")
            self._allowance.check()
            begin = self._allowance.clock()
            try:
                ready = self._made(key, intent, shape)
            except AIAssistantError:
                raise
            except MemoryError as error:
                self.drop()
                raise OutOfMemory(
                    "there is no memory left to divide this model", hint=f"leave {PARAM} out", param=PARAM
                ) from error
            except Exception as error:
                raise BackendFailed(f"dividing the model failed: {type(error).__name__}: {str(error)[:300]}") from error
            finally:
                self._allowance.spend(self._allowance.clock() - begin)
            with self._lock:
                ready.users = 1
                self._kept.plans[key] = ready
            self._retire(lambda each: len(self._kept.plans) > MAX_PLANS)
            self._weigh(ready)
            return ready

    def _weigh(self, ready: Ready) -> None:
        """What a device really takes for a plan is known afterwards only."""
        if self._fits(0):
            return
        self._retire(lambda each: each is not ready)
        if not self._fits(0):
            used = resident_bytes()
            self._retire(lambda each: each is ready, ready.devices)
            self._release(ready)
            raise self._too_large(f"takes {used} bytes in all")

    def _use(self, key: Key) -> Ready | None:
        with self._lock:
            found = self._kept.plans.get(key)
            if found is not None:
                self._kept.plans.move_to_end(key)
                found.users += 1
            return found

    def _made(self, key: Key, intent: Intent, shape: Shape) -> Ready:
        from ai_assistant.hal.hetero import planner
        from ai_assistant.hal.hetero.executor import Executor
        from ai_assistant.hal.hetero.intent import Objective

        devices = self._set(intent)
        try:
            names = planner.chosen_devices(devices.opened, intent)
            self._room()
            graph = self._graph(shape)
            if len(names) > 1:
                devices.costs.measure(graph, names, _MEASURE_S)
            plan = planner.plan(graph, devices.opened, intent, costs=devices.costs)
            if len(plan.devices) == 1 and plan.devices[0] in _SESSION_NAMES:
                return Ready(key, shape, devices, None)
            # One batch after the other is computed; of its pieces several may be on their way.
            depth = 0 if intent.objective is Objective.PERFORMANCE else 1
            return Ready(key, shape, devices, Executor(plan, depth=depth))
        except BaseException as error:
            lost = isinstance(error, BackendFailed | DeviceLost | Timeout)
            self._retire(lambda each: lost and each.devices is devices, devices if lost else None)
            self._unhold(devices)
            if isinstance(error, AIAssistantError) and type(error) in (InvalidArgument, NotSupported):
                raise _about(error) from error
            raise

    def _set(self, intent: Intent) -> Devices:
        """The devices that an intent may use, open, and held for one plan more."""
        with self._lock:
            if (found := self._kept.sets.get(intent.devices)) is not None:
                self._kept.sets.move_to_end(intent.devices)
                found.plans += 1
                return found
        for name in intent.devices:
            if name.partition(":")[0] == _COMPUTES_NOTHING:
                raise InvalidArgument(f"the backend {_COMPUTES_NOTHING} computes nothing", param=PARAM)
            if "*" in name:
                raise InvalidArgument("a request cannot choose a number of threads", param=PARAM)
        from ai_assistant.hal.hetero.cost import CostModel
        from ai_assistant.hal.hetero.devices import open_devices

        try:
            opened = open_devices(intent.devices, backends=self._found())
        except (InvalidArgument, NotSupported) as error:
            raise _about(error) from error
        made = Devices(intent.devices, opened, CostModel(opened, folder=_folder()), plans=1)
        with self._lock:
            self._kept.sets[intent.devices] = made
            oldest = next(iter(self._kept.sets.values())) if len(self._kept.sets) > MAX_SETS else None
        if oldest is not None:
            self._retire(lambda each: each.devices is oldest, oldest)
        return made

    def _found(self) -> Mapping[str, Any]:
        if self._backends is not None:
            return self._backends
        from ai_assistant.hal import discovery
        from ai_assistant.hal.backends.onnxruntime import OnnxRuntimeBackend

        own = OnnxRuntimeBackend(threads=self._options.threads or default_threads())
        if not (probe := own.probe()):  # graphs are read with the same libraries, whoever runs them
            raise NotSupported(probe.unavailable, hint=probe.hint, param=PARAM)
        return {**discovery.backends(), own.name: own}

    def _graph(self, shape: Shape) -> Graph:
        from ai_assistant.hal import onnx_graph

        if _version(self._file.fd) != self._seen:
            raise InvalidModel("the model's file was changed after it was loaded", hint="load it again")
        data = pread(self._file.fd, self._file.size, self._file.offset)
        read = onnx_graph.read(data, dict.fromkeys(self._types, shape))
        wanted = [index for index in read.outputs if read.values[index].name == self._plan.output.name[:200]]
        if len(wanted) != 1:
            raise InvalidModel(f"the output {self._plan.output.name[:60]!r} is not there")
        # The plans of all shapes share the weights.
        values = tuple(
            each if each.data is None else replace(each, data=self._shared(each.name, each.data))
            for each in read.values
        )
        return replace(read, values=values, outputs=(wanted[0],))

    def _shared(self, name: str, data: Array) -> Array:
        known = self._kept.constants.setdefault(name, data)
        return known if known.dtype == data.dtype and np.array_equal(known, data) else data

    # ---- giving back

    def _room(self) -> None:
        """Stay within the memory that the model was given.

        Raises:
            OutOfMemory: not even without the other plans.
        """
        if not self._fits(self._needed):
            self._retire(lambda each: True)
            if not self._fits(self._needed):
                raise self._too_large(f"takes up to {self._needed} bytes beside {resident_bytes()}")

    def _fits(self, more: int) -> bool:
        limit = self._options.memory_limit_bytes
        return not limit or resident_bytes() + more <= limit

    def _too_large(self, what: str) -> OutOfMemory:
        limit = self._options.memory_limit_bytes
        return OutOfMemory(f"dividing the model {what}; it was given {limit}", hint=f"leave {PARAM} out", param=PARAM)

    def _release(self, ready: Ready) -> None:
        with self._lock:
            ready.users -= 1
            ended = ready.retired and not ready.users
        if ended:
            self._end([ready], [])

    def _unhold(self, devices: Devices) -> None:
        with self._lock:
            devices.plans -= 1
        self._end([], [devices])

    def _retire(self, which: Callable[[Ready], bool], devices: Devices | None = None) -> None:
        """Forget plans, the longest unused first, and a set of devices; those in use end with their last user.

        Args:
            which: asked of each in turn, while the ones before are gone already.
        """
        with self._lock:
            ended = []
            for key, each in list(self._kept.plans.items()):
                if which(each):
                    del self._kept.plans[key]
                    each.retired = True
                    if not each.users:
                        ended.append(each)
            if not self._kept.plans:
                self._kept.constants.clear()
            if devices is not None:
                self._forget(devices)
        self._end(ended, [] if devices is None else [devices])

    def _forget(self, devices: Devices) -> None:
        if self._kept.sets.get(devices.names) is devices:
            del self._kept.sets[devices.names]
        devices.retired = True

    def _end(self, plans: Sequence[Ready], sets: Sequence[Devices]) -> None:
        """Close plans, and the sets of devices that are forgotten and that nothing uses any more."""
        for each in plans:
            if each.executor is not None:
                with contextlib.suppress(AIAssistantError, OSError):
                    each.executor.close()
                each.executor = None
        with self._lock:
            for each in plans:
                each.devices.plans -= 1
            touched = {id(one): one for one in (*sets, *(each.devices for each in plans))}
            closing = [one for one in touched.values() if one.retired and not one.plans and not one.closed]
            for one in closing:
                one.closed = True
        for one in closing:
            # A backend in a process of its own may not be ended here: a worker may signal nobody.
            with contextlib.suppress(AIAssistantError, OSError):
                one.opened.close()
        if plans or closing:
            give_back()


def _about(error: AIAssistantError) -> AIAssistantError:
    """The same error, about the option that the caller knows."""
    return type(error)(error.message, hint=error.hint, param=PARAM)


def _version(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


def _folder() -> Path:
    """Where measured times are kept, or would be: a worker has no home, and keeps them while it lives."""
    from ai_assistant.hal.hetero.store import default_folder

    try:
        return default_folder()
    except RuntimeError:
        return Path("/nonexistent")
