"""ai_hal.h 1.0 as the certifier sees it: written from the header alone, so that an error of the adapter cannot hide one
of the library."""

from __future__ import annotations

import ctypes as c
from typing import Any, ClassVar

Fields = list[tuple[str, Any]]


class Host(c.Structure):
    _fields_: ClassVar[Fields] = [("size", c.c_uint32), ("minor", c.c_uint32), ("next", c.c_void_p)]


class Extension(c.Structure):
    _fields_: ClassVar[Fields] = [("size", c.c_uint32), ("type", c.c_uint32), ("next", c.c_void_p)]


class Error(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("code", c.c_int32),
        ("message", c.c_char_p),
        ("hint", c.c_char_p),
    ]


class Device(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("flags", c.c_uint32),
        *((name, c.c_char_p) for name in ("id", "name", "kind", "hal_id")),
    ]


class Devices(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("count", c.c_uint32),
        ("devices", c.POINTER(c.POINTER(Device))),
    ]


class OpenArgs(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("flags", c.c_uint32),
        ("next", c.c_void_p),
        ("host", c.c_void_p),
        ("device", c.c_char_p),
    ]


class Capabilities(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("features", c.c_uint32),
        ("memory_bytes", c.c_uint64),
        *((name, c.c_uint32) for name in ("alignment", "max_queues", "dtype_count", "reserved")),
        ("dtypes", c.c_void_p),
    ]


class AllocateArgs(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("flags", c.c_uint32),
        ("next", c.c_void_p),
        ("nbytes", c.c_uint64),
        ("alignment", c.c_uint64),
    ]


class Statistics(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("reserved", c.c_uint32),
        *((name, c.c_uint64) for name in ("in_use_bytes", "peak_bytes", "allocations", "frees")),
    ]


class CompileArgs(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("flags", c.c_uint32),
        ("next", c.c_void_p),
        ("graph", c.c_void_p),
    ]


class SubmitArgs(c.Structure):
    _fields_: ClassVar[Fields] = [
        ("size", c.c_uint32),
        ("flags", c.c_uint32),
        *((name, c.c_void_p) for name in ("next", "program", "inputs", "outputs")),
        ("input_count", c.c_uint32),
        ("output_count", c.c_uint32),
    ]


_P, _PP = c.c_void_p, c.POINTER(c.c_void_p)
_S, _U32, _U64, _I64 = c.c_int32, c.c_uint32, c.c_uint64, c.c_int64
OPTIONAL = ("map", "import_memory", "program_output_dims", "program_serialize", "program_load", "power")
FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("error_free", None, (_P,)),
    ("probe", _S, (_P, _PP, _PP)),
    ("devices_free", None, (_P,)),
    ("open", _S, (_P, _PP, _PP)),
    ("close", None, (_P,)),
    ("capabilities", _S, (_P, _P, _PP)),
    ("allocate", _S, (_P, _P, _PP, _PP)),
    ("free", None, (_P, _P)),
    ("copy_in", _S, (_P, _P, _U64, _P, _U64, _PP)),
    ("copy_out", _S, (_P, _P, _U64, _P, _U64, _PP)),
    ("statistics", _S, (_P, _P, _PP)),
    ("node_supported", _S, (_P, _P, _U32, _P, _PP)),
    ("compile", _S, (_P, _P, _PP, _PP)),
    ("program_info", _S, (_P, _P, _PP)),
    ("program_free", None, (_P,)),
    ("queue_create", _S, (_P, _PP, _PP)),
    ("queue_submit", _S, (_P, _P, _PP, _PP)),
    ("queue_record", _S, (_P, _PP, _PP)),
    ("queue_wait", _S, (_P, _P, _PP)),
    ("queue_callback", _S, (_P, _P, _P, _PP, _PP)),
    ("queue_synchronize", _S, (_P, _I64, _PP)),
    ("queue_destroy", None, (_P,)),
    ("event_query", _S, (_P,)),
    ("event_wait", _S, (_P, _I64, _PP)),
    ("event_destroy", None, (_P,)),
    ("map", _S, (_P, _P, _PP, _PP)),
    ("import_memory", _S, (_P, _P, _U64, _PP, _PP)),
    ("program_output_dims", _S, (_P, _P, _U32, _U32, _P, _PP)),
    ("program_serialize", _S, (_P, _P, _P, _PP)),
    ("program_load", _S, (_P, _P, _U64, _PP, _PP)),
    ("power", _S, (_P, _P, _PP)),
)


class Api(c.Structure):
    _fields_: ClassVar[Fields] = [
        *((name, c.c_uint32) for name in ("size", "major", "minor", "reserved")),
        ("name", c.c_char_p),
        ("version", c.c_char_p),
        *((name, c.c_void_p) for name, _, _ in FUNCTIONS),
    ]


REQUIRED_SIZE = Api.map.offset
"""The table may end before the first optional function."""
