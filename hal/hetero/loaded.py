"""A plan made ready to run: a program for each part, and buffers and queues for each request in flight."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ai_assistant.errors import AIAssistantError, Cancelled, DeviceLost, InvalidArgument, NotSupported, OutOfMemory
from ai_assistant.hal.contract import Event, Program, Queue, Tensor
from ai_assistant.hal.graph import Array, TensorSpec
from ai_assistant.hal.hetero.plans import Part, Plan
from ai_assistant.hal.hetero.transfer import host_array, shared
from ai_assistant.hal.host import HostQueue

DRAIN_S = 30.0
"""How long a device may take to end what it was given before its queue counts as hung."""


class LostDevice(Exception):
    """A device went away while something was asked of it: no error of the product yet, the executor answers it."""

    def __init__(self, device: str, error: DeviceLost) -> None:
        super().__init__(device)
        self.device = device
        self.error = error


@dataclass(frozen=True, slots=True)
class Stage:
    """A part with its program; values by their index in the whole graph.

    Args:
        fetched: outputs that others need and the host cannot see: they are copied out as soon as they are there.
    """

    part: Part
    program: Program
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    fetched: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Something of a request that a device was given."""

    device: str
    event: Event


@dataclass(slots=True)
class Slot:
    """What one request in flight uses of the devices, and the next one again.

    Args:
        tensors: by value and device. Buffers stay; where both sides are the host's memory, the same bytes have a tensor
            on both.
        uploads: buffers for inputs that a device cannot read where they are.
        adopted: those that are another device's bytes, so that nothing needs to be copied.
        staged: host memory that a value passes on its way out of memory that the host cannot see.
        dirty: something may have failed, or be running still.
    """

    queues: dict[str, Queue]
    tensors: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    uploads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    adopted: set[tuple[int, str]] = field(default_factory=set)
    staged: dict[int, Array] = field(default_factory=dict)
    dirty: bool = False


