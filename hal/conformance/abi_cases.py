"""L1 of a shared library: its C ABI, called as a host calls it that is older, newer, or makes mistakes."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ai_assistant.errors import BackendFailed
from ai_assistant.hal.conformance import abi_types as t
from ai_assistant.hal.conformance.case import Cases, expect
from ai_assistant.hal.conformance.subject import Subject

CASES = Cases()
OK, UNAVAILABLE, NOT_SUPPORTED, INVALID_ARGUMENT = 0, 1, 2, 3
MAJOR = 1
SENTINEL = 0x5EA1
CANARY = 0xA5


class Library:
    """The functions of a library, by name.

    Raises:
        BackendFailed: it cannot be loaded, or does not export what it must.
    """

    def __init__(self, subject: Subject) -> None:
        assert subject.path is not None
        self._doing = subject.doing
        try:
            self._library = c.CDLL(str(subject.path.absolute()))
            self.get_api = self._library.ai_hal_get_api
        except (OSError, AttributeError) as error:
            raise BackendFailed(f"the library cannot be used: {error}") from error
        self.get_api.restype, self.get_api.argtypes = c.c_void_p, (c.c_uint32,)
        address = self.get_api(MAJOR)
        if not address:
            raise BackendFailed(f"the library does not speak version {MAJOR} of the contract")
        self.size = int(t.Api.from_address(address).size)
        # Only what is there may be read: a table of 1.0 is smaller than the one of a later host.
        whole = bytearray(c.sizeof(t.Api))
        known = min(self.size, len(whole))
        whole[:known] = c.string_at(address, known)
        self.api = t.Api.from_buffer(whole)

    def __getattr__(self, name: str) -> Any:
        for known, result, arguments in t.FUNCTIONS:
            if known == name:
                return c.CFUNCTYPE(result, *arguments)(getattr(self.api, name))
        raise AttributeError(name)

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function whose last argument is the error. Checks and frees the error."""
        error = c.c_void_p()
        self._doing(f"{name}({', '.join('NULL' if each is None else '…' for each in arguments)})")
        status: int = getattr(self, name)(*arguments, c.byref(error))
        if error.value:
            found = t.Error.from_address(error.value)
            expect(status != OK, f"{name} succeeded, and left an error")
            expect(found.size >= c.sizeof(t.Error), f"the error of {name} is smaller than in 1.0")
            expect(found.code == status, f"the error of {name} has another code than the status {status}")
            expect(found.message, f"the error of {name} has no message")
            self.error_free(error)
        return status

    @contextmanager
    def context(self, args: t.OpenArgs | None = None) -> Iterator[c.c_void_p]:
        held = args or open_args()
        context = c.c_void_p()
        status = self.call("open", c.byref(held), c.byref(context))
        expect(status == OK and context.value, f"the first device does not open: status {status}")
        try:
            yield context
        finally:
            self.close(context)


_alive: list[Any] = []


def _address(thing: Any) -> int:
    """Where a structure is; it stays."""
    _alive.append(thing)
    return c.addressof(thing)


def open_args(minor: int = 0, device: bytes = b"") -> t.OpenArgs:
    host = t.Host(c.sizeof(t.Host), minor, None)
    return t.OpenArgs(c.sizeof(t.OpenArgs), 0, None, _address(host), device)


def _longer(thing: Any, extra: int = 64) -> Any:
    """The same structure as a newer host makes it: with fields at its end that nobody here knows."""
    kind = type(thing)
    longer = type(f"Newer{kind.__name__}", (c.Structure,), {"_fields_": [("old", kind), ("new", c.c_uint8 * extra)]})
    made = longer(thing, (c.c_uint8 * extra)(*([0x7F] * extra)))
    made.old.size = c.sizeof(made)
    return made


@CASES.case("L1.abi.table")
def table(subject: Subject) -> None:
    """The table is whole: sizes, version, name, and every function that is not optional."""
    library = Library(subject)
    api = library.api
    expect(library.size >= t.REQUIRED_SIZE, f"the table has {library.size} bytes, in 1.0 it has {t.REQUIRED_SIZE}")
    expect(api.major == MAJOR, f"the table is of version {api.major}, {MAJOR} was asked for")
    expect(api.name and api.version, "the table has no name or no version")
    missing = [name for name, _, _ in t.FUNCTIONS if name not in t.OPTIONAL and not getattr(api, name)]
    expect(not missing, f"the table has no {', '.join(missing)}")
    expect(library.get_api(MAJOR) == library.get_api(MAJOR), "asking twice gives two tables")


@CASES.case("L1.abi.major")
def major(subject: Subject) -> None:
    """Another major version is not spoken: NULL."""
    library = Library(subject)
    for version in (0, MAJOR + 1, 0x7FFFFFFF, 0xFFFFFFFF):
        expect(not library.get_api(version), f"the library says that it speaks version {version}")


