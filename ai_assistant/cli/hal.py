"""`ai-assistant hal …`: backends of devices – which there are, and whether they do what they must."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ai_assistant.cli.group import Command
from ai_assistant.cli.options import Debug, Json, usage_error
from ai_assistant.cli.output import EXIT_ERROR, Output, progress_bar
from ai_assistant.errors import AIAssistantError

if TYPE_CHECKING:
    from ai_assistant.hal.conformance.report import Report
    from ai_assistant.hal.contract import Backend

app = typer.Typer(help="Backends of devices: begin, list and certify.", no_args_is_help=True, rich_markup_mode=None)


def _option(name: str, metavar: str, help_text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help_text, show_default=False)


@app.command("list", cls=Command)
def list_backends(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the backends and their devices; of those that have none, what is missing and what helps.

    \b
    Examples:
      ai-assistant hal list
      ai-assistant hal list --json | jq '.[].devices'
    """
    from ai_assistant.hal import discovery

    out: Output = context.obj
    found = discovery.discover()
    rows = [_listed(name, backend, found.sources.get(name, "")) for name, backend in found.backends.items()]
    for name, problem in found.problems.items():
        rows.append({"backend": name, "version": "", "source": "", "devices": [], "unavailable": problem, "hint": ""})
    if out.json:
        out.document(rows)
        return
    lines: list[tuple[str, str, str, str]] = []
    for row in rows:
        devices = [(device["id"], f"{device['name']} ({device['kind']})") for device in row["devices"]]
        for device, text in devices or [("-", f"unavailable: {row['unavailable']}")]:
            lines.append((row["backend"], row["version"], device, text))
    out.table(("backend", "version", "device", ""), lines)
    for row in rows:
        if row["hint"] and not row["devices"]:
            out.note(f"{row['backend']}: {row['hint']}")


def _listed(name: str, backend: Backend, source: str) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": name, "version": backend.version, "source": source, "devices": []}
    try:
        probe = backend.probe()
    except AIAssistantError as error:
        return row | {"unavailable": error.message, "hint": error.hint}
    except Exception as error:  # a vendor's code: one that is broken must not hide the others
        return row | {"unavailable": f"{type(error).__name__}: {str(error)[:200]}", "hint": ""}
    row["version"] = backend.version  # one in a process of its own knows it from now on
    row["devices"] = [{"id": each.id, "name": each.name, "kind": each.kind} for each in probe.devices]
    return row | {"unavailable": probe.unavailable, "hint": probe.hint}


