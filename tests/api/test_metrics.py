"""/metrics: valid in both formats, complete in the documentation, and discreet."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ai_assistant.daemon.api.metrics import FAMILIES, PREFIX, render
from ai_assistant.engines.contract import EngineStats, Usage
from tests.api.conftest import Api
from tests.support.fake_service import FakeService

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:\w+="(?:[^"\\\n]|\\[\\n"])*",?)*)\})? (\S+)')
LABEL = re.compile(r'(\w+)="((?:[^"\\\n]|\\[\\n"])*)"')
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str, openmetrics: bool = False) -> Samples:
    """Samples by name and labels; fails for whatever the format forbids."""
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    if openmetrics:
        assert lines.pop() == "# EOF"
    found: Samples = {}
    family, kind, seen = "", "", set()
    for line in lines:
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert family not in seen, "a family is in one piece"
            seen.add(family)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        name, labels, value = match.groups()
        suffixes = {"histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}.get(
            kind, ("_total",) if openmetrics else ("",)
        )
        assert name in {family + each for each in suffixes}, (name, family)
        key = (name, frozenset(LABEL.findall(labels or "")))
        assert key not in found, "a series is there once"
        found[key] = float(value)
    return found


def busy() -> FakeService:
    service = FakeService()
    metrics = service.counters.metrics
    metrics.observe("assistant:1", Usage(100, 20, 60, 0.5, 2.0, 4.0), 2.5)
    metrics.ended("assistant:1", "done")
    metrics.loaded("assistant:1", 1.5)
    metrics.evicted("assistant:1", "memory")
    metrics.http[("/v1/models", 200)] += 3
    service.records = [replace(service.records[0], resident_bytes=7), *service.records[1:]]
    service.state |= {
        "watts": 12.5, "temperature_c": 40.0, "load_1m": 0.5, "disk_free_bytes": 9,
        "memory_total_bytes": 8, "memory_available_bytes": 4,
    }  # fmt: skip
    return service


def test_both_formats_have_the_same_samples() -> None:
    service, stats = busy(), {"assistant:1": EngineStats(kv_cells=10, kv_used=4, draft_accepted=3)}
    plain = parsed(render(service, stats))
    assert plain.keys() == parsed(render(service, stats, openmetrics=True), openmetrics=True).keys()
    one = ("model", "assistant:1")
    assert plain[PREFIX + "model_kv_used_cells", frozenset({one})] == 4
    assert plain[PREFIX + "model_ttft_seconds_bucket", frozenset({one, ("le", "1.0")})] == 0
    assert plain[PREFIX + "model_ttft_seconds_bucket", frozenset({one, ("le", "2.5")})] == 1
    assert plain[PREFIX + "model_ttft_seconds_bucket", frozenset({one, ("le", "+Inf")})] == 1
    assert plain[PREFIX + "model_evictions_total", frozenset({one, ("reason", "memory")})] == 1
    assert plain[PREFIX + "watts", frozenset()] == 12.5


def test_the_documentation_lists_what_there_is() -> None:
    rows = dict(re.findall(r"^\| `ai_assistant_(\w+)` \| (.*) \|$", DOCS.read_text(), re.MULTILINE))
    assert rows == {n: f"{f.kind} | {', '.join(f.labels)} | {f.help}" for n, f in FAMILIES.items()}
    text = render(busy(), {"assistant:1": EngineStats()})
    assert set(re.findall(r"^# TYPE ai_assistant_(\w+) ", text, re.MULTILINE)) == set(FAMILIES)


def test_what_nothing_measures_is_absent() -> None:
    service = busy()
    service.state |= {"watts": None, "temperature_c": float("nan")}
    names = {name for name, _ in parsed(render(service, {}))}
    assert not {PREFIX + "watts", PREFIX + "temperature_celsius", PREFIX + "model_kv_cells"} & names


def test_a_model_that_the_caller_does_not_see_is_not_named() -> None:
    service = busy()
    service.counters.metrics.ended("secret-t1:1", "done")
    assert "secret" not in render(service, {"secret-t1:1": EngineStats()})


def test_hostile_names_are_escaped() -> None:
    service = busy()
    name = 'a"b\\c\nd} 1{}'
    service.records = [replace(service.records[0], name=name)]
    found = parsed(render(service, {}))
    assert found[PREFIX + "model_loaded", frozenset({("model", 'a\\"b\\\\c\\nd} 1{}')})] == 1


async def test_over_the_socket(api: Api) -> None:
    await api.client.get("/v1/models/assistant:1")
    response = await api.client.get(
        "/metrics?anything", headers={"accept": "application/openmetrics-text;version=1.0.0"}
    )
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found = parsed(response.text, openmetrics=True)
    route = frozenset({("endpoint", "/v1/models/{name:path}"), ("status", "200")})
    assert found[PREFIX + "http_requests_total", route] == 1
    assert found[PREFIX + "http_connections", frozenset()] == 1
    assert (await api.client.get("/metrics")).headers["content-type"].startswith("text/plain; version=0.0.4")