@CASES.case("L1.abi.minor")
def minor(subject: Subject) -> None:
    """Hosts of older and newer minor versions open the device and take memory."""
    library = Library(subject)
    for version, newer in ((0, False), (1, True), (99, True), (0xFFFFFFFF, True)):
        args = open_args(version)
        if newer:
            host = _longer(t.Host(c.sizeof(t.Host), version, None))
            args.host = _address(host)
            longer = _longer(args)
            args = t.OpenArgs.from_address(_address(longer))
        with library.context(args) as context:
            wanted: Any = t.AllocateArgs(c.sizeof(t.AllocateArgs), 0, None, 100, 0)
            given = _longer(wanted) if newer else wanted
            buffer = c.c_void_p()
            status = library.call("allocate", context, c.byref(given), c.byref(buffer))
            expect(status == OK and buffer.value, f"a host of minor version {version} gets no memory: status {status}")
            library.free(context, buffer)


@CASES.case("L1.abi.extensions")
def extensions(subject: Subject) -> None:
    """Extensions that a library does not know are passed over."""
    library = Library(subject)
    last = t.Extension(c.sizeof(t.Extension), 0xDEADBEEF, None)
    first = t.Extension(c.sizeof(t.Extension), 0x7FFFFFFE, _address(last))
    args = open_args()
    args.next = _address(first)
    with library.context(args) as context:
        wanted = t.AllocateArgs(c.sizeof(t.AllocateArgs), 0, _address(first), 64, 0)
        buffer = c.c_void_p()
        expect(library.call("allocate", context, c.byref(wanted), c.byref(buffer)) == OK, "an extension was refused")
        library.free(context, buffer)


def _filled(library: Library, context: c.c_void_p, name: str, kind: Any) -> Any:
    """Have a structure filled that has foreign bytes behind it."""
    room = (c.c_uint8 * (c.sizeof(kind) + 64))(*([CANARY] * (c.sizeof(kind) + 64)))
    c.memset(room, 0, c.sizeof(kind))
    made = kind.from_buffer(room)
    made.size = c.sizeof(kind)
    status = library.call(name, context, c.byref(made))
    expect(status == OK, f"{name} fails: status {status}")
    expect(bytes(room)[c.sizeof(kind) :] == bytes([CANARY]) * 64, f"{name} wrote past the size that it was told")
    return made


@CASES.case("L1.abi.filled")
def filled(subject: Subject) -> None:
    """What the library fills, it fills no further than its size."""
    library = Library(subject)
    with library.context() as context:
        found = _filled(library, context, "capabilities", t.Capabilities)
        expect(found.alignment and not found.alignment & (found.alignment - 1), "the alignment is no power of two")
        expect(found.dtype_count and found.dtypes, "there are no types of elements")
        _filled(library, context, "statistics", t.Statistics)


@CASES.case("L1.abi.size")
def size(subject: Subject) -> None:
    """Structures that are smaller than in 1.0 are the caller's mistake, and refused."""
    library = Library(subject)
    for wrong in (0, 4, 8):
        args = open_args()
        args.size = wrong
        context = c.c_void_p(SENTINEL)
        status = library.call("open", c.byref(args), c.byref(context))
        expect(status == INVALID_ARGUMENT, f"open takes arguments of {wrong} bytes: status {status}")
        expect(context.value == SENTINEL, "open failed, and changed its result")
    with library.context() as context:
        for wrong in (0, 4, 16):
            wanted = t.AllocateArgs(wrong, 0, None, 64, 0)
            buffer = c.c_void_p(SENTINEL)
            status = library.call("allocate", context, c.byref(wanted), c.byref(buffer))
            expect(status == INVALID_ARGUMENT, f"allocate takes arguments of {wrong} bytes: status {status}")
            expect(buffer.value == SENTINEL, "allocate failed, and changed its result")
            for name, kind in (("capabilities", t.Capabilities), ("statistics", t.Statistics)):
                made = kind(wrong)
                status = library.call(name, context, c.byref(made))
                expect(status == INVALID_ARGUMENT, f"{name} fills {wrong} bytes: status {status}")
            program = c.c_void_p(SENTINEL)
            compile_args = t.CompileArgs(wrong, 0, None, None)
            status = library.call("compile", context, c.byref(compile_args), c.byref(program))
            expect(status == INVALID_ARGUMENT, f"compile takes arguments of {wrong} bytes: status {status}")


