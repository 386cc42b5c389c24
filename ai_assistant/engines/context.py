"""A native context: its sequences' caches, what can be done with them, and one decode at a time.

Each sequence has a buffer of its own (`kv_unified` off). In a shared one, attention walks over what idle
sequences keep: measured with four of them, 20 % of reading a prompt and 15 % of a token. The price is that
a sequence cannot point into another's cells: the library then copies the whole buffer at the next decode
(llama-kv-cache.cpp, `seq_cp` and `update`), which is still worth some ten tokens of reading. Where the
source is less than half full, its state is copied instead, which takes only what is used.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ai_assistant.engines.batch import Batch
from ai_assistant.engines.native import last_messages
from ai_assistant.engines.pages import Fresh, opening
from ai_assistant.engines.sampling import Logits, Scratch
from ai_assistant.engines.threads import ThreadControl
from ai_assistant.engines.trimming import give_back
from ai_assistant.errors import OutOfMemory


class Context(Protocol):
    """What the scheduler needs of a context. All of it on one thread."""

    whole: bool
    """States can be continued, but not cut: a recurrent model."""

    @property
    def is_open(self) -> bool: ...

    def open(self) -> None: ...

    def close(self) -> None: ...

    @property
    def untouched_bytes(self) -> int: ...

    @property
    def scratch(self) -> Scratch: ...

    def decode(self, batch: Batch) -> int: ...

    def row(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]: ...

    def cut(self, sequence: int, length: int) -> int: ...

    def copy(self, source: int, target: int, length: int) -> bool: ...

    def save(self, sequence: int) -> bytearray | None: ...

    def restore(self, sequence: int, state: bytearray, length: int) -> bool: ...

    def clear(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShape:
    """How a native context is made. Cells and batch in tokens."""

    cells: int
    """Per sequence; a multiple of 256."""
    sequences: int
    batch_tokens: int
    outputs: int
    """Tokens of one batch that may ask for logits. Rows of the whole batch would take hundreds of
    megabytes with a large vocabulary, and more than this ends the process."""
    threads: int
    """At most; fewer decode while others hold some of the cores."""
    kv_type: str = "f16"
    whole: bool = False
    on_devices: bool = False
    """The caches of layers that another device has are there, too."""


class NativeContext:
    """A context of a native model, which must outlive it. Made by `open`, and again after `close`."""

    def __init__(self, lib: Any, model: Any, vocabulary: int, shape: ContextShape) -> None:
        self._lib = lib
        self._model = model
        self._vocabulary = vocabulary
        self._shape = shape
        self._native: Any = None
        self._memory: Any = None
        self._logits: Logits | None = None
        self._batch: Any = None
        self._bound: Batch | None = None
        self._fresh = Fresh()
        self._copied: set[int] = set()
        """Sequences into which the next decode copies first."""
        self._threads = ThreadControl(shape.threads)
        self._threads_set = shape.threads
        self._window = int(lib.llama_model_n_swa(model))
        self.whole = shape.whole
        self.scratch = Scratch(lib, vocabulary)

    @property
    def is_open(self) -> bool:
        return self._native is not None

    def open(self) -> None:
        """Allocate the caches.

        Raises:
            OutOfMemory: the library cannot, with its reason.
        """
        if self._native is not None:
            return
        lib, shape = self._lib, self._shape
        parameters = lib.llama_context_default_params()
        parameters.kv_unified = False
        parameters.n_ctx = shape.cells * shape.sequences
        parameters.n_batch = parameters.n_ubatch = shape.batch_tokens
        parameters.n_seq_max = shape.sequences
        parameters.n_outputs_max = shape.outputs
        parameters.n_threads = parameters.n_threads_batch = shape.threads
        parameters.no_perf = True
        parameters.offload_kqv = shape.on_devices
        parameters.op_offload = False
        if shape.kv_type != "f16":
            parameters.type_k = parameters.type_v = getattr(lib, f"GGML_TYPE_{shape.kv_type.upper()}")
            # The library reads quantised values in its fused attention only.
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        last_messages()
        with opening() as fresh:
            native = lib.llama_init_from_model(self._model, parameters)
        if not native:
            raise OutOfMemory(
                f"no context of {shape.sequences} × {shape.cells} tokens ({shape.kv_type}): {last_messages()[:300]}",
                hint="load with a smaller context_length or fewer sequences, or kv_type f16",
            )
        self._native, self._fresh = native, fresh
        fresh.give_back()
        self._threads_set = shape.threads
        self._memory = lib.llama_get_memory(native)
        self._logits = Logits(lib, native, self._vocabulary)

    @property
    def untouched_bytes(self) -> int:
        """Memory of the caches that is taken when they fill."""
        return self._fresh.untouched_bytes()

    def close(self) -> None:
        """Free the caches; idempotent."""
        if self._native is not None:
            native, self._native, self._memory, self._logits = self._native, None, None, None
            self._copied.clear()
            self._fresh = Fresh()
            self._lib.llama_free(native)
            give_back()

    def decode(self, batch: Batch) -> int:
        """Compute a batch; 0 if it went well."""
        if self._bound is not batch:
            self._bind(batch)
        self._batch.n_tokens = batch.count
        threads = self._threads.for_step(batch.count)
        if threads != self._threads_set:
            self._lib.llama_set_n_threads(self._native, threads, threads)
            self._threads_set = threads
        begin = time.perf_counter()
        code = int(self._lib.llama_decode(self._native, self._batch))
        # A step that also copies a cache says nothing about the threads.
        if not code and not self._copied:
            self._threads.after_step(time.perf_counter() - begin, batch.count)
        self._copied.clear()
        return code

    def _bind(self, batch: Batch) -> None:
        native = self._lib.llama_batch()
        kinds = dict(native._fields_)
        for name, array in (
            ("token", batch.tokens), ("pos", batch.positions), ("n_seq_id", batch.ones), ("seq_id", batch.pointers),
            ("logits", batch.wanted),
        ):  # fmt: skip
            setattr(native, name, ctypes.cast(array.ctypes.data, kinds[name]))
        self._batch, self._bound = native, batch

    def row(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits of the batch's token `index`, shape (vocabulary,); valid until the next decode."""
        assert self._logits is not None
        return self._logits.row(index)

    def cut(self, sequence: int, length: int) -> int:
        """Forget all from `length` on. Returns what is left: 0 where the cache cannot be cut there."""
        lib, memory = self._lib, self._memory
        if length > 0 and self._window:
            # A cache of a sliding window may have lost what the token at `length` would look at.
            oldest = int(lib.llama_memory_seq_pos_min(memory, sequence))
            if oldest > max(0, length - self._window):
                length = 0
        if length > 0 and lib.llama_memory_seq_rm(memory, sequence, length, -1):
            return length
        lib.llama_memory_seq_rm(memory, sequence, -1, -1)
        return 0

    def copy(self, source: int, target: int, length: int) -> bool:
        """Give `target` all that `source` has, `length` tokens; what `target` had is lost either way."""
        lib = self._lib
        lib.llama_memory_seq_rm(self._memory, target, -1, -1)
        if not self._window and 2 * length < self._shape.cells and source not in self._copied:
            state = self.save(source)
            return state is not None and self.restore(target, state, length)
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._copied.add(target)
        return True

    def save(self, sequence: int) -> bytearray | None:
        """The state of a sequence; None where the library cannot."""
        lib = self._lib
        if sequence in self._copied:
            return None
        size = int(lib.llama_state_seq_get_size_ext(self._native, sequence, 0))
        if size <= 0:
            return None
        try:
            state = bytearray(size)
        except MemoryError:
            return None
        place = (ctypes.c_uint8 * size).from_buffer(state)
        if int(lib.llama_state_seq_get_data_ext(self._native, place, size, sequence, 0)) != size:
            return None
        return state

    def restore(self, sequence: int, state: bytearray, length: int) -> bool:
        """The inverse of `save`, into any sequence; what that had is lost either way."""
        lib = self._lib
        size = len(state)
        lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        if sequence in self._copied:
            return False
        place = (ctypes.c_uint8 * size).from_buffer(state)
        read = int(lib.llama_state_seq_set_data_ext(self._native, place, size, sequence, 0))
        if read == size and int(lib.llama_memory_seq_pos_max(self._memory, sequence)) == length - 1:
            return True
        lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return False

    def clear(self) -> None:
        """Forget everything."""
        self._lib.llama_memory_clear(self._memory, False)
