"""ggml's shared libraries, as they ship with the language model engine: loaded once per process, on first use."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ai_assistant.errors import NotSupported
from ai_assistant.hal.ggml import vulkan

SPIN_COUNT = "3000"
"""OpenMP's, as the engine sets it: threads that spin for long starve whoever else wants the processor."""
HINT = "install the engine (pip install 'ai-assistant[local]'), or set LLAMA_CPP_LIB_PATH to the folder of libggml.so"
F32 = 0
CPU, GPU, IGPU = 0, 1, 2

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: what it returns, what it takes
    "ggml_backend_load_all_from_path": (None, c_char_p),
    "ggml_backend_dev_count": (c_size_t,),
    "ggml_backend_dev_get": (c_void_p, c_size_t),
    "ggml_backend_dev_name": (c_char_p, c_void_p),
    "ggml_backend_dev_description": (c_char_p, c_void_p),
    "ggml_backend_dev_type": (c_int, c_void_p),
    "ggml_backend_dev_get_props": (None, c_void_p, c_void_p),
    "ggml_backend_dev_memory": (None, c_void_p, c_void_p, c_void_p),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_reg_name": (c_char_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_get_default_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_gallocr_new": (c_void_p, c_void_p),
    "ggml_gallocr_free": (None, c_void_p),
    "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    "ggml_version": (c_char_p,),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_free": (None, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_new_tensor_4d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64),
    "ggml_set_input": (None, c_void_p),
    "ggml_set_output": (None, c_void_p),
    "ggml_scale": (c_void_p, c_void_p, c_void_p, c_float),
    "ggml_norm": (c_void_p, c_void_p, c_void_p, c_float),
    "ggml_permute": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int),
    "ggml_reshape_4d": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64),
    "ggml_repeat_4d": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64),
    **{f"ggml_{name}": (c_void_p, c_void_p, c_void_p, c_void_p) for name in ("add", "sub", "mul", "div", "mul_mat")},
    **{
        f"ggml_{name}": (c_void_p, c_void_p, c_void_p)
        for name in ("relu", "gelu_erf", "soft_max", "cont", "tanh", "sigmoid", "sqrt", "neg", "abs", "exp")
    },
}


_FIELDS = {"ggml_version": "_version"}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Properties(ctypes.Structure):
    _fields_ = [
        *(("name", c_char_p), ("description", c_char_p), ("memory_free", c_size_t), ("memory_total", c_size_t)),
        *(("type", c_int), ("device_id", c_char_p)),
        # Capabilities: five of them; a later version may have more.
        ("capabilities", c_bool * 64),
    ]


class Library:
    """The functions above by their names without `ggml_`, and the devices that ggml knows."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        self.folder = folder
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"))
            whole = ctypes.CDLL(str(folder / "libggml.so"))
            for name, (returns, *takes) in _SIGNATURES.items():
                function = getattr(base, name, None) or getattr(whole, name)
                function.restype, function.argtypes = returns, takes
                setattr(self, _FIELDS.get(name, name.removeprefix("ggml_")), function)
            self._init = base.ggml_init
        except (OSError, AttributeError) as error:
            raise NotSupported(f"ggml's library does not load: {str(error)[:200]}", hint=HINT) from error
        self._init.restype, self._init.argtypes = c_void_p, [_InitParams]
        if "llama_cpp.llama_cpp" not in sys.modules:
            # The engine has a listener of its own; without it, the library would write to the standard error.
            self._listener = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
            base.ggml_log_set(self._listener, None)
        with vulkan.drivers():
            self.backend_load_all_from_path(os.fsencode(folder))

    def __getattr__(self, name: str) -> Any:  # for the type checker: the functions are set by their names
        raise AttributeError(name)

    @property
    def version(self) -> str:
        found: bytes = self._version()
        return found.decode(errors="replace")

    def context(self, nbytes: int) -> int:
        """A pool for the descriptions of tensors and graphs, not for their data."""
        made: int = self._init(_InitParams(nbytes, None, True))
        return made

    def devices(self) -> list[int]:
        return [self.backend_dev_get(number) for number in range(self.backend_dev_count())]

    def name(self, device: int) -> str:
        found: bytes = self.backend_dev_name(device)
        return found.decode(errors="replace")

    def description(self, device: int) -> str:
        found: bytes = self.backend_dev_description(device)
        return found.decode(errors="replace").strip()

    def runtime(self, device: int) -> str:
        """By what ggml reaches the device: CPU, Vulkan, CUDA …"""
        found: bytes = self.backend_reg_name(self.backend_dev_backend_reg(device))
        return found.decode(errors="replace")

    def address(self, device: int) -> str:
        """On the PCI bus, as in "0000:c1:00.0"; empty where there is none, or it is not known."""
        found = _Properties()
        self.backend_dev_get_props(device, ctypes.byref(found))
        return (found.device_id or b"").decode(errors="replace").lower()

    def memory(self, device: int) -> int:
        """Bytes in all; 0 where that is not known."""
        free, total = c_size_t(), c_size_t()
        self.backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        return total.value

    def set_threads(self, device: int, backend: int, threads: int) -> None:
        register = self.backend_dev_backend_reg(device)
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_set_n_threads")
        if address:
            ctypes.CFUNCTYPE(None, c_void_p, c_int)(address)(backend, threads)


_lock = threading.Lock()
_loaded: Library | None = None


def folder() -> Path:
    """Where the libraries are: LLAMA_CPP_LIB_PATH, or beside the engine's Python package, which is not imported.

    Raises:
        NotSupported: they are in neither place.
    """
    named = os.environ.get("LLAMA_CPP_LIB_PATH", "")
    package = PathFinder.find_spec("llama_cpp")
    places = (
        [Path(named)]
        if named
        else [Path(each) / "lib" for each in (package and package.submodule_search_locations) or ()]
    )
    for place in places:
        if (place / "libggml.so").exists():
            return place
    raise NotSupported("ggml's library libggml.so is not installed", hint=HINT)


def library() -> Library:
    """Raises NotSupported: it is not installed, or does not work here."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = Library(folder())
        return _loaded
