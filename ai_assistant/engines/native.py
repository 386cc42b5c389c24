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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ai_assistant.errors import DeviceLost, InvalidModel, NotSupported
from ai_assistant.hal.ggml import vulkan

SPIN_COUNT = "3000"
_LOG_WARN = 3
_LOG_CONT = 5

GPU, INTEGRATED = 1, 2
"""ggml's types of devices; 0 is the processor, others only help it."""
_DEVICE_FUNCTIONS: tuple[tuple[str, Any, list[Any]], ...] = (
    ("ggml_backend_dev_count", ctypes.c_size_t, []),
    ("ggml_backend_dev_get", ctypes.c_void_p, [ctypes.c_size_t]),
    ("ggml_backend_dev_type", ctypes.c_int, [ctypes.c_void_p]),
    ("ggml_backend_dev_name", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_backend_dev_description", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_backend_dev_buffer_type", ctypes.c_void_p, [ctypes.c_void_p]),
    ("ggml_backend_dev_memory", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
)


class NativeDevice(NamedTuple):
    """A device that is not the processor, as ggml has it. Memory in bytes."""

    name: str
    description: str
    address: int
    free_bytes: int
    integrated: bool
    """Its memory is the host's."""


_lock = threading.Lock()
_registry: Any = None
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
    global _registry
    handle = ctypes.CDLL(str(ggml))
    if not hasattr(handle, "ggml_backend_load_all_from_path"):
        return
    for name, returns, takes in _DEVICE_FUNCTIONS:
        # They are in libggml-base, which this one needs: a look-up through it finds both.
        function = getattr(handle, name)
        function.restype, function.argtypes = returns, takes
    _registry = handle
    load = handle.ggml_backend_load_all_from_path
    load.argtypes, load.restype = [ctypes.c_char_p], None
    with vulkan.drivers():
        load(os.fsencode(folder))


def devices() -> dict[str, NativeDevice]:
    """Every device that the library can put layers on, beside the processor, by name; {} on most machines.

    Costs nothing: the plug-ins are loaded already.
    """
    library()
    if _registry is None:
        return {}
    found: dict[str, NativeDevice] = {}
    for number in range(_registry.ggml_backend_dev_count()):
        address = _registry.ggml_backend_dev_get(number)
        kind = _registry.ggml_backend_dev_type(address)
        if kind in (GPU, INTEGRATED):
            name = _registry.ggml_backend_dev_name(address).decode(errors="replace")
            text = _registry.ggml_backend_dev_description(address).decode(errors="replace").strip()
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            _registry.ggml_backend_dev_memory(address, ctypes.byref(free), ctypes.byref(total))
            found[name] = NativeDevice(name, text, address, free.value, kind == INTEGRATED)
    return found


def claim(device: NativeDevice) -> None:
    """Have the library open a device as a language model wants it, with numbers of 16 bits.

    Who opens it first in a process decides that, and `hal.backends.ggml`, which measures it, would have 32 bits.
    """
    _registry.ggml_backend_dev_buffer_type(device.address)


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


def load_model(
    fd: int,
    progress: Callable[[float], None] | None,
    *,
    repack: bool = True,
    parts: Sequence[tuple[str, int]] = (),
) -> Any:
    """Map a checked GGUF file's weights. Returns a model pointer for `llama_model_free`.

    Args:
        repack: copy weights into a layout that this processor multiplies faster, at the cost of their size.
        parts: (name of a device, layers on it), as they follow each other at the end of the model, the output being
            one more layer; what is before them stays on the processor. Empty: everything does.

    Raises:
        InvalidModel: the library refuses the file; its own words are in the message.
        DeviceLost: a device of `parts` is not there.
    """
    lib = library()
    parameters = lib.llama_model_default_params()
    keep = _place(lib, parameters, parts)
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
    del keep  # the library has read them
    return model


def _place(lib: Any, parameters: Any, parts: Sequence[tuple[str, int]]) -> tuple[Any, ...]:
    """Write into the parameters who gets which layers. Returns what they point to."""
    known = devices() if parts else {}
    missing = [name for name, _ in parts if name not in known]
    if missing:
        raise DeviceLost(f"the device {missing[0]} is not there any more")
    # Without a list, the library would take every device, also for layers that stay on the processor: their weights
    # would lie in its buffers.
    listed = (ctypes.c_void_p * (len(parts) + 1))(*(known[name].address for name, _ in parts), None)
    shares = (ctypes.c_float * max(int(lib.llama_max_devices()), len(parts), 1))(*(count for _, count in parts))
    parameters.devices = ctypes.cast(listed, ctypes.c_void_p)
    parameters.n_gpu_layers = sum(count for _, count in parts)
    if parts:
        parameters.split_mode = lib.LLAMA_SPLIT_MODE_LAYER
        parameters.main_gpu = 0
        parameters.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
        # Otherwise the processor's part would be copied into the device's pinned memory, neither mapped nor repacked.
        parameters.no_host = True
    return listed, shares


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
