"""What each model does, in one look: for `GetStatistics`, and so for `ai-assistant top`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ai_assistant.daemon.contract import Service
from ai_assistant.daemon.metrics import OUTCOMES, ModelMetrics, quantile


async def statistics(service: Service) -> dict[str, Any]:
    """JSON-ready; "models" lists those that the caller may see, and what nobody knows is left out.

    Keys of each: see GetStatistics in the bus interface.
    """
    engines = await service.stats()
    metrics = service.counters.metrics
    models = []
    for record in service.models():
        entry: dict[str, Any] = {
            "name": record.name,
            "state": str(record.state),
            "pinned": record.pinned,
            "estimate_bytes": record.memory_estimate_bytes,
            "resident_bytes": record.resident_bytes,
            **_past(metrics.models.get(record.name) or ModelMetrics()),
            "ttft_p50_s": quantile(ttft := metrics.recent_ttft(record.name), 0.50),
            "ttft_p95_s": quantile(ttft, 0.95),
        }
        if record.name in engines:
            entry |= asdict(engines[record.name])
        models.append({key: value for key, value in entry.items() if value is not None})
    return {"models": models, "running": service.counters.running, "connections": metrics.connections()}


def _past(model: ModelMetrics) -> Mapping[str, Any]:
    return {
        **{f"requests_{outcome}": model.requests[outcome] for outcome in OUTCOMES},
        "prompt_tokens": model.prompt_tokens,
        "completion_tokens": model.completion_tokens,
        "cached_tokens": model.cached_tokens,
        "loads": model.loads,
        "worker_restarts": model.restarts,
    }