@app.command("certify", cls=Command)
def certify(
    context: typer.Context,
    backend: Annotated[
        str, typer.Argument(metavar="BACKEND", help="A name, or a shared library or Python file.", show_default=False)
    ],
    level: Annotated[str, typer.Option("--level", metavar="LEVEL", help="bronze, silver or gold.")] = "gold",
    device: Annotated[str, _option("--device", "ID", "The device; the first one otherwise.")] = "",
    folder: Annotated[Path | None, _option("--out", "DIR", "Write report.json, matrix.md and matrix.html.")] = None,
    key: Annotated[Path | None, _option("--key", "FILE", "Sign the report; without it, it is unsigned.")] = None,
    expected: Annotated[Path | None, _option("--expected", "FILE", "Known failures, with reasons.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of all random inputs.")] = 0,
    examples: Annotated[int, typer.Option("--examples", min=1, max=10000, help="Inputs tried per operator.")] = 20,
    limit: Annotated[float, typer.Option("--limit", min=1, max=86400, help="Seconds that a case may take.")] = 60.0,
    soak: Annotated[float, typer.Option("--soak", min=0, max=86400, help="Seconds that a network is run.")] = 10.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the conformance suite on a backend, and say which level it reaches.

    The backend runs in a process of its own: a crash or a hang fails one case, and the rest is run. Loading a
    file runs its code with your rights. Exit status 0: the level was reached; 1: it was not.

    \b
    Examples:
      ai-assistant hal certify cpu
      ai-assistant hal certify ./libvendor.so --level silver --out certified --key vendor.pem
    """
    from ai_assistant.hal.conformance import certify as suite
    from ai_assistant.hal.conformance import report as reports
    from ai_assistant.hal.conformance.run import Settings

    out: Output = context.obj
    try:
        wanted = suite.wanted(level)
    except ValueError:
        raise usage_error(f"there is no level {level!r}: bronze, silver or gold") from None
    # What would fail at the end fails before the work.
    signing = reports.read_key(key) if key is not None else None
    known = suite.read_expected(expected) if expected is not None else None
    settings = Settings(backend, device, wanted.cases, seed, examples, limit, soak)
    with progress_bar(out, f"certifying {backend}") as update:
        report = suite.certify(
            settings,
            expected=known,
            progress=lambda done, total, case: update(done / max(1, total), case),
        )
    paths = suite.write(report, folder, signing) if folder is not None else {}
    reached, next_needs = report.judged
    if out.json:
        out.document(report.to_dict())
    else:
        _tell(out, report, {name: str(path) for name, path in paths.items()}, signing is not None)
        if not reached.reaches(wanted):
            out.line(f"not higher because: {next_needs}")
    if not reached.reaches(wanted):
        raise typer.Exit(EXIT_ERROR)


def _tell(out: Output, report: Report, paths: dict[str, str], signed: bool) -> None:
    from collections import Counter

    from ai_assistant.hal.backends import BUILT_IN

    for result in report.results:
        # Of operators hundreds may be unsupported: those are in the matrix.
        if result.outcome.bad or (result.outcome == "unsupported" and result.case < "L3"):
            out.line(f"{result.outcome}: {result.case}  {result.detail}")
    counts = Counter(str(result.outcome) for result in report.results)
    rows = [
        ("backend", f"{report.backend['name']} {report.backend['version']}"),
        ("device", f"{report.device['name']} ({report.device['kind']})"),
        ("suite", f"{report.suite['version']} ({report.suite['sha256'][:12]}), seed {report.seed}"),
        ("cases", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))),
        ("level", str(report.judged[0])),
    ]
    if "file" in report.backend and report.backend["name"] in BUILT_IN:
        out.note(f"the file calls itself {report.backend['name']}, as a backend of the product: give it its own name")
    out.fields([*rows, *((name, path + ("" if signed else ", unsigned")) for name, path in paths.items())])


@app.command("verify-report", cls=Command)
def verify_report(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A report.json.", show_default=False)],
    public_key: Annotated[str, _option("--public-key", "KEY", "Who must have signed it: base64, or a PEM file.")] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a report: its signature, and that its results earn the level that it names.

    Without --public-key the signature only shows that the report was not changed, not who made it; an unsigned
    report is refused then too. Exit status 0: it holds; 1: it does not; 3: the signature is missing or wrong.

    \b
    Examples:
      ai-assistant hal verify-report certified/report.json
      ai-assistant hal verify-report report.json --public-key vendor.pub
    """
    from ai_assistant.errors import InvalidArgument, NotAuthorized
    from ai_assistant.hal.conformance import report as reports
    from ai_assistant.hal.conformance import suite

    out: Output = context.obj
    wanted = reports.read_public(public_key) if public_key else None
    try:
        with file.open("rb") as stream:
            data = stream.read(reports.MAX_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(f"{file.name} cannot be read: {error.strerror}") from error
    verified = reports.verify(data, wanted)
    if not verified.public_key:
        raise NotAuthorized("the report is unsigned", hint="ai-assistant hal certify signs with --key FILE")
    report = verified.report
    same = report.suite["sha256"] == suite.digest()
    if out.json:
        out.document(
            {
                "level": str(verified.level),
                "backend": dict(report.backend),
                "device": dict(report.device),
                "made": report.made,
                "public_key": verified.public_key,
                "trusted": wanted is not None,
                "same_suite": same,
            }
        )
        return
    out.fields(
        [
            ("backend", f"{report.backend['name']} {report.backend['version']}"),
            ("device", f"{report.device['name']} ({report.device['kind']})"),
            ("made", report.made),
            ("suite", f"{report.suite['version']}, {'this one' if same else 'other files than here'}"),
            ("signed by", verified.public_key + ("" if wanted is not None else "  (nobody was asked for)")),
            ("level", str(verified.level)),
        ]
    )


@app.command("keygen", cls=Command)
def keygen(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the key is kept.", show_default=False)],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a key to sign reports with. The file is for you alone.

    The public key is printed, and written beside it (vendor.pub for vendor.pem): that one is for others.

    \b
    Examples:
      ai-assistant hal keygen vendor.pem
    """
    from ai_assistant.errors import InvalidArgument
    from ai_assistant.hal.conformance import report as reports

    out: Output = context.obj
    try:
        public = reports.public_text(reports.new_key(file))
    except OSError as error:
        raise InvalidArgument(f"{file.name} cannot be written: {error.strerror}") from error
    if out.json:
        out.document({"key": str(file), "public_key_file": str(reports.public_path(file)), "public_key": public})
    else:
        out.line(public)
        out.note(f"the key is in {file}: keep it to yourself. The public key above is in {reports.public_path(file)}")


@app.command("new", cls=Command)
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as acme-npu.", show_default=False)],
    language: Annotated[str, typer.Option("--language", "-l", metavar="LANGUAGE", help="python or c.")] = "python",
    folder: Annotated[Path, typer.Option("--folder", metavar="DIR", help="Where its folder is made.")] = Path(),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Begin a backend: a folder with one that works, to be changed step by step.

    \b
    Examples:
      ai-assistant hal new acme-npu
      ai-assistant hal new acme-npu --language c --folder ~/src
    """
    from ai_assistant.hal.scaffold import Language, scaffold

    out: Output = context.obj
    if language not in set(Language):
        raise usage_error(f"{language[:20]!r} is no language: python or c")
    made = scaffold(name, folder, Language(language))
    if out.json:
        out.document({"folder": str(made.folder), "files": [str(each) for each in made.files]})
        return
    for each in made.files:
        out.line(str(each))
    first = f"make -C {made.folder} && " if language == Language.C else ""
    out.note(f"next: {first}ai-assistant hal certify {made.backend} --level bronze")


@app.command("include", cls=Command)
def include(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Print the folder of ai_hal.h, for a compiler's -I.

    \b
    Examples:
      ai-assistant hal include
      cc -I$(ai-assistant hal include) -shared -fPIC -o acme.so acme.c
    """
    from ai_assistant.hal.scaffold import include_folder

    out: Output = context.obj
    path = str(include_folder())
    if out.json:
        out.document({"include": path})
    else:
        out.line(path)
