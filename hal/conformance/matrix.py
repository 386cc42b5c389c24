"""The operator matrix: which operators run for which types, as Markdown and as HTML."""

from __future__ import annotations

from typing import Any

import jinja2

from ai_assistant.hal.conformance.case import Outcome, Result
from ai_assistant.hal.conformance.levels import PROFILE_PREFIX
from ai_assistant.hal.conformance.report import Report

_MARKS = {
    Outcome.PASSED: "yes",
    Outcome.FAILED: "WRONG",
    Outcome.CRASHED: "CRASH",
    Outcome.HUNG: "HANG",
    Outcome.UNSUPPORTED: "–",
    Outcome.EXPECTED: "known",
    Outcome.UNEXPECTED: "fixed?",
}
_LEGEND = (
    "yes: right for every example that the backend takes; some: it takes only some of them; –: declared unsupported;"
    " known: an expected failure; fixed?: listed as expected, and passed; WRONG, CRASH, HANG: failed."
)

_MARKDOWN = """\
# {{ backend.name|md }} {{ backend.version|md }}: {{ level }}

{{ device.name|md }} ({{ device.kind|md }}), suite {{ suite.version|md }}, {{ made }}, {{ word }}.
{% if next %}
Not higher because: {{ next|md }}
{% endif %}

## Operators

{% for row in lines %}
{{ row }}
{% endfor %}

{{ legend }}

## Other cases

| case | outcome | |
|---|---|---|
{% for result in others %}
| {{ result.case }} | {{ result.outcome }} | {{ result.detail|md }} |
{% endfor %}
{% if failures %}

## What failed

{% for result in failures %}
- {{ result.case }} {{ result.outcome }}: {{ result.detail|md }}
{% endfor %}
{% endif %}
"""

_HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ backend.name }}: {{ level }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse } th, td { border: 1px solid #ccc; padding: .1rem .6rem; text-align: left }
.yes, .passed { background: #dff3df } .some { background: #f1f7cf } .known, .expected-failure { background: #fff0cc }
.WRONG, .CRASH, .HANG, .fixed, .failed, .crashed, .hung, .unexpected-pass { background: #f8cfcf; font-weight: 600 }
</style>
<h1>{{ backend.name }} {{ backend.version }}: {{ level }}</h1>
<p>{{ device.name }} ({{ device.kind }}), suite {{ suite.version }}, {{ made }}, {{ word }}.</p>
{% if next %}
<p>Not higher because: {{ next }}</p>
{% endif %}
<h2>Operators</h2>
<table>
<tr><th>operator</th>{% for type in types %}<th>{{ type }}</th>{% endfor %}</tr>
{% for op, marks in rows %}
<tr><th>{{ op }}</th>{% for mark in marks %}<td class="{{ mark|replace('?', '') }}">{{ mark }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p>{{ legend }}</p>
<h2>Other cases</h2>
<table>
{% for result in others %}
<tr><td>{{ result.case }}</td><td class="{{ result.outcome }}">{{ result.outcome }}</td>
<td>{{ result.detail }}</td></tr>
{% endfor %}
</table>
{% if failures %}
<h2>What failed</h2>
<ul>
{% for result in failures %}
<li>{{ result.case }} {{ result.outcome }}: {{ result.detail }}</li>
{% endfor %}
</ul>
{% endif %}
</html>
"""


def _escape_markdown(text: str) -> str:
    """A backend's text must not become a table's edge, a link or HTML."""
    return "".join("\\" + letter if letter in "\\`*_[]<>|#&!" else letter for letter in " ".join(text.split()))


def _mark(result: Result) -> str:
    if result.outcome == Outcome.PASSED and result.supported < result.examples:
        return "some"
    return _MARKS[result.outcome]


def _facts(report: Report, signed: bool) -> dict[str, Any]:
    cells: dict[str, dict[str, str]] = {}
    others: list[Result] = []
    for result in report.results:
        if result.case.startswith("L3.") and not result.case.startswith(PROFILE_PREFIX):
            _, op, kind = result.case.split(".")
            cells.setdefault(op, {})[kind] = _mark(result)
        else:
            others.append(result)
    order = ("f32", "f16", "f64", "i64", "i32", "i8", "u8", "bool")
    types = [kind for kind in order if any(kind in row for row in cells.values())]
    level, next_needs = report.judged
    rows = [(op, [row.get(kind, "") for kind in types]) for op, row in sorted(cells.items())]
    lines = [("operator", types), ("---", ["---"] * len(types)), *rows]
    return {
        "backend": report.backend,
        "device": report.device,
        "suite": report.suite,
        "made": report.made,
        "level": str(level),
        "next": next_needs,
        "word": "signed" if signed else "unsigned",
        "types": types,
        "rows": rows,
        "lines": [f"| {' | '.join((op, *marks))} |" for op, marks in lines],
        "legend": _LEGEND,
        "others": others,
        "failures": [result for result in report.results if result.outcome.bad],
    }


def markdown(report: Report, *, signed: bool) -> str:
    environment = jinja2.Environment(autoescape=False, trim_blocks=True, undefined=jinja2.StrictUndefined)  # noqa: S701
    environment.filters["md"] = _escape_markdown
    return environment.from_string(_MARKDOWN).render(_facts(report, signed)).rstrip() + "\n"


def html(report: Report, *, signed: bool) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_HTML).render(_facts(report, signed))
