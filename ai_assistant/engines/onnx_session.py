"""ONNX Runtime, on our terms: one graph in memory, run on batches of token numbers.

How a session is set up, and why:

* All graph optimisations, so that what an exporter spelled out (GELU, layer norms, scaled products) is fused again.
* An arena that grows by what is asked for, not by doubling (441 MB instead of 647 MB reserved after the same texts),
  and that `trim` shrinks.
* No memory patterns: they plan the buffers of a run ahead for one shape and keep the plan, and here every batch has
  a shape of its own, so the plans would only pile up. Buffers of a run are still reused within it (`enable_mem_reuse`).
* Input and output are bound: what is computed beside the one output is not copied out, and its buffer is the arena's.
* One thread per core. They spin between operators, which is bounded and where sleeping costs most, but not between
  batches (`force_spinning_stop`): a model that waits for texts leaves the cores to the one that generates.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ai_assistant.engines.native import default_threads
from ai_assistant.engines.onnx_file import FLOAT, FLOAT16, INT32, OnnxFile
from ai_assistant.engines.onnx_package import Member, pread
from ai_assistant.engines.onnx_rules import Plan
from ai_assistant.errors import AIAssistantError, InvalidModel, NotSupported, OutOfMemory
from ai_assistant.hal.quiet import silent

Array = npt.NDArray[Any]
_QUIET = 4
_CHUNK = 1 << 24
# One Identity of one number: making a session of it is what first wakes the library.
_NOTHING = (
    b'\x08\x03\x12\x05empty::\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x04noneZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x01"
)
_lock = threading.Lock()
_runtime: Any = None


def runtime() -> Any:
    """The module `onnxruntime`, ready for use.

    Raises:
        NotSupported: it is not installed, or does not work here.
    """
    global _runtime
    with _lock:
        if _runtime is None:
            try:
                import onnxruntime
            except ImportError as error:
                raise NotSupported(
                    f"running ONNX models needs ONNX Runtime, which is not installed: {error}",
                    hint="apt install python3-onnxruntime, or pip install 'ai-assistant[local]'",
                ) from error
            # Debian's library says of each of its 700 operators that it knows it already.
            with silent():
                onnxruntime.set_default_logger_severity(_QUIET)
                _share_arena(onnxruntime)
                onnxruntime.InferenceSession(_NOTHING, providers=["CPUExecutionProvider"])
            _runtime = onnxruntime
        return _runtime


def _share_arena(library: Any) -> None:
    # An arena of a session's own doubles whenever it grows, and there is no other way to say that it should not.
    where = library.OrtMemoryInfo("Cpu", library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, library.OrtMemType.DEFAULT)
    grow_as_asked = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1}
    arena = library.OrtArenaCfg({**grow_as_asked, "max_dead_bytes_per_chunk": -1})
    library.create_and_register_allocator(where, arena)


class Session:
    """A graph that runs. `run` may be called by one thread at a time."""

    def __init__(self, model: Member, file: OnnxFile, plan: Plan, threads: int = 0) -> None:
        """
        Raises:
            InvalidModel: weights that are no numbers, by name; or what the library says of the graph.
            OutOfMemory, NotSupported
        """
        _check_weights(model, file)
        library = runtime()
        options = library.SessionOptions()
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = True
        options.enable_mem_pattern = False
        options.enable_mem_reuse = True
        options.log_severity_level = _QUIET
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        with _errors("refuses this model"):
            self._session = library.InferenceSession(
                pread(model.fd, model.size, model.offset), options, providers=["CPUExecutionProvider"]
            )
        # It keeps the file's bytes for a fallback to other devices, of which there are none here.
        self._session._model_bytes = None
        self._library = library
        self._plan = plan
        self._types = {each.name: np.dtype(np.int32 if each.type == INT32 else np.int64) for each in plan.inputs}

    def run(self, values: Mapping[str, Array], *, shrink: bool = False) -> Array:
        """The output for a batch, (rows, width) or (rows, tokens, width), as 32-bit numbers.

        Args:
            values: tables of whole numbers (rows, tokens), for each input of the plan.
            shrink: give memory back afterwards that the batch needed.
        """
        options = self._library.RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        binding = self._session.io_binding()
        # The binding borrows the arrays, so they must live until it has run.
        held = {name: np.ascontiguousarray(values[name], kind) for name, kind in self._types.items()}
        with _errors("fails on this input"):
            for name, array in held.items():
                binding.bind_cpu_input(name, array)
            binding.bind_output(self._plan.output.name, "cpu")
            self._session.run_with_iobinding(binding, options)
            found: Array = binding.get_outputs()[0].numpy().astype(np.float32, copy=False)
        rows, tokens = values["input_ids"].shape
        return checked_output(found, rows, tokens, self._plan)


def checked_output(found: Array, rows: int, tokens: int, plan: Plan) -> Array:
    """The same table; raises InvalidModel: its shape is not that of an answer to so many texts."""
    shape = plan.output.shape
    if found.ndim != len(shape) or found.shape[0] != rows or (found.ndim == 3 and found.shape[1] != tokens):
        raise InvalidModel(f"the model answers {rows} texts of {tokens} tokens with a table of shape {found.shape}")
    if shape[-1] is not None and found.shape[-1] != shape[-1]:
        raise InvalidModel(f"the model's rows are {found.shape[-1]} wide, not {shape[-1]} as it says")
    return found


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """The library's own errors, which have no common class, as ours."""
    try:
        yield
    except (AIAssistantError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if "alloc" in text.lower():
            raise OutOfMemory(f"ONNX Runtime has no memory left: {text[:300]}", hint="send shorter texts") from error
        raise InvalidModel(f"ONNX Runtime {what}: {text[:400]}") from error


def _check_weights(model: Member, file: OnnxFile) -> None:
    """One weight that is no number makes every answer one, and then nobody knows which it was."""
    for weight in file.weights.values():
        if weight.type not in (FLOAT, FLOAT16):
            continue
        kind = np.dtype("<f4" if weight.type == FLOAT else "<f2")
        for offset, size in weight.spans:
            for at in range(0, size, _CHUNK):
                data = pread(model.fd, min(_CHUNK, size - at), model.offset + offset + at)
                if not np.isfinite(np.frombuffer(data, kind, count=len(data) // kind.itemsize)).all():
                    raise InvalidModel(f"the weight {weight.name[:80]!r} has values that are not numbers")
