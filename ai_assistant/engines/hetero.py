"""A request's own wish for devices, `hetero_compute`: on its way to an engine, and what became of it.

Nothing of `hal.hetero` is imported before a request has a wish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ai_assistant.engines.contract import Event, Finished, Placed
from ai_assistant.errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from ai_assistant.hal.hetero.intent import Intent

PARAM = "hetero_compute"
HOST = ("cpu",)
_THE_HOST = ("cpu", "ggml", "ggml:CPU")
"""What the processor may be called where a language model runs on it."""
Asked = Callable[[], bool] | None


@dataclass(slots=True)
class Wish:
    """What a request wants of several devices, see docs/hetero.md.

    Args:
        devices: which ones it ran on; filled in by whoever answers.

    Raises:
        InvalidArgument: it is not understood; with `param` "hetero_compute".
    """

    text: str
    devices: tuple[str, ...] = ()
    intent: Intent = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from ai_assistant.hal.hetero.intent import parse

        self.intent = parse(self.text)

    @classmethod
    def of(cls, value: object) -> Wish | None:
        """The wish in an untrusted value; None where there is none.

        Raises:
            InvalidArgument
        """
        if value is None:
            return None
        if not isinstance(value, str):
            raise InvalidArgument(f"{PARAM} must be a string", param=PARAM)
        return cls(value)

    @property
    def off(self) -> bool:
        """Nothing else is wanted than without a wish."""
        return not self.intent.mixed and not self.intent.devices


class Reader(Protocol):
    """The part of an engine that reads texts; see `Engine`."""

    def embed(self, texts: Sequence[str], cancelled: Asked = None) -> tuple[list[list[float]], int]: ...

    def rerank(self, query: str, documents: Sequence[str], cancelled: Asked = None) -> tuple[list[float], int]: ...

    def classify(self, texts: Sequence[str], cancelled: Asked = None) -> tuple[list[list[tuple[str, float]]], int]: ...


@runtime_checkable
class Divisible(Protocol):
    """An engine that can run each request on other devices."""

    def wished(self, wish: Wish) -> Reader:
        """The engine as that request wants it. Its methods raise also:

        Raises:
            InvalidArgument, NotSupported: a device that is not here, cannot be used, or cannot run this model.
            Busy: too many plans were made lately.
            DeviceLost, BackendFailed, OutOfMemory: of a device.
        """


def reader(engine: Reader, wish: Wish | None) -> Reader:
    """An engine for one request.

    Raises:
        NotSupported: the wish names devices that this engine's model is not on.
    """
    if wish is None:
        return engine
    if isinstance(engine, Divisible):
        return engine.wished(wish)
    honour(engine, wish)
    return engine


def honour(engine: object, wish: Wish) -> None:
    """For a model that stays where it was loaded: a word is a preference, a list of devices has to be true.

    Raises:
        NotSupported
    """
    used = _where(engine)
    if wish.intent.devices and not all(_named(each, wish.intent.devices) for each in used):
        raise NotSupported(
            f"the model was loaded to {', '.join(used)}, and a request cannot move it",
            hint="leave hetero_compute out, say ON, OFF, performance, efficiency or latency, or name these devices",
            param=PARAM,
        )
    wish.devices = used


def told(event: Event, wish: Wish | None) -> Event:
    """The same event; the last of a generation says which devices it were, where that was asked."""
    if wish is None or not isinstance(event, Finished):
        return event
    return replace(event, usage=replace(event.usage, devices=wish.devices))


def _where(engine: object) -> tuple[str, ...]:
    parts = engine.placement.parts if isinstance(engine, Placed) else ()
    return tuple(dict.fromkeys(name for name, _ in parts)) or HOST


def _named(device: str, wanted: Sequence[str]) -> bool:
    if device in HOST:
        return any(each in _THE_HOST for each in wanted)
    return any(device == each or device.startswith(f"{each}:") for each in wanted)
