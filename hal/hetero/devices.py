"""Devices by name: BACKEND or BACKEND:DEVICE, as in `cpu` and `onnxruntime:CPUExecutionProvider@0`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from types import TracebackType
from typing import Self

from ai_assistant.errors import AIAssistantError, InvalidArgument, NotSupported
from ai_assistant.hal.contract import Backend, Context
from ai_assistant.hal.hetero.intent import MAX_DEVICES

_NOT_BY_ITSELF = ("null",)
"""Backends that compute nothing are used only where they are named."""


def lane(name: str, context: Context) -> str:
    """What a device works on: two with the same one do not work at the same time.

    Processors are one lane unless a device is pinned to a core ("@3" at the end of its id).
    """
    device = context.device
    _, _, core = device.id.rpartition("@")
    if core != device.id and core.isdigit():
        return f"core {core}"
    # Only some backends know which processor they are on, and what runs on it unpinned uses all of it.
    if device.kind == "cpu":
        return "cpu"
    return device.hal_id or name


class OpenDevices(Mapping[str, Context]):
    """Open devices by name; closes them in the end.

    Args:
        versions: of each one's backend, by the same names.
        missing: names that could not be opened, and why.
    """

    def __init__(
        self, contexts: Mapping[str, Context], versions: Mapping[str, str], missing: Mapping[str, str]
    ) -> None:
        self._contexts = dict(contexts)
        self.versions = dict(versions)
        self.missing = dict(missing)

    def __getitem__(self, name: str) -> Context:
        return self._contexts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._contexts)

    def __len__(self) -> int:
        return len(self._contexts)

    def close(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts.values():
                stack.callback(context.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_devices(
    names: Iterable[str] = (), *, fallback: str = "cpu", backends: Mapping[str, Backend] | None = None
) -> OpenDevices:
    """Open devices, and the fallback beside them.

    Args:
        names: empty: the first device of every backend that has one.
        backends: default: those that discovery finds.

    Raises:
        InvalidArgument: no backend of that name.
        NotSupported, …: a device that was named cannot be opened, and why.
    """
    wanted = tuple(dict.fromkeys(names))
    if len(wanted) > MAX_DEVICES:
        raise InvalidArgument(f"{len(wanted)} devices are more than {MAX_DEVICES}", param="devices")
    known = dict(backends) if backends is not None else _discovered()
    contexts: dict[str, Context] = {}
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    every = wanted or tuple(name for name in known if name not in _NOT_BY_ITSELF)
    with ExitStack() as stack:
        for name in dict.fromkeys((*every, fallback)):
            kind, _, device = name.partition(":")
            backend = known.get(kind)
            if backend is None:
                if name in wanted:
                    raise InvalidArgument(
                        f"there is no backend {kind[:60]!r}", hint=f"there are {', '.join(known)}", param="devices"
                    )
                continue
            try:
                if not (found := backend.probe()):
                    raise NotSupported(f"{kind} has no device here: {found.unavailable}", hint=found.hint)
                context = backend.open(device)
            except AIAssistantError as error:
                if name in wanted:
                    raise
                missing[name] = error.message
                continue
            stack.callback(context.close)
            contexts[name] = context
            versions[name] = f"{kind} {backend.version}"
        stack.pop_all()
    return OpenDevices(contexts, versions, missing)


def _discovered() -> Mapping[str, Backend]:
    found: dict[str, Backend] = import_module("ai_assistant.hal.discovery").backends()
    return found
