"""D-Bus values and plain Python ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbus_fast import Variant


def plain(value: Any) -> Any:
    """A D-Bus value with every variant taken out of its wrapper."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def variant(value: Any) -> Variant:
    """A JSON-like value in a variant: ints are x, floats d, lists of strings as, other lists av.

    Raises:
        TypeError: None and what is not JSON-like has no D-Bus form.
    """
    if isinstance(value, bool):
        return Variant("b", value)
    if isinstance(value, int):
        return Variant("x", value)
    if isinstance(value, float):
        return Variant("d", value)
    if isinstance(value, str):
        return Variant("s", value)
    if isinstance(value, Mapping):
        return Variant("a{sv}", variants(value))
    if isinstance(value, list | tuple):
        if all(isinstance(each, str) for each in value):
            return Variant("as", list(value))
        return Variant("av", [variant(each) for each in value])
    raise TypeError(f"{type(value).__name__} has no D-Bus form")


def variants(values: Mapping[str, Any]) -> dict[str, Variant]:
    """a{sv} of a mapping; what is None is left out, as D-Bus has no null."""
    return {key: variant(value) for key, value in values.items() if value is not None}