class Loaded:
    """Programs, queues and buffers of one plan.

    Args:
        depth: requests in flight at most; fewer where a device has fewer queues or no memory for more.

    Raises:
        LostDevice: while it was made ready.
        NotSupported, OutOfMemory, BackendFailed, …: from a device.
    """

    def __init__(self, plan: Plan, depth: int) -> None:
        self.plan = plan
        self._contexts = plan.contexts
        self.stages: list[Stage] = []
        self.slots: list[Slot] = []
        self.in_flight = 0
        self.retired = False
        self._last: dict[int, Event] = {}
        """Of each stage: its end in the request before."""
        self._specs = {index: plan.graph.values[index].spec for index in range(len(plan.graph.values))}
        try:
            for part in plan.parts:
                self.stages.append(self._stage(part))
            self._home = {index: stage.part.device for stage in self.stages for index in stage.outputs}
            for number in range(max(1, depth)):
                try:
                    self.slots.append(self._slot())
                except (NotSupported, OutOfMemory):
                    if not number:
                        raise
                    break
        except BaseException:
            self.close()
            raise

    def _stage(self, part: Part) -> Stage:
        graph, inputs, outputs = self.plan.graph.part(part.nodes, f"{self.plan.graph.name[:60]} part {part.number}")
        with asking(part.device):
            program = self._contexts[part.device].compile(graph)
        fetched: tuple[int, ...] = ()
        if not self._contexts[part.device].capabilities.host_memory:
            users = {node: other.device for other in self.plan.parts for node in other.nodes}
            fetched = tuple(
                index
                for index in outputs
                if any(users.get(node, part.device) != part.device for node in self.plan.graph.consumers.get(index, ()))
            )
        return Stage(part, program, inputs, outputs, fetched)

    def _slot(self) -> Slot:
        slot = Slot({})
        try:
            for device in self.plan.devices:
                with asking(device):
                    slot.queues[device] = self._contexts[device].queue()
            for stage in self.stages:
                for index in stage.outputs:
                    if (spec := self._specs[index]) is not None and spec.static:
                        self._place(slot, index, stage.part.device, spec)
        except BaseException:
            _close(slot)
            raise
        return slot

    def _place(self, slot: Slot, index: int, device: str, spec: TensorSpec) -> Tensor:
        with asking(device):
            found = slot.tensors[index, device] = self._contexts[device].allocator.tensor(spec)
        return found

    # ---- a request

    def start(self, slot: Slot, inputs: Mapping[int, Array], cancelled: Callable[[], bool], steps: list[Step]) -> None:
        """Give everything of a request to the devices; returns at once.

        Args:
            steps: filled with what was submitted, in order: the first of them that fails is to blame.

        Raises:
            LostDevice, AIAssistantError: some of it may have been submitted.
        """
        arrived: set[tuple[int, str]] = set()
        gate = partial(_gate, cancelled)
        ended: dict[int, Event] = {}
        fetched: dict[int, Event] = {}
        for number, stage in enumerate(self.stages):
            device, queue = stage.part.device, slot.queues[stage.part.device]
            with asking(device):
                for source in stage.part.after:
                    if self.stages[source].part.device != device:
                        _await(queue, ended[source])
            given = []
            for index in stage.inputs:
                if index in inputs:
                    given.append(self._input(slot, index, device, inputs[index], arrived))
                else:
                    given.append(self._value(slot, index, device, arrived, fetched, steps))
            with asking(device):
                self._in_turn(number, queue)
                if number:
                    queue.callback(gate)
                outputs = self._outputs(slot, stage, given)
                ended[number] = self._last[number] = queue.submit(stage.program, given, outputs)
            steps.append(Step(device, ended[number]))
            for index in stage.fetched:
                fetched[index] = self._fetch(slot, index, device)
                steps.append(Step(device, fetched[index]))

    def _in_turn(self, number: int, queue: Queue) -> None:
        """Have a stage wait for the same one of the request before, where a thread of the host does the work.

        Threads share a processor: without this the requests in flight end each stage at the same moment, and all wait
        for the next device while this one has nothing to do. The other request's failure is none of this one.
        """
        before = self._last.get(number)
        if before is not None and not before.done and isinstance(queue, HostQueue):
            queue.callback(partial(_over, before))

    def _fetch(self, slot: Slot, index: int, device: str) -> Event:
        """Bring a value into the host's memory, after the part that makes it."""
        tensor = slot.tensors[index, device]
        if index not in slot.staged:
            slot.staged[index] = np.empty(tensor.spec.nbytes, np.uint8)
        copy_out = self._contexts[device].allocator.copy_out
        with asking(device):
            return slot.queues[device].callback(partial(copy_out, tensor.buffer, slot.staged[index], tensor.offset))

    def _input(self, slot: Slot, index: int, device: str, array: Array, arrived: set[tuple[int, str]]) -> Tensor:
        """An input of the request where a device can read it: in place where that is possible."""
        if (index, device) in arrived:
            return slot.tensors[index, device]
        context = self._contexts[device]
        arrived.add((index, device))
        with asking(device):
            if context.capabilities.host_memory:
                try:
                    tensor = slot.tensors[index, device] = context.allocator.adopt(array)
                    return tensor
                except NotSupported:
                    pass
            own = slot.uploads.get((index, device))
            if own is None or own.spec.shape != array.shape:
                spec = TensorSpec(_known(self._specs[index]).dtype, array.shape)
                own = slot.uploads[index, device] = context.allocator.tensor(spec)
            context.allocator.copy_in(own.buffer, array, own.offset)
        slot.tensors[index, device] = own
        return own

    def _value(
        self,
        slot: Slot,
        index: int,
        device: str,
        arrived: set[tuple[int, str]],
        fetched: Mapping[int, Event],
        steps: list[Step],
    ) -> Tensor:
        """A value that a part made, where a device can read it."""
        home = self._home[index]
        if device == home or (index, device) in arrived:
            return slot.tensors[index, device]
        arrived.add((index, device))
        source, target = self._contexts[home], self._contexts[device]
        origin = slot.tensors[index, home]
        there = slot.tensors.get((index, device))
        if there is None:
            with asking(device):
                if (there := shared(source, origin, target)) is not None:
                    slot.adopted.add((index, device))
                else:
                    there = target.allocator.tensor(origin.spec)
                slot.tensors[index, device] = there
        if (index, device) in slot.adopted:
            return there
        if index in fetched:
            data = slot.staged[index]
            with asking(device):
                _await(slot.queues[device], fetched[index])
        else:
            data = host_array(source, origin)
        with asking(device):
            brought = slot.queues[device].callback(partial(target.allocator.copy_in, there.buffer, data, there.offset))
        steps.append(Step(device, brought))
        return there

    def _outputs(self, slot: Slot, stage: Stage, given: Sequence[Tensor]) -> list[Tensor]:
        device = stage.part.device
        found = [slot.tensors.get((index, device)) for index in stage.outputs]
        if all(each is not None and (spec := self._specs[index]) is not None and spec.static
               for index, each in zip(stage.outputs, found, strict=True)):  # fmt: skip
            return [each for each in found if each is not None]
        specs = stage.program.output_specs([tensor.spec for tensor in given])
        made = []
        for index, each, spec in zip(stage.outputs, found, specs, strict=True):
            made.append(each if each is not None and each.spec == spec else self._place(slot, index, device, spec))
        return made

    def outputs(self, slot: Slot, inputs: Mapping[int, Array]) -> list[Array]:
        """Copies of the results, once everything has ended."""
        found: list[Array] = []
        for index in self.plan.graph.outputs:
            constant = self.plan.graph.values[index].data
            if index in inputs:
                found.append(inputs[index].copy())
            elif constant is not None:
                found.append(constant.copy())
            else:
                device = self._home[index]
                with asking(device):
                    found.append(self._contexts[device].allocator.download(slot.tensors[index, device]))
        return found

    def drain(self, slot: Slot) -> bool:
        """Wait until nothing of a slot runs any more, whatever it failed of. Returns whether that worked."""
        calm = True
        for queue in slot.queues.values():
            try:
                queue.synchronize(DRAIN_S)
            except DeviceLost:
                continue
            except AIAssistantError:
                # What failed was told once; a second time it must be quiet.
                try:
                    queue.synchronize(DRAIN_S)
                except AIAssistantError:
                    calm = False
        slot.dirty = False
        return calm

    def close(self) -> None:
        for slot in self.slots:
            _close(slot)
        self.slots.clear()
        for stage in self.stages:
            with contextlib.suppress(AIAssistantError):
                stage.program.close()
        self.stages.clear()


class asking:  # noqa: N801 - used as a keyword; a generator would cost more than the submit it guards
    """Within it a `DeviceLost` becomes `LostDevice` with that device's name."""

    __slots__ = ("_device",)

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DeviceLost):
            raise LostDevice(self._device, error) from error


def _await(queue: Queue, event: Event) -> None:
    try:
        queue.wait(event)
    except (InvalidArgument, NotSupported):
        # A queue that knows only its own backend's events waits on the host.
        queue.callback(event.wait)


def _over(event: Event) -> None:
    with contextlib.suppress(AIAssistantError):
        event.wait()


def _gate(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("the request was cancelled")


def _known(spec: TensorSpec | None) -> TensorSpec:
    if spec is None:
        raise NotSupported("the type of an input is not known")
    return spec


def _close(slot: Slot) -> None:
    for queue in slot.queues.values():
        with contextlib.suppress(AIAssistantError):
            queue.close()
    slot.tensors.clear()
