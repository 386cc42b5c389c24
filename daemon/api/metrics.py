"""The daemon's numbers in Prometheus' text format, or in OpenMetrics where the client asks for it.

`FAMILIES` says what there is; docs/metrics.md explains it, and a test keeps the two equal. A model is named only to
those who may see it (`contract.caller`), so a transient one appears to its owner and to root. There are at most
`MAX_MODELS` models in one answer.
"""

from __future__ import annotations

import math
import os
import resource
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.daemon.contract import Counters, ModelRecord, ModelState, Service
from ai_assistant.daemon.metrics import EVICTIONS, MAX_MODELS, OUTCOMES, Histogram, Metrics, ModelMetrics
from ai_assistant.engines.contract import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PREFIX = "ai_assistant_"


@dataclass(frozen=True, slots=True)
class Family:
    kind: str
    """counter | gauge | histogram"""
    help: str
    labels: tuple[str, ...] = ()


_M = ("model",)
FAMILIES: Mapping[str, Family] = {
    "requests_total": Family("counter", "Generations, embeddings, rankings and classifications asked for."),
    "errors_total": Family("counter", "Requests that ended in an error."),
    "cancelled_total": Family("counter", "Requests whose client went away or cancelled."),
    "prompt_tokens_total": Family("counter", "Tokens read."),
    "completion_tokens_total": Family("counter", "Tokens generated."),
    "prefill_seconds_total": Family("counter", "Time spent reading prompts."),
    "decode_seconds_total": Family("counter", "Time spent generating."),
    "worker_restarts_total": Family("counter", "Workers that crashed."),
    "running": Family("gauge", "Generations under way."),
    "models": Family("gauge", "Models known, by state.", ("state",)),
    "model_memory_estimate_bytes": Family("gauge", "What the loaded models should need."),
    "model_requests_total": Family("counter", "Requests that ended, by outcome.", ("model", "outcome")),
    "model_prompt_tokens_total": Family("counter", "Tokens of prompts and of texts.", _M),
    "model_completion_tokens_total": Family("counter", "Tokens generated.", _M),
    "model_cached_tokens_total": Family("counter", "Tokens of prompts that were in the cache.", _M),
    "model_queue_seconds": Family("histogram", "Time a generation waited for its place.", _M),
    "model_ttft_seconds": Family("histogram", "Time to the first token, waiting and loading included.", _M),
    "model_tpot_seconds": Family("histogram", "Time for each generated token.", _M),
    "model_prefill_tokens_per_second": Family("histogram", "Speed of reading, one value a request.", _M),
    "model_decode_tokens_per_second": Family("histogram", "Speed of generating, one value a request.", _M),
    "model_loads_total": Family("counter", "Loads that succeeded.", _M),
    "model_load_failures_total": Family("counter", "Loads that failed.", _M),
    "model_load_seconds_total": Family("counter", "Time the loads took that succeeded.", _M),
    "model_evictions_total": Family("counter", "Times it was unloaded, by reason.", ("model", "reason")),
    "model_worker_restarts_total": Family("counter", "Times its worker crashed.", _M),
    "model_loaded": Family("gauge", "1 when it is loaded, else 0.", _M),
    "model_pinned": Family("gauge", "1 when it is never unloaded, else 0.", _M),
    "model_estimate_bytes": Family("gauge", "Memory that loading it takes.", _M),
    "model_resident_bytes": Family("gauge", "Memory that is set aside for it while it is loaded.", _M),
    "model_running": Family("gauge", "Generations under way now.", _M),
    "model_waiting": Family("gauge", "Generations that wait for a place.", _M),
    "model_sequences": Family("gauge", "Generations that can run at the same time.", _M),
    "model_kv_cells": Family("gauge", "Tokens that the cache has room for.", _M),
    "model_kv_used_cells": Family("gauge", "Tokens in the cache.", _M),
    "model_kv_untouched_bytes": Family("gauge", "Memory that the cache takes only when it fills.", _M),
    "model_prefill_rate": Family("gauge", "Tokens per second read lately.", _M),
    "model_decode_rate": Family("gauge", "Tokens per second generated lately.", _M),
    "model_spilled_bytes": Family("gauge", "States of idle conversations outside the cache.", _M),
    "model_prefix_hits_total": Family("counter", "Prompts that began in the cache, since the load.", _M),
    "model_prefix_tokens_total": Family("counter", "Tokens not read again for that, since the load.", _M),
    "model_restored_total": Family("counter", "Conversations brought back from outside, since the load.", _M),
    "model_draft_tokens_total": Family("counter", "Tokens guessed ahead, since the load.", _M),
    "model_draft_accepted_total": Family("counter", "Guesses that were right, since the load.", _M),
    "memory_total_bytes": Family("gauge", "Memory of the machine."),
    "memory_available_bytes": Family("gauge", "Memory to be had without swapping."),
    "load_1m": Family("gauge", "Processes that want to run, mean of a minute."),
    "disk_free_bytes": Family("gauge", "Free where models are kept."),
    "watts": Family("gauge", "Power; absent where nothing measures it."),
    "temperature_celsius": Family("gauge", "Hottest processor sensor; absent where there is none."),
    "http_requests_total": Family("counter", "Answers of the socket API.", ("endpoint", "status")),
    "http_connections": Family("gauge", "Open connections of the socket API."),
    "process_cpu_seconds_total": Family("counter", "CPU time of the daemon."),
    "process_resident_memory_bytes": Family("gauge", "Memory of the daemon."),
    "process_open_fds": Family("gauge", "Open descriptors of the daemon."),
}

