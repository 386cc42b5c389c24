"""The structures of `include/ai_hal.h`. A test compiles the header and compares every size and offset."""

from __future__ import annotations

from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from enum import IntEnum, IntFlag
from typing import Any

from ai_assistant.hal.graph import DType

MAJOR, MINOR = 1, 1
MAX_STRING = 4096
MAX_RANK = 32
REASON_SIZE = 256
UNKNOWN_SIZE = -1
FOREVER = -1


class Status(IntEnum):
    OK = 0
    UNAVAILABLE = 1
    NOT_SUPPORTED = 2
    INVALID_ARGUMENT = 3
    INVALID_MODEL = 4
    OUT_OF_MEMORY = 5
    DEVICE_LOST = 6
    BUSY = 7
    NOT_AUTHORIZED = 8
    TIMEOUT = 9
    FAILED = 10
    CALLBACK_FAILED = 11


class Feature(IntFlag):
    DYNAMIC_SHAPES = 1
    HOST_MEMORY = 2
    CACHES_PROGRAMS = 4
    READS_POWER = 8


class AttributeType(IntEnum):
    INT = 1
    FLOAT = 2
    STRING = 3
    INTS = 4
    FLOATS = 5
    STRINGS = 6
    TENSOR = 7


DTYPES = {
    DType.F32: 1,
    DType.U8: 2,
    DType.I8: 3,
    DType.U16: 4,
    DType.I16: 5,
    DType.I32: 6,
    DType.I64: 7,
    DType.BOOL: 9,
    DType.F16: 10,
    DType.F64: 11,
    DType.U32: 12,
    DType.U64: 13,
    DType.BF16: 16,
}
"""The numbers of ONNX's TensorProto.DataType."""
DTYPE_OF = {number: dtype for dtype, number in DTYPES.items()}


# Pointers are c_void_p, so that nothing is read through one before it was looked at.
class Error(Structure):
    _fields_ = (("size", c_uint32), ("code", c_int32), ("message", c_void_p), ("hint", c_void_p))


class Host(Structure):
    _fields_ = (("size", c_uint32), ("minor", c_uint32), ("next", c_void_p))


class Device(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("id", c_void_p),
        ("name", c_void_p),
        ("kind", c_void_p),
        ("hal_id", c_void_p),
    )


class Devices(Structure):
    _fields_ = (("size", c_uint32), ("count", c_uint32), ("devices", c_void_p))


class OpenArgs(Structure):
    _fields_ = (("size", c_uint32), ("flags", c_uint32), ("next", c_void_p), ("host", c_void_p), ("device", c_char_p))


class Capabilities(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("features", c_uint32),
        ("memory_bytes", c_uint64),
        ("alignment", c_uint32),
        ("max_queues", c_uint32),
        ("dtype_count", c_uint32),
        ("reserved", c_uint32),
        ("dtypes", c_void_p),
    )


class AllocateArgs(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("next", c_void_p),
        ("nbytes", c_uint64),
        ("alignment", c_uint64),
    )


class Statistics(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("reserved", c_uint32),
        ("in_use_bytes", c_uint64),
        ("peak_bytes", c_uint64),
        ("allocations", c_uint64),
        ("frees", c_uint64),
    )


class Spec(Structure):
    _fields_ = (("dtype", c_int32), ("rank", c_uint32), ("dims", c_void_p))


class Bytes(Structure):
    _fields_ = (("data", c_void_p), ("length", c_uint64))


class Value(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("name", c_char_p),
        ("spec", Spec),
        ("data", c_void_p),
        ("nbytes", c_uint64),
    )


class Attribute(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("type", c_uint32),
        ("name", c_char_p),
        ("count", c_uint64),
        ("ints", c_void_p),
        ("floats", c_void_p),
        ("strings", c_void_p),
        ("tensor", c_void_p),
    )


class Node(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("domain", c_char_p),
        ("op", c_char_p),
        ("version", c_int64),
        ("name", c_char_p),
        ("input_count", c_uint32),
        ("output_count", c_uint32),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
        ("attribute_count", c_uint64),
        ("attributes", c_void_p),
    )


class Opset(Structure):
    _fields_ = (("domain", c_char_p), ("version", c_int64))


