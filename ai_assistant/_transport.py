"""Where the daemon is, and what it means when it cannot be reached. Shared by both kinds of client."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    InternalError,
    InvalidArgument,
    InvalidModel,
    NoSpace,
    NoSuchModel,
    NotAuthorized,
    ServiceUnavailable,
    Timeout,
)

SOCKET_ENV = "AI_ASSISTANT_SOCKET"
DEFAULT_SOCKET = "/run/ai-assistant/api.sock"

DEFAULT_TIMEOUT_S = 600.0
"""The longest silence, not the longest answer: the first request may have to load a large model."""

START_HINT = "start it with systemctl start ai-assistantd, and see why it stopped with journalctl -u ai-assistantd"
AGAIN_HINT = "it is probably restarting: try again in a moment, and see journalctl -u ai-assistantd if it persists"
GROUP_HINT = "ask an administrator to add you to the group ai-assistant, then log in again"


def socket_path(given: str | os.PathLike[str] | None = None) -> str:
    return os.fspath(given) if given is not None else os.environ.get(SOCKET_ENV) or DEFAULT_SOCKET


def hetero_compute(*given: str | None) -> str | None:
    """What a request says of devices: the first that is given, else what the environment says; None: nothing.

    Raises:
        InvalidArgument: it is not understood.
    """
    from ai_assistant.hal.hetero.intent import VARIABLE, parse

    found = next((each for each in given if each is not None), os.environ.get(VARIABLE) or None)
    if found is not None:
        parse(found)
    return found


def connect_failed(error: Exception, path: str) -> AIAssistantError:
    """What a failed connect() to the API socket means."""
    if isinstance(error, PermissionError):
        return NotAuthorized(f"you may not open {path}", hint=GROUP_HINT)
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return ServiceUnavailable(f"nothing listens on {path}", hint=START_HINT)
    if isinstance(error, TimeoutError | BlockingIOError):
        return Busy(f"the service does not accept connections on {path}", hint="it is overloaded: try again later")
    if isinstance(error, OSError | ValueError):
        why = getattr(error, "strerror", None) or str(error)
        return ServiceUnavailable(f"cannot connect to {path}: {why}", hint=f"is {SOCKET_ENV} right?")
    raise error


def went_away(error: Exception | None = None) -> AIAssistantError:
    """What a connection means that ends or fails before its answer is complete."""
    if isinstance(error, TimeoutError):
        return Timeout("the service did not answer in time", hint="give a longer timeout, or see ai-assistant status")
    return ServiceUnavailable("the service went away in the middle of the request", hint=AGAIN_HINT)


def no_http() -> AIAssistantError:
    return InternalError("what listens there is not the API socket: it does not speak HTTP", hint=f"check {SOCKET_ENV}")


def open_model_file(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading; the caller closes it. A folder with an ONNX model is packed into one file.

    Raises:
        NoSuchModel: there is no such file.
        NotAuthorized: it may not be read.
        InvalidModel: it is a directory, a device, a pipe, or empty.
        InvalidArgument: it is no path at all.
    """
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise NoSuchModel(f"there is no file {_shown(path)}", param="model_path") from error
    except PermissionError as error:
        raise NotAuthorized(f"you may not read {_shown(path)}", hint="check its owner and mode") from error
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidArgument(f"cannot open {_shown(path)}: {why}", param="model_path") from error
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            packed = _packed(path)
            os.close(fd)
            return packed
        if not stat.S_ISREG(found.st_mode):
            raise InvalidModel(f"{_shown(path)} is not a regular file", param="model_path")
        if found.st_size == 0:
            raise InvalidModel(f"{_shown(path)} is empty", hint="was the download cut?", param="model_path")
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises InvalidModel unless it holds an ONNX model; the only models that come as a folder."""
    from ai_assistant.engines.onnx_package import MODEL, files_of

    if MODEL not in files_of(Path(folder)):
        raise InvalidModel(
            f"{_shown(folder)} is a directory",
            hint="name the model file itself, such as model.gguf, or a folder with model.onnx",
            param="model_path",
        )


def _packed(folder: str | os.PathLike[str]) -> int:
    """A folder with an ONNX model as one file without a name, open for reading only."""
    from ai_assistant.engines.onnx_package import pack

    check_folder(folder)
    try:
        with pack(Path(folder)) as file:
            return os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoSpace(
            f"{_shown(folder)} cannot be packed into one file: {error.strerror}", hint="set TMPDIR"
        ) from error


def _shown(path: object) -> str:
    text = os.fspath(path) if isinstance(path, str | Path | os.PathLike) else repr(path)
    text = os.fsdecode(text) if isinstance(text, bytes) else str(text)
    # A path may hold anything but NUL; a message should stay on one line.
    return repr(text)[1:-1][:200]
