"""What a backend is: the five things that a vendor implements. docs/hal.md is the specification.

    Backend ── probe() → Probe             which of its devices are here, or why none is
       └─ open(device) → Context
            ├─ allocator: Allocator        memory: allocate, copy, view, count
            ├─ supports(node, graph)       the operator registry: yes, or why not
            ├─ compile(graph) → Program    blob() keeps it, load(blob) takes it back
            └─ queue() → Queue             submit(program, inputs, outputs) → Event, in order

Everything may be called from any thread; one queue runs its work in order, several run beside each other.
Errors are `ai_assistant.errors`: NotSupported (cannot, ever), OutOfMemory, InvalidArgument (the caller's mistake),
DeviceLost (the device went away: go on elsewhere), BackendFailed (a defect of the backend or its driver).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from ai_assistant.errors import NotSupported
from ai_assistant.hal.graph import Array, DType, Graph, Node, TensorSpec
from ai_assistant.hal.operators import Support

CONTRACT_VERSION = (1, 1)
"""Major: incompatible. Minor: something was added at the end."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can.

    Args:
        memory_bytes: what the allocator can give in all; 0: not known.
        alignment: of buffers, bytes, a power of two.
        dynamic_shapes: programs take inputs of any size where their spec says None.
        host_memory: buffers can be viewed by the host without a copy, and the host's memory adopted.
        caches_programs: a program can be kept as bytes.
        reads_power: `Context.power_w` measures.
        max_queues: how many queues work beside each other; 0: any number.
    """

    dtypes: frozenset[DType]
    memory_bytes: int = 0
    alignment: int = 64
    dynamic_shapes: bool = False
    host_memory: bool = True
    caches_programs: bool = False
    reads_power: bool = False
    max_queues: int = 0


@dataclass(frozen=True, slots=True)
class BackendDevice:
    """A device as its backend names it.

    Args:
        id: what `Backend.open` takes.
        hal_id: the id of the detected device (`hal.device.Device.id`) that this is, where that is known.
    """

    id: str
    name: str
    kind: str
    hal_id: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a backend found. Unavailable is no error: it says what is missing and what helps."""

    devices: tuple[BackendDevice, ...] = ()
    unavailable: str = ""
    hint: str = ""

    def __bool__(self) -> bool:
        return bool(self.devices)


@dataclass(frozen=True, slots=True)
class AllocatorStatistics:
    """Bytes in use and at most in use, and how often memory was taken and given back."""

    in_use_bytes: int
    peak_bytes: int
    allocations: int
    frees: int


class Buffer(ABC):
    """Memory of a device. Freed by its allocator, or by itself when nobody refers to it any more."""

    nbytes: int

    @property
    @abstractmethod
    def allocator(self) -> Allocator: ...

    def free(self) -> None:
        self.allocator.free(self)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A place in a buffer with a type and a shape. Crosses to NumPy, PyTorch and others by DLPack without a copy."""

    buffer: Buffer
    spec: TensorSpec
    offset: int = 0

    def numpy(self) -> Array:
        """The same memory as an array. Raises NotSupported: it is out of the host's reach."""
        return self.buffer.allocator.view(self)

    def __dlpack__(self, **options: Any) -> Any:
        array: Any = self.numpy()
        return array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.numpy().__dlpack_device__()
        return device


class Allocator(ABC):
    """A device's memory."""

    @abstractmethod
    def allocate(self, nbytes: int, alignment: int = 0) -> Buffer:
        """Take memory; its contents are undefined. 0 bytes are allowed.

        Args:
            alignment: a power of two; 0 means the device's own.

        Raises:
            OutOfMemory: with how much was asked for and how much is left.
            InvalidArgument: a negative size, or an alignment that is none.
        """

    @abstractmethod
    def free(self, buffer: Buffer) -> None:
        """Give memory back; again is no error. Views that are still there keep it until they go."""

    @abstractmethod
    def copy_in(self, buffer: Buffer, data: bytes | bytearray | memoryview | Array, offset: int = 0) -> None:
        """Write bytes to a buffer. Raises InvalidArgument: they do not fit, or the buffer was freed."""

    @abstractmethod
    def copy_out(self, buffer: Buffer, into: bytearray | memoryview | Array, offset: int = 0) -> None:
        """Fill `into` from a buffer. Raises as `copy_in`."""

    @abstractmethod
    def view(self, tensor: Tensor) -> Array:
        """The tensor's memory as an array, without a copy. Raises NotSupported, InvalidArgument."""

    @abstractmethod
    def adopt(self, array: Any) -> Tensor:
        """Use memory of somebody else (anything with DLPack, row-major) without a copy.

        Raises:
            NotSupported: that memory cannot be used by this device.
        """

    @abstractmethod
    def statistics(self) -> AllocatorStatistics: ...

    def tensor(self, spec: TensorSpec) -> Tensor:
        """A new tensor in a buffer of its own."""
        return Tensor(self.allocate(spec.nbytes), spec)

    def upload(self, array: Array) -> Tensor:
        """A new tensor with a copy of an array."""
        array = np.asarray(array, order="C")  # unlike ascontiguousarray it keeps a scalar a scalar
        tensor = self.tensor(TensorSpec(DType.of(array.dtype), array.shape))
        self.copy_in(tensor.buffer, array)
        return tensor

    def download(self, tensor: Tensor) -> Array:
        """A copy of a tensor as an array."""
        array = np.empty(tensor.spec.sizes, tensor.spec.dtype.numpy)
        self.copy_out(tensor.buffer, array, tensor.offset)
        return array


