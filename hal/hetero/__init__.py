"""Several devices for one graph: who runs what (`plan`), why (`Plan.explain`), and running it (`Executor`).

See docs/hetero.md. Nothing is imported before it is used, so that `hetero.intent` costs the API nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai_assistant.hal.hetero.cost import CostModel
    from ai_assistant.hal.hetero.devices import open_devices
    from ai_assistant.hal.hetero.executor import Executor, Run
    from ai_assistant.hal.hetero.intent import Intent, Objective, from_environment, parse
    from ai_assistant.hal.hetero.planner import plan
    from ai_assistant.hal.hetero.plans import Plan

__all__ = [
    "CostModel",
    "Executor",
    "Intent",
    "Objective",
    "Plan",
    "Run",
    "from_environment",
    "open_devices",
    "parse",
    "plan",
]
_HOMES = {
    "CostModel": "cost", "Executor": "executor", "Intent": "intent", "Objective": "intent", "Plan": "plans",
    "Run": "executor", "from_environment": "intent", "open_devices": "devices", "parse": "intent", "plan": "planner",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