_TOTALS = {
    "requests_total": "requests",
    "errors_total": "errors",
    "cancelled_total": "cancelled",
    "prompt_tokens_total": "prompt_tokens",
    "completion_tokens_total": "completion_tokens",
    "prefill_seconds_total": "prefill_s",
    "decode_seconds_total": "decode_s",
    "worker_restarts_total": "worker_restarts",
    "running": "running",
}
_COUNTED = {
    "model_prompt_tokens_total": "prompt_tokens",
    "model_completion_tokens_total": "completion_tokens",
    "model_cached_tokens_total": "cached_tokens",
    "model_loads_total": "loads",
    "model_load_failures_total": "load_failures",
    "model_load_seconds_total": "load_s",
    "model_worker_restarts_total": "restarts",
}
_HISTOGRAMS = {
    "model_queue_seconds": "queue_s",
    "model_ttft_seconds": "ttft_s",
    "model_tpot_seconds": "tpot_s",
    "model_prefill_tokens_per_second": "prefill_rate",
    "model_decode_tokens_per_second": "decode_rate",
}
_NOW = {
    "model_running": "running",
    "model_waiting": "waiting",
    "model_sequences": "sequences",
    "model_kv_cells": "kv_cells",
    "model_kv_used_cells": "kv_used",
    "model_kv_untouched_bytes": "kv_untouched_bytes",
    "model_prefill_rate": "prefill_tokens_per_s",
    "model_decode_rate": "decode_tokens_per_s",
    "model_spilled_bytes": "spilled_bytes",
    "model_prefix_hits_total": "prefix_hits",
    "model_prefix_tokens_total": "prefix_tokens",
    "model_restored_total": "restored",
    "model_draft_tokens_total": "draft_tokens",
    "model_draft_accepted_total": "draft_accepted",
}
_MACHINE = {
    "memory_total_bytes": "memory_total_bytes",
    "memory_available_bytes": "memory_available_bytes",
    "load_1m": "load_1m",
    "disk_free_bytes": "disk_free_bytes",
    "watts": "watts",
    "temperature_celsius": "temperature_c",
}


async def page(service: Service, accept: str = "") -> tuple[str, str]:
    """(text, content type) for a client that sent this Accept header. Asks each loaded model how it is."""
    openmetrics = "application/openmetrics-text" in accept
    text = render(service, await service.stats(), openmetrics=openmetrics)
    return text, OPENMETRICS_TYPE if openmetrics else CONTENT_TYPE


