"""A bus and a model whose answers a test decides."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ai_assistant.actions.bus import BusFailure

DBUS = "org.freedesktop.DBus.Error."
STATUS: dict[str, Any] = {
    "version": "0.1.0", "state": "running", "uptime_s": 93784.0, "load_1m": 0.5, "memory_total_bytes": 16 << 30,
    "memory_available_bytes": 4 << 30, "disk_total_bytes": 100 << 30, "disk_free_bytes": 25 << 30,
    "temperature_c": 48.4, "watts": 12.34, "watts_source": "rapl", "cpu": "Example CPU", "cores": 8,
    "addresses": ["192.0.2.7"], "running": 2, "profile": "developer",
    "models": [{"name": "assistant:1", "state": "loaded"}, {"name": "tiny:1", "state": "unloaded"}],
}  # fmt: skip
ZONES = ["Asia/Tokyo", "Europe/Berlin", "UTC"]


class FakeBus:
    """Answers by `member`, or by `(member, first argument)`; an exception as an answer is raised."""

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[Any, Any] = {"GetStatus": STATUS, "ListTimezones": ZONES, **answers}
        self.calls: list[tuple[str, str, str, str, str, tuple[Any, ...]]] = []

    async def call(
        self, name: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        self.calls.append((name, path, interface, member, signature, tuple(body)))
        key = (member, body[0]) if body and isinstance(body[0], str) and (member, body[0]) in self.answers else member
        if key not in self.answers:
            raise BusFailure(DBUS + "ServiceUnknown", f"nobody owns {name}")
        answer = self.answers[key]
        if isinstance(answer, list) and answer and isinstance(answer[0], Turn):
            answer = answer.pop(0).value
        if isinstance(answer, Exception):
            raise answer
        return () if answer is None else (answer,)


class Turn:
    """One of several answers that are given in turn."""

    def __init__(self, value: Any) -> None:
        self.value = value


class FakeModel:
    """Says the given calls in turn, each with the probability of its only token; keeps the requests."""

    def __init__(self, *calls: tuple[str, Mapping[str, Any], float]) -> None:
        self._calls = list(calls)
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, body: dict[str, Any]) -> Mapping[str, Any]:
        self.requests.append(body)
        name, arguments, probability = self._calls.pop(0)
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": function}],
            },
            "logprobs": {"content": [{"token": "x", "logprob": math.log(probability)}]},
        }