class Event(ABC):
    """The end of something that was submitted."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """It has ended, well or not. Never blocks."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> None:
        """Block until it has ended.

        Raises:
            Timeout: it has not, in that time.
            DeviceLost, BackendFailed, …: what it failed of.
        """

    def fileno(self) -> int:
        """A descriptor that is readable once it has ended, well or not: for `select`, `asyncio` and other loops.

        It is the event's: open as long as that is referred to, and nobody reads from it. Since 1.1.

        Raises:
            NotSupported: this backend has none.
        """
        raise NotSupported("this backend's events have no descriptor", hint="wait for them, or call a function")


class Program(ABC):
    """A compiled graph. May be submitted to any queue of its context, also to several at once."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """What the outputs are when the inputs are these: how large the tensors for `submit` must be.

        Raises:
            InvalidArgument: they do not fit the program.
            NotSupported: the sizes depend on values, not on sizes only.
        """

    def blob(self) -> bytes:
        """The program as bytes for `Context.load`. Raises NotSupported."""
        raise NotSupported("this backend cannot keep compiled programs")

    def close(self) -> None:  # noqa: B027 - most programs hold nothing that must be given back
        """Give back what it holds. Work that was submitted goes on to its end. Idempotent."""


class Queue(ABC):
    """Work in order. What failed fails everything after it, until `synchronize` has told so."""

    @abstractmethod
    def submit(self, program: Program, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Event:
        """Run a program, after what was submitted before. Returns at once.

        The tensors must stay until the event is done, and nobody may write to them meanwhile.

        Raises:
            InvalidArgument: number, type, shape or memory of a tensor does not fit; nothing was submitted.
        """

    @abstractmethod
    def record(self) -> Event:
        """An event that is done when everything before it is."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is submitted from now on waits for an event, also one of another queue. Returns at once."""

    @abstractmethod
    def callback(self, function: Callable[[], None]) -> Event:
        """Call a function of the host in its turn. It must be short; what it raises fails the queue."""

    @abstractmethod
    def synchronize(self, timeout_s: float | None = None) -> None:
        """Block until everything submitted has ended.

        Raises:
            Timeout: it has not, in that time.
            DeviceLost, BackendFailed, …: the first failure since the last call; the queue works again.
        """

    @abstractmethod
    def close(self) -> None:
        """End after what was submitted. Idempotent."""


class Context(ABC):
    """An open device."""

    device: BackendDevice
    capabilities: Capabilities

    @property
    @abstractmethod
    def allocator(self) -> Allocator: ...

    @abstractmethod
    def supports(self, node: Node, graph: Graph) -> Support:
        """Whether a node can be run as part of that graph, with the reason when not."""

    @abstractmethod
    def compile(self, graph: Graph) -> Program:
        """Make a graph ready to run; may take long.

        Raises:
            NotSupported: a node cannot be run: which, and why.
            InvalidModel: the graph contradicts itself.
            OutOfMemory, DeviceLost, BackendFailed
        """

    def load(self, blob: bytes) -> Program:
        """A program from what `Program.blob` gave.

        Raises:
            NotSupported: it is of another backend, device, driver or version: compile again.
            InvalidModel: it is damaged.
        """
        raise NotSupported("this backend cannot keep compiled programs")

    @abstractmethod
    def queue(self) -> Queue:
        """A new queue. Raises NotSupported: there are as many as the device has."""

    def power_w(self) -> float | None:
        """What the device draws now, in watts; None where that is not measured."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Wait for the queues and give everything back. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Backend(ABC):
    """One way to compute: a driver and its runtime. Making one costs nothing and touches no device."""

    name: ClassVar[str]
    version: str = "0"

    @abstractmethod
    def probe(self) -> Probe:
        """Look which devices are here. Never raises for what is merely missing."""

    @abstractmethod
    def open(self, device: str = "") -> Context:
        """Open a device, the first one by default.

        Raises:
            NotSupported: there is none of that name.
            NotAuthorized, Busy, DeviceLost, BackendFailed
        """
