"""A shared library with the HAL's C ABI: loaded, asked for its version, and called."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from ctypes import byref, c_void_p, sizeof
from pathlib import Path
from typing import Any

from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    Busy,
    DeviceLost,
    InvalidArgument,
    InvalidModel,
    NotAuthorized,
    NotSupported,
    OutOfMemory,
    Timeout,
)
from ai_assistant.hal.native import abi
from ai_assistant.hal.native.abi import Status

ERRORS: dict[int, type[AIAssistantError]] = {
    Status.UNAVAILABLE: NotSupported,
    Status.NOT_SUPPORTED: NotSupported,
    Status.INVALID_ARGUMENT: InvalidArgument,
    Status.INVALID_MODEL: InvalidModel,
    Status.OUT_OF_MEMORY: OutOfMemory,
    Status.DEVICE_LOST: DeviceLost,
    Status.BUSY: Busy,
    Status.NOT_AUTHORIZED: NotAuthorized,
    Status.TIMEOUT: Timeout,
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_strnlen = _LIBC.strnlen
_strnlen.restype, _strnlen.argtypes = ctypes.c_size_t, (c_void_p, ctypes.c_size_t)
_LOWEST = 4096
"""No pointer into the first page is one."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def text(address: int | None) -> str:
    """A string of a library: "" for NULL; what is no UTF-8 is replaced, what is too long cut, control characters go."""
    if not address or address < _LOWEST:
        return ""
    raw = ctypes.string_at(address, _strnlen(address, abi.MAX_STRING))
    return "".join(each if each.isprintable() else " " for each in raw.decode("utf-8", "replace")).strip()


def structure(kind: Any, address: int | None, what: str) -> Any:
    """A structure of a library.

    Raises:
        BackendFailed: there is none, or it is smaller than in version 1.0.
    """
    if not address or address < _LOWEST or address % 8:
        raise BackendFailed(f"the library gave no {what}")
    if ctypes.c_uint32.from_address(address).value < sizeof(kind):
        raise BackendFailed(f"the library's {what} is smaller than in version 1.0")
    return kind.from_address(address)


class Library:
    """The table of a library, and its name and version.

    Raises:
        NotSupported: the file is no shared library for this machine, or speaks another major version.
        BackendFailed: its table contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._loaded = ctypes.CDLL(str(path.absolute()))
        except (OSError, ValueError) as error:
            raise NotSupported(f"{path.name[:60]} cannot be loaded: {_last(error)}") from error
        try:
            get: Any = self._loaded.ai_hal_get_api
        except AttributeError:
            raise NotSupported(
                f"{path.name[:60]} is no backend: it does not export ai_hal_get_api", hint="see docs/hal-c-abi.md"
            ) from None
        get.restype, get.argtypes = c_void_p, (ctypes.c_uint32,)
        address = get(abi.MAJOR)
        if not address:
            raise NotSupported(
                f"{path.name[:60]} does not speak version {abi.MAJOR} of the contract",
                hint="get the vendor's library for this version of AI Assistant OS",
            )
        self._read(address)

    def _read(self, address: int) -> None:
        name = self.path.name[:60]
        if address < _LOWEST or address % 8:
            raise BackendFailed(f"{name} gave a table that is none")
        size, major, minor = (ctypes.c_uint32 * 3).from_address(address)
        if major != abi.MAJOR:
            raise BackendFailed(f"{name} was asked for version {abi.MAJOR} and says that it speaks {major}")
        if not abi.LEAST_API <= size <= abi.MOST_API or size % 8:
            raise BackendFailed(f"{name} says that its table has {size} bytes; from {abi.LEAST_API} are right")
        table = abi.Api()
        ctypes.memmove(byref(table), address, min(size, sizeof(table)))
        self.minor: int = min(minor, abi.MINOR)
        self.name, self.version = text(table.name), text(table.version)[:64]
        if not _NAME.fullmatch(self.name):
            raise BackendFailed(f"{name} has no name of lower-case letters, digits and hyphens: {self.name[:60]!r}")
        if not self.version:
            raise BackendFailed(f"{name} has no version")
        optional = False
        self._functions: dict[str, Any] = {}
        for function, result, arguments in abi.FUNCTIONS:
            optional = optional or function == abi.OPTIONAL
            pointer = getattr(table, function)
            if pointer:
                self._functions[function] = ctypes.CFUNCTYPE(result, *arguments)(pointer)
            elif not optional:
                raise BackendFailed(f"{name} has no function {function}")
        self.host = abi.filled(abi.Host, minor=abi.MINOR)

    def has(self, function: str) -> bool:
        return function in self._functions

    def function(self, name: str) -> Callable[..., Any]:
        """Raises NotSupported: this library does not have it."""
        try:
            found: Callable[..., Any] = self._functions[name]
        except KeyError:
            raise NotSupported(f"the backend {self.name} has no {name}") from None
        return found

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function whose last argument is where its error goes.

        Raises:
            NotSupported, OutOfMemory, …: what the library says; BackendFailed for a status that has no meaning.
        """
        function = self.function(name)
        error = c_void_p()
        status = function(*arguments, byref(error))
        if status or error.value:
            self.check(status, error.value, name)

    def check(self, status: int, error: int | None, name: str) -> None:
        """Raises what a status and an error object say; the object is given back."""
        message, hint = self._told(error)
        if status == Status.OK:
            return
        kind = ERRORS.get(status, BackendFailed)
        if not message:
            message = f"{self.name} failed in {name} with status {status}, and did not say why"
        raised = kind(message[:500], hint=hint[:500])
        raised.__dict__["status"] = status
        raise raised

    def _told(self, error: int | None) -> tuple[str, str]:
        if not error:
            return "", ""
        try:
            found = structure(abi.Error, error, "error")
        except BackendFailed:
            return "", ""  # That is not given back either: who knows what it is.
        told = text(found.message), text(found.hint)
        self._functions["error_free"](error)
        return told

    def handle(self, name: str, *arguments: Any) -> int:
        """Call a function that makes something: its last argument but one is where that goes.

        Raises:
            BackendFailed: it said that all is well and gave nothing.
        """
        made = c_void_p()
        self.call(name, *arguments, byref(made))
        if not made.value:
            raise BackendFailed(f"{self.name} said that {name} went well, and gave nothing")
        return made.value


def status_of(error: AIAssistantError) -> int:
    """The status that an error of `Library.call` came of."""
    found: int = error.__dict__.get("status", Status.FAILED)
    return found


def _last(error: Exception) -> str:
    return str(error).rsplit(":", 1)[-1].strip()[:200] or type(error).__name__
