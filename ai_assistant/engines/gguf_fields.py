"""Reads the fields of a GGUF header that an architecture defines, each of the kind and in the range it must have."""

from __future__ import annotations

from typing import Any

from ai_assistant.engines.gguf import Array, Gguf
from ai_assistant.errors import InvalidModel


def head_width(model: Gguf, width: int, heads: tuple[int, ...]) -> int:
    """Elements of one head's key."""
    first = next((each for each in heads if each), 0)
    return integer(model, "attention.key_length", default=width // first if first else 0, low=0)


def text(model: Gguf, key: str) -> str:
    """A string of the header; "" when it is missing or something else."""
    value = model.metadata.get(key, "")
    return value if isinstance(value, str) else ""


def integer(model: Gguf, key: str, *, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
    """A number that the architecture defines.

    Raises:
        InvalidModel: it is missing and has no default, or is no number between `low` and `high`.
    """
    value: Any = model.of_model(key)
    if value is None:
        if default is None:
            raise InvalidModel(f"{model.architecture}.{key} is missing")
        return default
    if isinstance(value, Array | bool) or not isinstance(value, int):
        raise InvalidModel(f"{model.architecture}.{key} is not a number")
    if not low <= value <= high:
        raise InvalidModel(f"{model.architecture}.{key} is {value}, not between {low} and {high}")
    return value


def per_layer(model: Gguf, key: str, layers: int, *, required: bool = False, high: int = 1 << 20) -> tuple[int, ...]:
    """A value that may be one number or one per layer; () when it is missing."""
    value = model.of_model(key)
    if value is None:
        if required:
            raise InvalidModel(f"{model.architecture}.{key} is missing")
        return ()
    values = value.values if isinstance(value, Array) else (value,) * layers
    if values is None or len(values) != layers:
        raise InvalidModel(f"{model.architecture}.{key} does not have one value for each of {layers} layers")
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= high:
            raise InvalidModel(f"{model.architecture}.{key} has the impossible value {each!r:.40}")
    if required and values[0] < 1:
        raise InvalidModel(f"{model.architecture}.{key} is 0")
    return tuple(values)