def render(service: Service, stats: Mapping[str, EngineStats], *, openmetrics: bool = False) -> str:
    """All metrics that there are numbers for; times are in seconds and sizes in bytes."""
    page = _Page()
    _daemon(page, service.counters)
    records = service.models()
    states = Counter(record.state for record in records)
    for state in ModelState:
        page.add("models", states.get(state, 0), str(state))
    loaded = (r.memory_estimate_bytes for r in records if r.state is ModelState.LOADED)
    page.add("model_memory_estimate_bytes", sum(loaded))
    metrics = service.counters.metrics
    for record in sorted(records, key=lambda each: each.state is not ModelState.LOADED)[:MAX_MODELS]:
        _model(page, record, metrics.models.get(record.name), stats.get(record.name))
    status = service.status()
    for name, key in _MACHINE.items():
        page.add(name, status.get(key))
    _http(page, metrics)
    return page.text(openmetrics)


class _Page:
    """Samples by family; a format wants each family in one piece."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {name: [] for name in FAMILIES}

    def add(self, name: str, value: float | None, *labels: str) -> None:
        """None and what is no number is left out: absent is not nought."""
        if isinstance(value, int | float) and math.isfinite(value):
            self._lines[name].append(f"{PREFIX}{name}{_labels(FAMILIES[name].labels, labels)} {value}")

    def histogram(self, name: str, histogram: Histogram, *labels: str) -> None:
        names, lines = FAMILIES[name].labels, self._lines[name]
        shown = _labels(names, labels)
        count = 0
        for bound, count in histogram.cumulative():
            le = "+Inf" if math.isinf(bound) else repr(bound)
            lines.append(f"{PREFIX}{name}_bucket{_labels((*names, 'le'), (*labels, le))} {count}")
        lines.append(f"{PREFIX}{name}_count{shown} {count}")
        lines.append(f"{PREFIX}{name}_sum{shown} {histogram.total}")

    def text(self, openmetrics: bool) -> str:
        out: list[str] = []
        for name, lines in self._lines.items():
            if lines:
                family = FAMILIES[name]
                # OpenMetrics names a counter without what its samples end in.
                shown = PREFIX + (name.removesuffix("_total") if openmetrics and family.kind == "counter" else name)
                out += [f"# HELP {shown} {family.help}", f"# TYPE {shown} {family.kind}"]
                out += lines
        return "\n".join([*out, "# EOF"] if openmetrics else out) + "\n"


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    """Escaped and in braces; nothing of none."""
    if not names:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)) + "}"


def _escaped(value: str) -> str:
    # A lone surrogate would be no UTF-8.
    clean = value.encode("utf-8", "replace").decode()
    return clean.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _daemon(page: _Page, counters: Counters) -> None:
    for name, attribute in _TOTALS.items():
        page.add(name, getattr(counters, attribute))
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    page.add("process_cpu_seconds_total", round(cpu.ru_utime + cpu.ru_stime, 3))
    page.add("process_resident_memory_bytes", _rss())
    page.add("process_open_fds", _descriptors())


def _model(page: _Page, record: ModelRecord, past: ModelMetrics | None, now: EngineStats | None) -> None:
    name = record.name
    page.add("model_loaded", int(record.state is ModelState.LOADED), name)
    page.add("model_pinned", int(record.pinned), name)
    page.add("model_estimate_bytes", record.memory_estimate_bytes, name)
    page.add("model_resident_bytes", record.resident_bytes, name)
    if now is not None:
        for family, attribute in _NOW.items():
            page.add(family, getattr(now, attribute), name)
    # One that nothing has happened to has no numbers yet, and costs no hundred lines.
    if past is None:
        return
    for outcome in OUTCOMES:
        page.add("model_requests_total", past.requests[outcome], name, outcome)
    for reason in EVICTIONS:
        page.add("model_evictions_total", past.evictions[reason], name, reason)
    for family, attribute in _COUNTED.items():
        page.add(family, getattr(past, attribute), name)
    for family, attribute in _HISTOGRAMS.items():
        page.histogram(family, getattr(past, attribute), name)


def _http(page: _Page, metrics: Metrics) -> None:
    for (endpoint, status), count in sorted(metrics.http.items()):
        page.add("http_requests_total", count, endpoint, str(status))
    page.add("http_connections", metrics.connections())


def _rss() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    # Listing the folder opens one more.
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - names are enough
