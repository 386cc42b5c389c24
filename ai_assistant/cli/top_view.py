"""What `ai-assistant top` shows, as something rich can print. Takes plain values, so it needs no daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ai_assistant.cli.output import printable, size
from ai_assistant.cli.status import temperature, watts

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR = 10
_COLUMNS: tuple[tuple[str, int], ...] = (
    ("model", 0),
    ("state", 0),
    ("memory", 60),
    ("run", 0),
    ("wait", 40),
    ("read/s", 70),
    ("write/s", 50),
    ("cache", 85),
    ("hits", 100),
    ("first token p50/p95", 110),
)
"""Heading, and from how many columns of the terminal on it is shown."""


def view(status: Mapping[str, Any], statistics: Mapping[str, Any], columns: int, problem: str = "") -> RenderableType:
    """The machine, a row for each model, and what is wrong; fits into `columns`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = [number for number, (_, least) in enumerate(_COLUMNS) if columns >= least]
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for number in shown:
        left = number < 2
        table.add_column(_COLUMNS[number][0], justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    for model in models(statistics):
        cells = row(model)
        table.add_row(*(Text(cells[number]) for number in shown))
    parts: list[RenderableType] = [Text(machine(status), no_wrap=True, overflow="ellipsis"), Text("")]
    parts.append(table if table.row_count else Text("no models"))
    if problem:
        parts += [Text(""), Text(printable(problem), style="red")]
    return Group(*parts)


def machine(status: Mapping[str, Any]) -> str:
    """Load, memory, temperature and power on one line; what nothing measures is said so."""
    load, cores = _number(status.get("load_1m")), status.get("cores")
    free, total = _number(status.get("memory_available_bytes")), _number(status.get("memory_total_bytes"))
    parts = [
        "load unknown" if load is None else f"load {load:.2f}" + (f" of {cores}" if cores else ""),
        "memory unknown" if free is None or total is None else f"memory {size(total - free)} of {size(total)}",
        f"temperature {temperature(status)}",
        f"power {watts(status)}",
    ]
    return printable(" · ".join([str(status.get("hostname") or "appliance"), *parts]))


def models(statistics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Busy ones first, then loaded ones, then by name."""
    found = [each for each in statistics.get("models") or () if isinstance(each, Mapping)]
    return sorted(
        found,
        key=lambda each: (
            -int(_number(each.get("running")) or 0),
            each.get("state") != "loaded",
            str(each.get("name", "")),
        ),
    )


def row(model: Mapping[str, Any]) -> list[str]:
    """A cell for each column; a dash where there is no number."""
    memory = model.get("resident_bytes", model.get("estimate_bytes"))
    loaded = model.get("state") == "loaded"
    state = str(model.get("state", "unknown")) + (" (pinned)" if model.get("pinned") else "")
    bytes_ = _number(memory)
    return [
        printable(str(model.get("name", "?"))),
        printable(state),
        "–" if bytes_ is None else size(bytes_) if loaded else f"({size(bytes_)})",
        _count(model.get("running")),
        _count(model.get("waiting")),
        _rate(model.get("prefill_tokens_per_s")),
        _rate(model.get("decode_tokens_per_s")),
        bar(model.get("kv_used"), model.get("kv_cells")),
        _count(model.get("prefix_hits")),
        f"{_time(model.get('ttft_p50_s'))} / {_time(model.get('ttft_p95_s'))}",
    ]


def bar(used: Any, total: Any) -> str:
    """How full the cache is, drawn and in per cent."""
    part, whole = _number(used), _number(total)
    if part is None or not whole or whole < 0:
        return "–"
    share = min(1.0, max(0.0, part / whole))
    filled = round(share * _BAR)
    return "█" * filled + "░" * (_BAR - filled) + f" {share:4.0%}"


def _number(value: Any) -> float | None:
    # NaN is not equal to itself.
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


def _count(value: Any) -> str:
    found = _number(value)
    return "–" if found is None else f"{found:.0f}"


def _rate(value: Any) -> str:
    found = _number(value)
    return "–" if found is None else f"{found:.1f}"


def _time(value: Any) -> str:
    found = _number(value)
    if found is None:
        return "–"
    return f"{found * 1000:.0f} ms" if found < 1 else f"{found:.1f} s"
