"""`ai-assistant verify-boot`: was the published image booted, and if not, what differs?"""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ai_assistant.cli.options import Debug, Json, usage_error
from ai_assistant.cli.output import EXIT_ERROR, Output, printable
from ai_assistant.errors import AIAssistantError

if TYPE_CHECKING:
    from ai_assistant.tee.evidence import Machine
    from ai_assistant.tee.measurements import Measurements
    from ai_assistant.tee.report import Check, Report
    from ai_assistant.tee.running import Running

EXIT_CANNOT_TELL = 2


def _file(name: str, help_text: str) -> Any:
    return typer.Option(name, metavar="FILE", help=help_text, show_default=False)


def verify_boot(
    context: typer.Context,
    measurements: Annotated[
        Path | None, _file("--measurements", "Published measurements, not the device's own.")
    ] = None,
    signature: Annotated[Path | None, _file("--signature", "Their signature; FILE.sig beside them otherwise.")] = None,
    key: Annotated[Path | None, _file("--key", "The release key, not the device's own.")] = None,
    event_log: Annotated[Path | None, _file("--event-log", "An event log from elsewhere; goes with --pcrs.")] = None,
    pcrs: Annotated[Path | None, _file("--pcrs", "PCR values from elsewhere, as --save writes them.")] = None,
    system_log: Annotated[Path | None, _file("--system-log", "systemd's log that belongs to --event-log.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="DIR", help="Keep logs, values and files as evidence.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare what the TPM measured of this boot with what the release publishes.

    Needs root, except with --event-log, --pcrs and --measurements. Exit status 0: as published; 1: something
    differs, and each difference is explained; 2: nobody can tell (no TPM, no event log, not root, no
    measurements, or badly signed ones).

    \b
    Examples:
      sudo ai-assistant verify-boot
      sudo ai-assistant verify-boot --save evidence
      ai-assistant verify-boot --event-log evidence/event-log.bin --pcrs evidence/pcrs.json \\
          --system-log evidence/tpm2-measure.log --measurements evidence/measurements.json
    """
    out: Output = context.obj
    if (event_log is None) != (pcrs is None):
        raise usage_error("--event-log and --pcrs go together: values and log of one boot")
    if system_log is not None and event_log is None:
        raise usage_error("--system-log goes with --event-log and --pcrs")
    if signature is not None and measurements is None:
        raise usage_error("--signature goes with --measurements")
    if event_log is not None and measurements is None:
        raise usage_error("a log from elsewhere needs --measurements FILE of the release that ran there")
    given = _Given(measurements, signature, key, event_log, pcrs, system_log)
    try:
        found = _judge(given, save)
    except AIAssistantError as error:
        out.error(error.name, error.message, error.hint)
        raise typer.Exit(EXIT_CANNOT_TELL) from error
    document = described(found.report, found.expected, found.source, here=event_log is None)
    if save is not None:
        _save_report(save, document)
    if out.json:
        out.document(document)
    else:
        _show(out, found.report, found.expected, here=event_log is None)
    if found.report.differences:
        raise typer.Exit(EXIT_ERROR)


@dataclass(frozen=True, slots=True)
class _Given:
    measurements: Path | None
    signature: Path | None
    key: Path | None
    event_log: Path | None
    pcrs: Path | None
    system_log: Path | None


@dataclass(frozen=True, slots=True)
class _Found:
    report: Report
    expected: Measurements
    source: str


def machine() -> Machine:
    from ai_assistant.tee.evidence import Machine

    return Machine()


def _judge(given: _Given, save: Path | None) -> _Found:
    from ai_assistant.tee import evidence
    from ai_assistant.tee.eventlog import parse, parse_pcrs, parse_userspace
    from ai_assistant.tee.measurements import MAX_FILE_BYTES, MAX_SIGNATURE_BYTES
    from ai_assistant.tee.verify import verify

    here = machine()
    files: dict[str, bytes] = {}
    system: Running | None = None
    if given.event_log is None or given.pcrs is None:
        here.demand_root()
        values, said = here.values()
        log = here.event_log()
        files = {"event-log.bin": log, "pcrs.json": evidence.pcrs_json(values)}
        system = here.running()
        files["command-line.txt"] = (system.command_line + "\n").encode()
        files["root.txt"] = f"{system.root.source}\n{system.root.table}".encode()
    else:
        log = evidence.given(given.event_log)
        values = parse_pcrs(evidence.given(given.pcrs))
        said = evidence.given(given.system_log) if given.system_log is not None else None
        files = {"event-log.bin": log, "pcrs.json": evidence.pcrs_json(values)}
    if said is not None:
        files["tpm2-measure.log"] = said
    if save is not None:
        # Before anything is judged: a log that cannot be read is evidence too.
        evidence.save(save, files)
    key = evidence.given(given.key, MAX_FILE_BYTES) if given.key is not None else here.key()
    if given.measurements is not None:
        beside = given.signature or given.measurements.with_name(given.measurements.name + ".sig")
        raw = evidence.given(given.measurements, MAX_FILE_BYTES)
        candidates = [evidence.Published(str(given.measurements), raw, evidence.given(beside, MAX_SIGNATURE_BYTES))]
    else:
        candidates = here.published()
    uki, command_line = (system.uki, system.command_line) if system is not None else ("", "")
    chosen, expected = evidence.choose(candidates, key, uki, command_line)
    if save is not None:
        names = {"measurements.json": chosen.raw, "measurements.json.sig": chosen.signature, "release.pub": key}
        evidence.add(save, names)
    extensions = parse_userspace(said) if said is not None else None
    return _Found(verify(parse(log), extensions, values, expected, system), expected, chosen.name)


def _save_report(save: Path, document: dict[str, Any]) -> None:
    from ai_assistant.tee import evidence

    text = json_format.dumps(document, indent=1, ensure_ascii=False) + "\n"
    evidence.add(save, {"report.json": text.encode(errors="replace")})


def described(report: Report, expected: Measurements, source: str, *, here: bool) -> dict[str, Any]:
    """The report as --json prints it; docs/verify-boot.md documents it."""
    return {
        "verdict": str(report.verdict),
        "this_machine": here,
        "release": {
            "name": expected.name,
            "profile": expected.profile,
            "version": expected.version,
            "architecture": expected.architecture,
            "uki": expected.uki,
            "root_hash": expected.root_hash,
            "measurements": source,
        },
        "phases": list(report.phases),
        "checks": [
            {
                "id": check.id,
                "component": check.component,
                "pcr": check.pcr,
                "verdict": str(check.verdict),
                "found": check.found,
                "expected": check.expected,
                "meaning": check.meaning,
                "hint": check.hint,
            }
            for check in report.checks
        ],
    }


def _show(out: Output, report: Report, expected: Measurements, *, here: bool) -> None:
    release = f"{expected.name} {expected.version} ({expected.profile}, {expected.architecture})"
    if out.terminal():
        _table(report)
    else:
        rows = [(c.component, _pcr(c), str(c.verdict), " ".join(c.found.split())) for c in report.checks]
        out.table(("component", "PCR", "verdict", "found"), rows)
    for check in report.differences:
        out.line()
        out.line(f"differs: {check.component}" + (f" (PCR {check.pcr})" if check.pcr is not None else ""))
        out.line(f"  expected: {check.expected}")
        out.line(f"  found: {check.found}")
        out.line(f"  {check.meaning}")
        out.line(f"  hint: {check.hint}")
    out.line()
    subject = "this boot" if here else "the boot of this log"
    if not report.differences:
        out.line(f"As published: {subject} is {release}.")
    else:
        count = len(report.differences)
        out.line(f"Differs: {subject} is not {release} in {count} point{'s' if count > 1 else ''}, explained above.")


def _pcr(check: Check) -> str:
    return "" if check.pcr is None else str(check.pcr)


def _table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"as published": "green", "differs": "bold red", "information": "dim"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("component", "PCR", "verdict", "found"):
        table.add_column(title, justify="right" if title == "PCR" else "left", overflow="fold")
    for check in report.checks:
        verdict = str(check.verdict)
        # Text, not markup: what was found is somebody else's words.
        table.add_row(
            Text(printable(check.component)),
            _pcr(check),
            Text(verdict, colours[verdict]),
            Text(printable(check.found)),
        )
    Console(highlight=False).print(table)
