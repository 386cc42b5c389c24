"""The daemon's numbers in Prometheus' text format."""

from __future__ import annotations

import os
import resource
from collections import Counter
from dataclasses import fields
from pathlib import Path

from ai_assistant.daemon.contract import Counters, ModelState, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HELP = {
    "requests": ("counter", "requests_total", "Generations and embeddings asked for."),
    "errors": ("counter", "errors_total", "Requests that ended in an error."),
    "cancelled": ("counter", "cancelled_total", "Requests whose client went away or cancelled."),
    "prompt_tokens": ("counter", "prompt_tokens_total", "Tokens read."),
    "completion_tokens": ("counter", "completion_tokens_total", "Tokens generated."),
    "prefill_s": ("counter", "prefill_seconds_total", "Time spent reading prompts."),
    "decode_s": ("counter", "decode_seconds_total", "Time spent generating."),
    "worker_restarts": ("counter", "worker_restarts_total", "Workers started again after a crash."),
    "running": ("gauge", "running", "Generations under way."),
}


def render(service: Service) -> str:
    """All metrics; names start with ai_assistant_, times are in seconds and sizes in bytes."""
    lines: list[str] = []
    for each in fields(Counters):
        kind, name, text = _HELP[each.name]
        _metric(lines, kind, name, text, {"": getattr(service.counters, each.name)})
    records = service.models()
    states = Counter(record.state for record in records)
    _metric(lines, "gauge", "models", "Models known, by state.",
            {f'{{state="{state}"}}': states.get(state, 0) for state in ModelState})  # fmt: skip
    _metric(lines, "gauge", "model_memory_estimate_bytes", "What the loaded models should need.",
            {"": sum(r.memory_estimate_bytes for r in records if r.state is ModelState.LOADED)})  # fmt: skip
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    _metric(lines, "counter", "process_cpu_seconds_total", "CPU time of the daemon.",
            {"": round(cpu.ru_utime + cpu.ru_stime, 3)})  # fmt: skip
    _metric(lines, "gauge", "process_resident_memory_bytes", "Memory of the daemon.", {"": _rss()})
    _metric(lines, "gauge", "process_open_fds", "Open descriptors of the daemon.", {"": _descriptors()})
    return "\n".join(lines) + "\n"


def _metric(lines: list[str], kind: str, name: str, text: str, samples: dict[str, float]) -> None:
    lines += [f"# HELP ai_assistant_{name} {text}", f"# TYPE ai_assistant_{name} {kind}"]
    lines += [f"ai_assistant_{name}{labels} {value}" for labels, value in samples.items()]


def _rss() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    # Listing the folder opens one more.
    return len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208 - names are enough