class Graph(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("next", c_void_p),
        ("name", c_char_p),
        ("values", c_void_p),
        ("nodes", c_void_p),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
        ("opsets", c_void_p),
        ("value_count", c_uint32),
        ("node_count", c_uint32),
        ("input_count", c_uint32),
        ("output_count", c_uint32),
        ("opset_count", c_uint32),
        ("reserved", c_uint32),
    )


class Support(Structure):
    _fields_ = (("size", c_uint32), ("supported", c_uint32), ("reason", c_char * REASON_SIZE))


class CompileArgs(Structure):
    _fields_ = (("size", c_uint32), ("flags", c_uint32), ("next", c_void_p), ("graph", POINTER(Graph)))


class ProgramInfo(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("reserved", c_uint32),
        ("input_count", c_uint32),
        ("output_count", c_uint32),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
    )


class Tensor(Structure):
    _fields_ = (("buffer", c_void_p), ("offset", c_uint64), ("dims", c_void_p))


class SubmitArgs(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("flags", c_uint32),
        ("next", c_void_p),
        ("program", c_void_p),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
        ("input_count", c_uint32),
        ("output_count", c_uint32),
    )


CALLBACK = CFUNCTYPE(c_int32, c_void_p)
_P, _N = c_void_p, c_uint64
FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("error_free", None, (_P,)),
    ("probe", c_int32, (_P, _P, _P)),
    ("devices_free", None, (_P,)),
    ("open", c_int32, (_P, _P, _P)),
    ("close", None, (_P,)),
    ("capabilities", c_int32, (_P, _P, _P)),
    ("allocate", c_int32, (_P, _P, _P, _P)),
    ("free", None, (_P, _P)),
    ("copy_in", c_int32, (_P, _P, _N, _P, _N, _P)),
    ("copy_out", c_int32, (_P, _P, _N, _P, _N, _P)),
    ("statistics", c_int32, (_P, _P, _P)),
    ("node_supported", c_int32, (_P, _P, c_uint32, _P, _P)),
    ("compile", c_int32, (_P, _P, _P, _P)),
    ("program_info", c_int32, (_P, _P, _P)),
    ("program_free", None, (_P,)),
    ("queue_create", c_int32, (_P, _P, _P)),
    ("queue_submit", c_int32, (_P, _P, _P, _P)),
    ("queue_record", c_int32, (_P, _P, _P)),
    ("queue_wait", c_int32, (_P, _P, _P)),
    ("queue_callback", c_int32, (_P, CALLBACK, _P, _P, _P)),
    ("queue_synchronize", c_int32, (_P, c_int64, _P)),
    ("queue_destroy", None, (_P,)),
    ("event_query", c_int32, (_P,)),
    ("event_wait", c_int32, (_P, c_int64, _P)),
    ("event_destroy", None, (_P,)),
    # From here on a library may leave a function out.
    ("map", c_int32, (_P, _P, _P, _P)),
    ("import_memory", c_int32, (_P, _P, _N, _P, _P)),
    ("program_output_dims", c_int32, (_P, _P, c_uint32, c_uint32, _P, _P)),
    ("program_serialize", c_int32, (_P, _P, _P, _P)),
    ("program_load", c_int32, (_P, _P, _N, _P, _P)),
    ("power", c_int32, (_P, POINTER(c_double), _P)),
    # Since 1.1.
    ("event_fd", c_int32, (_P, POINTER(c_int32), _P)),
)
"""The table's functions in order: name, result, arguments. Every pointer to a pointer is passed as an address."""
OPTIONAL = "map"
"""The first one that may be missing."""


class Api(Structure):
    _fields_ = (
        ("size", c_uint32),
        ("major", c_uint32),
        ("minor", c_uint32),
        ("reserved", c_uint32),
        ("name", c_void_p),
        ("version", c_void_p),
        *((name, c_void_p) for name, _, _ in FUNCTIONS),
    )


LEAST_API = getattr(Api, OPTIONAL).offset
MOST_API = 1 << 16
"""No table is larger, however much was added."""


def filled(kind: Any, **fields: Any) -> Any:
    """A structure with its size set."""
    return kind(size=sizeof(kind), **fields)
