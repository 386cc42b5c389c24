"""The native library behind the llama engine: loaded once per process, on first use, on our terms.

Three things must happen in order, and a plain `import llama_cpp` does none of them: the OpenMP spin
count is set before the library is mapped (with as many threads as cores, barriers that spin for long
starve when anybody else wants the CPU: 9 tokens/s instead of 35), the CPU backend that fits this
processor is picked from the plug-ins beside the library, and the library's chatter is kept off stderr.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ai_assistant.errors import InvalidModel, NotSupported
from ai_assistant.hal.ggml import vulkan

SPIN_COUNT = "3000"
_LOG_WARN = 3
_LOG_CONT = 5

_lock = threading.Lock()
_loaded: Any = None
_keep: list[Any] = []
"""Callbacks that C holds a pointer to."""
_messages: deque[str] = deque(maxlen=16)
_last_level = 0


def library() -> Any:
    """The module `llama_cpp.llama_cpp`, ready for use. Every later call returns the same.

    Raises:
        NotSupported: llama-cpp-python is not installed, or its library does not work here.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load()
        return _loaded


def _load() -> Any:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        import llama_cpp.llama_cpp as module
    except ModuleNotFoundError as error:
        raise NotSupported(
            f"running models needs the Python package {error.name}, which is not installed",
            hint="pip install 'ai-assistant[local]', or let the daemon run the model",
        ) from error
    except (OSError, RuntimeError) as error:
        raise NotSupported(f"the native inference library does not load: {error}") from error
    _silence(module)
    _load_backends(module)
    module.llama_backend_init()
    return module


def _silence(module: Any) -> None:
    @module.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _data: Any) -> None:
        global _last_level
        level = _last_level if level == _LOG_CONT else level
        _last_level = level
        if level >= _LOG_WARN:
            _messages.append(text.decode(errors="replace").strip())

    _keep.append(log)
    module.llama_log_set(log, None)


def _load_backends(module: Any) -> None:
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH", "") or Path(module.__file__).parent / "lib")
    ggml = folder / "libggml.so"
    if not ggml.exists():
        return
    handle = ctypes.CDLL(str(ggml))
    if not hasattr(handle, "ggml_backend_load_all_from_path"):
        return
    load = handle.ggml_backend_load_all_from_path
    load.argtypes, load.restype = [ctypes.c_char_p], None
    with vulkan.drivers():
        load(os.fsencode(folder))


def last_messages() -> str:
    """The warnings and errors that the library wrote since the last call, for the journal and for reasons."""
    lines = [each for each in _messages if each]
    _messages.clear()
    return "; ".join(lines)


@contextmanager
def stream_of(fd: int) -> Iterator[int]:
    """A C `FILE *` over an open descriptor, as the library's loader wants it.

    The descriptor is reopened through /proc when that is allowed, so that the position, which all
    copies of a descriptor share, is our own. A worker that runs as another user than the file's
    owner may not; then the position that came with the descriptor is used and reset.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fdopen.argtypes, libc.fdopen.restype = [ctypes.c_int, ctypes.c_char_p], ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        own = os.dup(fd)
    try:
        os.lseek(own, 0, os.SEEK_SET)
        stream = libc.fdopen(own, b"rb")
        if not stream:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        os.close(own)
        raise InvalidModel(f"the model file cannot be read: {error.strerror}") from error
    try:
        yield stream
    finally:
        libc.fclose(stream)


def load_model(fd: int, progress: Callable[[float], None] | None, *, repack: bool = True) -> Any:
    """Map a checked GGUF file's weights. Returns a model pointer for `llama_model_free`.

    Args:
        repack: copy weights into a layout that this processor multiplies faster, at the cost of their size.

    Raises:
        InvalidModel: the library refuses the file; its own words are in the message.
    """
    lib = library()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = repack
    # Never MAP_POPULATE-and-lock: the kernel may drop clean weight pages under pressure.
    parameters.load_mode = getattr(lib, "LLAMA_LOAD_MODE_MMAP", 1)
    if progress is not None:
        parameters.progress_callback = _progress_callback(lib, progress)
    last_messages()
    with stream_of(fd) as stream:
        model = _load_from_stream(lib)(stream, parameters)
    if not model:
        reason = last_messages() or "it does not say why"
        raise InvalidModel(f"the inference library refuses this model: {reason[:600]}")
    return model


def _load_from_stream(lib: Any) -> Any:
    # The module's prototype takes a FILE structure of Python's making; ours is a plain address.
    function = lib._lib["llama_model_load_from_file_ptr"]
    function.argtypes = [ctypes.c_void_p, lib.llama_model_params]
    function.restype = lib.llama_model_load_from_file.restype
    return function


def _progress_callback(lib: Any, progress: Callable[[float], None]) -> Any:
    last = -1.0

    def report(value: float, _data: Any) -> bool:
        nonlocal last
        # The library calls for every tensor; a hundred steps are enough for a person.
        if value - last >= 0.01 or value >= 1.0:
            last = value
            progress(min(max(value, 0.0), 1.0))
        return True

    return lib.llama_progress_callback(report)


def default_threads() -> int:
    """One per physical core that this process may use."""
    cores: set[str] = set()
    allowed = os.sched_getaffinity(0)
    for each in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{each}/topology/thread_siblings_list")
        try:
            cores.add(path.read_text().strip())
        except OSError:
            return max(1, len(allowed))
    return max(1, len(cores))
