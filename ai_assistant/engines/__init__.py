"""Engines: whole inference runtimes behind one contract. `open_model` finds the right one by content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

from ai_assistant.engines.contract import Engine, LoadOptions
from ai_assistant.engines.gguf import opened
from ai_assistant.engines.sniff import ModelFormat, sniff
from ai_assistant.errors import InvalidModel, NotSupported

__all__ = ["ENGINES", "EngineEntry", "open_model"]


class EngineEntry(NamedTuple):
    """One engine: what it is called, what it opens, and where its class is (imported when it is needed)."""

    name: str
    formats: tuple[ModelFormat, ...]
    module: str
    attribute: str


ENGINES: tuple[EngineEntry, ...] = (
    EngineEntry("llama", (ModelFormat.GGUF,), "ai_assistant.engines.llama", "LlamaEngine"),
    EngineEntry("onnx", (ModelFormat.ONNX,), "ai_assistant.engines.onnx", "OnnxEngine"),
)
"""In order of preference: the first that opens a format is taken."""

_HINTS = {
    ModelFormat.SAFETENSORS: "safetensors hold training weights; convert the model to GGUF",
}


def open_model(
    path_or_fd: int | str | os.PathLike[str],
    options: LoadOptions | None = None,
    progress: Callable[[float], None] | None = None,
    files: Mapping[str, int] = MappingProxyType({}),
) -> Engine:
    """Load a model with the first engine that takes its format, which its content tells.

    Args:
        files: open descriptors of what goes with the model, by name; they are not closed.

    Raises:
        InvalidModel: no model, or none that an engine runs.
        NotSupported: a format without an engine, or an engine that is not installed.
        OutOfMemory: it does not fit.
    """
    if not isinstance(path_or_fd, int) and os.path.isdir(path_or_fd):  # noqa: PTH112 - false where it is impossible
        # Of all models, only those for ONNX come as a folder.
        folder: Engine = _class(ModelFormat.ONNX).open(path_or_fd, options, progress, files)
        return folder
    with opened(path_or_fd) as fd:
        found = sniff(fd)
        if found is ModelFormat.UNKNOWN:
            if os.fstat(fd).st_size == 0:
                raise InvalidModel("the file is empty")
            raise InvalidModel("the file is no model of a known format (GGUF or ONNX)")
        if found is not ModelFormat.ONNX:
            engine: Engine = _class(found).open(fd, options, progress, files)
            return engine
    # By its path, if it has one: what belongs to it lies beside it.
    engine = _class(found).open(path_or_fd, options, progress, files)
    return engine


def _class(found: ModelFormat) -> Any:
    for entry in ENGINES:
        if found in entry.formats:
            return getattr(import_module(entry.module), entry.attribute)
    raise NotSupported(f"there is no engine for {found.value} models", hint=_HINTS.get(found, ""))