@CASES.case("L1.abi.null")
def null(subject: Subject) -> None:
    """NULL where something is needed is refused, not crashed upon."""
    library = Library(subject)
    result = c.c_void_p(SENTINEL)
    wanted = t.AllocateArgs(c.sizeof(t.AllocateArgs), 0, None, 64, 0)
    no_graph = t.CompileArgs(c.sizeof(t.CompileArgs), 0, None, None)
    no_program = t.SubmitArgs(c.sizeof(t.SubmitArgs), 0, None, None, None, None, 0, 0)
    with library.context() as context:
        buffer, queue = c.c_void_p(), c.c_void_p()
        expect(library.call("allocate", context, c.byref(wanted), c.byref(buffer)) == OK, "64 bytes cannot be had")
        expect(library.call("queue_create", context, c.byref(queue)) == OK, "there is no queue")
        calls: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("open", (None, c.byref(result))),
            ("open", (c.byref(open_args()), None)),
            ("capabilities", (context, None)),
            ("statistics", (context, None)),
            ("allocate", (context, None, c.byref(result))),
            ("allocate", (context, c.byref(wanted), None)),
            ("copy_in", (context, buffer, 0, None, 1)),
            ("copy_out", (context, buffer, 0, None, 1)),
            ("copy_in", (context, None, 0, c.byref(wanted), 1)),
            ("compile", (context, None, c.byref(result))),
            ("compile", (context, c.byref(no_graph), c.byref(result))),
            ("queue_create", (context, None)),
            ("queue_submit", (queue, None, None)),
            ("queue_submit", (queue, c.byref(no_program), None)),
        )
        for name, arguments in calls:
            status = library.call(name, *arguments)
            place = [str(n) for n, each in enumerate(arguments) if each is None] or ["within"]
            expect(status == INVALID_ARGUMENT, f"{name} with NULL ({', '.join(place)}) gives status {status}")
            expect(result.value == SENTINEL, f"{name} failed, and changed its result")
        library.queue_destroy(queue)
        library.free(context, buffer)


@CASES.case("L1.abi.errors")
def errors(subject: Subject) -> None:
    """A failure says what it is of, and a host that wants no error gets none."""
    library = Library(subject)
    args = open_args(device=b"no such device")
    context = c.c_void_p(SENTINEL)
    error = c.c_void_p()
    status = library.open(c.byref(args), c.byref(context), c.byref(error))
    expect(status == NOT_SUPPORTED, f"a device that does not exist gives status {status}")
    expect(error.value, "a device that does not exist gives no error")
    made = t.Error.from_address(error.value or 0)
    expect(made.code == status, f"the error's code is {made.code}, the status {status}")
    expect(made.message, "the error has no message")
    library.error_free(error)
    expect(library.open(c.byref(args), c.byref(context), None) == NOT_SUPPORTED, "without an error another status")
    expect(context.value == SENTINEL, "open failed, and changed its result")


@CASES.case("L1.abi.outside")
def outside(subject: Subject) -> None:
    """Offsets and sizes whose sum overflows are refused."""
    library = Library(subject)
    with library.context() as context:
        wanted = t.AllocateArgs(c.sizeof(t.AllocateArgs), 0, None, 64, 0)
        buffer = c.c_void_p()
        expect(library.call("allocate", context, c.byref(wanted), c.byref(buffer)) == OK, "64 bytes cannot be had")
        data = (c.c_uint8 * 64)()
        top = (1 << 64) - 1
        for offset, length in ((65, 0), (64, 1), (0, 65), (top, 1), (top - 31, 64), (32, top), (1, top)):
            for name in ("copy_in", "copy_out"):
                status = library.call(name, context, buffer, offset, data, length)
                expect(status == INVALID_ARGUMENT, f"{name} of {length} bytes at {offset} of 64 gives status {status}")
        for size, alignment in ((64, 3), (64, 1 << 63), (top, 0), (top - 8, 64)):
            args = t.AllocateArgs(c.sizeof(t.AllocateArgs), 0, None, size, alignment)
            result = c.c_void_p(SENTINEL)
            status = library.call("allocate", context, c.byref(args), c.byref(result))
            expect(status != OK and result.value == SENTINEL, f"{size} bytes at alignment {alignment} were given")
        library.free(context, buffer)


@CASES.case("L1.abi.probe")
def probe(subject: Subject) -> None:
    """Probing finds devices, or says what is missing."""
    library = Library(subject)
    host = t.Host(c.sizeof(t.Host), 0, None)
    found = c.c_void_p()
    status = library.call("probe", c.byref(host), c.byref(found))
    expect(status in (OK, UNAVAILABLE), f"probing gives status {status}")
    if status == OK:
        devices = t.Devices.from_address(found.value or 0)
        expect(devices.count > 0, "probing succeeds, and finds nothing: that is UNAVAILABLE")
        for number in range(min(devices.count, 64)):
            device = devices.devices[number].contents
            expect(device.size >= c.sizeof(t.Device), "a device is smaller than in 1.0")
            expect(device.id and device.name and device.kind, "a device has no id, name or kind")
        library.devices_free(found)
