"""Compiled graphs behind the C ABI, and how they are kept."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from collections.abc import Sequence
from ctypes import addressof, byref, c_uint64, c_void_p, sizeof
from typing import Any

from ai_assistant.errors import BackendFailed, InvalidArgument, InvalidModel, NotSupported
from ai_assistant.hal.contract import Program
from ai_assistant.hal.graph import Graph, TensorSpec
from ai_assistant.hal.native import abi
from ai_assistant.hal.native.memory import Opened

MAX_ENDS = 1 << 16
"""No program has more inputs or outputs."""
MAX_BLOB = 1 << 34
_MAGIC = b"AIHALPG1"
_HEAD = struct.Struct("<8s32sI")


class Slots:
    """The arguments of one submission, made once and used again: filling them in is one call."""

    __slots__ = ("_args", "_tensors", "args_at", "error", "error_at", "event", "event_at", "pack", "tensors")

    def __init__(self, program: int, inputs: int, outputs: int) -> None:
        self._tensors = (abi.Tensor * (inputs + outputs or 1))()
        start = addressof(self._tensors)
        self._args = abi.filled(
            abi.SubmitArgs,
            program=program,
            inputs=start,
            outputs=start + inputs * sizeof(abi.Tensor),
            input_count=inputs,
            output_count=outputs,
        )
        self.event, self.error = c_void_p(), c_void_p()
        self.args_at, self.event_at, self.error_at = addressof(self._args), addressof(self.event), addressof(self.error)
        self.tensors = memoryview(self._tensors).cast("B")
        self.pack = struct.Struct(f"={3 * (inputs + outputs)}Q").pack_into


class Compiled:
    """A program of the library: given back when the Program was closed and nobody submits it any more."""

    __slots__ = ("_free", "handle", "opened")

    def __init__(self, opened: Opened, handle: int) -> None:
        self.opened = opened
        self.handle = handle
        self._free = opened.library.function("program_free")
        opened.hold(self)

    def __del__(self) -> None:
        self._free(self.handle)
        self.opened.release(self)


class NativeProgram(Program):
    """Raises BackendFailed: what the library says of it is impossible."""

    def __init__(self, opened: Opened, handle: int, device: str) -> None:
        self.opened = opened
        self.compiled: Compiled | None = Compiled(opened, handle)
        self._device = device
        info = abi.filled(abi.ProgramInfo)
        opened.library.call("program_info", handle, byref(info))
        self.inputs = _specs(info.inputs, info.input_count)
        self.outputs = _specs(info.outputs, info.output_count)
        self.static = all(spec.static for spec in (*self.inputs, *self.outputs))
        self.checks = tuple((spec, spec.nbytes if spec.static else -1) for spec in (*self.inputs, *self.outputs))
        """Each tensor's spec and bytes: inputs, then outputs."""
        self.free_slots: list[Slots] = []

    def slots(self) -> Slots:
        """Raises InvalidArgument: the program was closed."""
        try:
            return self.free_slots.pop()
        except IndexError:
            return Slots(self.handle, len(self.inputs), len(self.outputs))

    @property
    def handle(self) -> int:
        compiled = self.compiled
        if compiled is None:
            raise InvalidArgument("the program was closed")
        return compiled.handle

    def fits(self, graph: Graph) -> None:
        """Raises BackendFailed: the program is not one of that graph."""
        for what, specs, indices in (("input", self.inputs, graph.inputs), ("output", self.outputs, graph.outputs)):
            if len(specs) != len(indices):
                raise BackendFailed(f"the graph has {len(indices)} {what}s, the program says {len(specs)}")
            for number, (spec, index) in enumerate(zip(specs, indices, strict=True)):
                wanted = graph.values[index].spec
                if wanted is not None and not _agree(spec, wanted):
                    raise BackendFailed(f"{what} {number} of the graph is {wanted}, the program says {spec}")

    def output_specs(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        if len(inputs) != len(self.inputs):
            raise InvalidArgument(f"the program has {len(self.inputs)} inputs, {len(inputs)} were given")
        for number, (given, wanted) in enumerate(zip(inputs, self.inputs, strict=True)):
            if given != wanted and not (given.static and _agree(given, wanted)):
                raise InvalidArgument(f"input {number} is {given}, the program wants {wanted}")
        if all(spec.static for spec in self.outputs):
            return self.outputs
        kept = [(ctypes.c_int64 * len(spec.sizes))(*spec.sizes) for spec in inputs]
        specs = (abi.Spec * len(inputs))(
            *(
                abi.Spec(abi.DTYPES[spec.dtype], len(spec.shape), addressof(dims))
                for spec, dims in zip(inputs, kept, strict=True)
            )
        )
        return tuple(self._output(number, specs, len(inputs)) for number in range(len(self.outputs)))

    def _output(self, number: int, inputs: Any, count: int) -> TensorSpec:
        wanted = self.outputs[number]
        if wanted.static:
            return wanted
        dims = (ctypes.c_int64 * abi.MAX_RANK)(*([-1] * abi.MAX_RANK))
        self.opened.library.call("program_output_dims", self.handle, addressof(inputs), count, number, addressof(dims))
        try:
            found = TensorSpec(wanted.dtype, tuple(dims[: len(wanted.shape)]))
        except InvalidModel as error:
            raise BackendFailed(f"the library gives impossible sizes of output {number}: {error.message}") from error
        if not _agree(found, wanted):
            raise BackendFailed(f"the library says that output {number} is {found}, and before that it is {wanted}")
        return found

    def blob(self) -> bytes:
        library = self.opened.library
        size = c_uint64()
        library.call("program_serialize", self.handle, None, byref(size))
        if not 0 < size.value <= MAX_BLOB:
            raise BackendFailed(f"{library.name} says that a program has {size.value} bytes")
        room = ctypes.create_string_buffer(size.value)
        filled = c_uint64(size.value)
        library.call("program_serialize", self.handle, addressof(room), byref(filled))
        if filled.value > size.value:
            raise BackendFailed(f"{library.name} says that it wrote {filled.value} bytes to a room of {size.value}")
        return packed(_origin(self.opened, self._device), room.raw[: filled.value])

    def close(self) -> None:
        self.compiled = None
        self.free_slots.clear()


def load(opened: Opened, device: str, blob: bytes) -> NativeProgram:
    """A program from what `blob` gave.

    Raises:
        InvalidModel: it is damaged. NotSupported: it was made by another library, version or device.
    """
    library = opened.library
    if not library.has("program_load"):
        raise NotSupported(f"the backend {library.name} cannot keep compiled programs")
    payload = unpacked(_origin(opened, device), blob)
    handle = library.handle("program_load", opened.handle, payload, len(payload))
    return NativeProgram(opened, handle, device)


def packed(origin: bytes, payload: bytes) -> bytes:
    """What came of where, with a hash over both."""
    body = origin + payload
    return _HEAD.pack(_MAGIC, hashlib.sha256(body).digest(), len(origin)) + body


def unpacked(origin: bytes, blob: bytes) -> bytes:
    """Raises InvalidModel, NotSupported."""
    if len(blob) < _HEAD.size:
        raise InvalidModel(f"{len(blob)} bytes are no kept program")
    magic, digest, length = _HEAD.unpack_from(blob)
    body = bytes(blob[_HEAD.size :])
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest or length > len(body):
        raise InvalidModel("the kept program is damaged", hint="compile the model again")
    if body[:length] != origin:
        theirs = body[: min(length, 200)].decode("utf-8", "replace")
        raise NotSupported(
            f"the kept program is of another backend, version or device: {theirs}", hint="compile the model again"
        )
    return body[length:]


def _origin(opened: Opened, device: str) -> bytes:
    library = opened.library
    return json.dumps([library.name, library.version, device, abi.MAJOR]).encode()


def _agree(one: TensorSpec, other: TensorSpec) -> bool:
    return (
        one.dtype == other.dtype
        and len(one.shape) == len(other.shape)
        and all(a == b or a is None or b is None for a, b in zip(one.shape, other.shape, strict=True))
    )


def _specs(address: int | None, count: int) -> tuple[TensorSpec, ...]:
    if count > MAX_ENDS:
        raise BackendFailed(f"the library says that a program has {count} inputs or outputs")
    if count and (not address or address % 8):
        raise BackendFailed("the library does not say what a program takes and makes")
    return tuple(_spec(each) for each in (abi.Spec * count).from_address(address)) if address and count else ()


def _spec(spec: Any) -> TensorSpec:
    dtype = abi.DTYPE_OF.get(spec.dtype)
    if dtype is None:
        raise BackendFailed(f"the library says that a program has elements of type {spec.dtype}")
    if spec.rank > abi.MAX_RANK or (spec.rank and (not spec.dims or spec.dims % 8)):
        raise BackendFailed(f"the library says that a program has a tensor of {spec.rank} dimensions")
    sizes = (ctypes.c_int64 * spec.rank).from_address(spec.dims) if spec.rank else ()
    try:
        return TensorSpec(dtype, tuple(None if size == abi.UNKNOWN_SIZE else int(size) for size in sizes))
    except InvalidModel as error:
        raise BackendFailed(f"the library says something impossible of a program: {error.message}") from error
