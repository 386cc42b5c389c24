"""What the planner is told of devices: a table of times that a model, or a test, fills."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol

from ai_assistant.hal.graph import Graph, Node


class Source(StrEnum):
    """Where a time comes from."""

    MEASURED = "measured"
    ESTIMATED = "estimated"
    """From the work of the operator and measured rates of the device."""
    ASSUMED = "assumed"
    """From the work of the operator and rates that nobody measured."""


class Estimate(NamedTuple):
    seconds: float
    source: Source


class Costs(Protocol):
    """Times and watts by the devices' names. Every time is finite and not negative."""

    def node_s(self, device: str, node: Node, graph: Graph) -> Estimate:
        """Seconds of a node inside a program."""

    def launch_s(self, device: str) -> float:
        """Seconds that a program takes beside its nodes: submitted, started, told to be done."""

    def transfer_s(self, source: str, target: str, nbytes: int) -> float:
        """Seconds until a value is where another device can read it."""

    def watts(self, device: str) -> float | None:
        """What the device draws while it works; None where nobody measured it."""
