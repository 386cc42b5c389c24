"""Reports: signed, read again with suspicion, judged anew; levels; the matrix; the support list."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ai_assistant.errors import AlreadyExists, InvalidArgument, InvalidConfig, NotAuthorized
from ai_assistant.hal.conformance import VERSION, matrix, report, support
from ai_assistant.hal.conformance.case import Outcome, Result
from ai_assistant.hal.conformance.certify import read_expected
from ai_assistant.hal.conformance.levels import ADDED, LIBRARY, MODELS, PROFILE_PREFIX, RUNTIME, Level, reached
from ai_assistant.hal.conformance.report import Report
from ai_assistant.hal.conformance.run import with_expected

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
P = Outcome.PASSED


def results(level: int) -> list[Result]:
    made = [Result(name, P) for name in RUNTIME]
    if level >= 3:
        made += [Result(f"{PROFILE_PREFIX}P{n}", P, "", 2, 2) for n in range(12)]
        made += [Result(f"L3.Op{n}.f32", P if n % 2 else Outcome.UNSUPPORTED, "", 4, 4) for n in range(60)]
    if level >= 4:
        made += [Result(name, P) for name in MODELS]
    return made


def made_report(level: int = 4, *, changed: dict[str, Result] | None = None, **fields: Any) -> Report:
    listed = [(changed or {}).get(result.case, result) for result in results(level)]
    values: dict[str, Any] = {
        "backend": {"name": "fake", "version": "1"},
        "device": {"id": "0", "name": "a | fake <b>", "kind": "cpu", "hal_id": ""},
        "host": {"machine": "x86_64"},
        "suite": {"version": VERSION, "sha256": "0" * 64},
        "seed": 0,
        "examples": 4,
        "reproduced": level >= 4,
        "made": "2026-01-02T03:04:05Z",
        "results": tuple(listed),
        "expected": {},
    }
    return Report(**{**values, **fields})


@pytest.mark.parametrize(("level", "name"), [(2, Level.BRONZE), (3, Level.SILVER), (4, Level.GOLD)])
def test_a_signed_report_holds(level: int, name: Level) -> None:
    made = made_report(level)
    found = report.verify(report.signed(made, KEY), KEY.public_key())
    assert found.level is name
    assert found.report == made
    assert found.public_key == report.public_text(KEY.public_key())


def _change(edit: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(report.signed(made_report(), KEY))
    edit(document)
    return json.dumps(document).encode()


def _better(document: dict[str, Any]) -> None:
    document["results"][0]["detail"] = "changed"


def _unsigned(document: dict[str, Any]) -> None:
    document["signature"] = {"algorithm": "unsigned"}


def _other(document: dict[str, Any]) -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signature = document.pop("signature")
    value = json.loads(report.signed(made_report(), other))["signature"]
    document["signature"] = {**signature, **value}


@pytest.mark.parametrize("edit", [_better, _unsigned, _other])
def test_a_report_that_was_changed_is_refused(edit: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(NotAuthorized):
        report.verify(_change(edit), KEY.public_key())


def test_an_unsigned_report_says_so() -> None:
    data = report.signed(made_report(), None)
    assert b'"unsigned"' in data
    assert report.verify(data).public_key == ""


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        document[name] = value
        document["signature"] = {"algorithm": "unsigned"}

    return edit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("level", "silver"),
        ("format", 2),
        ("seed", True),
        ("seed", "0"),
        ("examples", 0),
        ("reproduced", 1),
        ("made", "yesterday"),
        ("results", "all"),
        ("results", [1]),
        ("results", [{"case": "L9.x", "outcome": "passed", "detail": "", "examples": 0, "supported": 0}]),
        ("results", [{"case": "L2.run", "outcome": "fine", "detail": "", "examples": 0, "supported": 0}]),
        ("results", [{"case": "L2.run", "outcome": "passed", "detail": "", "examples": 1, "supported": 2}]),
        ("results", [{"case": ["L2.run"], "outcome": [], "detail": "", "examples": 1, "supported": 1}]),
        ("suite", {"version": "0.9", "sha256": "0" * 64}),
        ("suite", {"version": VERSION, "sha256": "0"}),
        ("suite", {"version": "1.x", "sha256": "0" * 64}),
        ("suite", {"version": "1", "sha256": "0" * 64}),
        ("backend", {"name": "x"}),
        ("backend", {"name": "x", "version": 1}),
        ("device", {}),
        ("device", None),
        ("more", 1),
    ],
)
def test_a_report_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument):
        report.verify(_change(_set(name, value)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{" * 100000,
        b'{"format": 1, "format": 1}',
        b'{"format": 1.0}',
        b'{"format": NaN}',
        b'{"format": 1}',
        b" " * (report.MAX_BYTES + 1),
        report.signed(made_report(), KEY)[:-100],
    ],
)
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        report.verify(data)


@pytest.mark.parametrize(
    "signature",
    [
        None,
        {},
        {"algorithm": "rsa"},
        {"algorithm": "ed25519"},
        {"algorithm": "ed25519", "public_key": "AA==", "value": "AA=="},
        {"algorithm": "ed25519", "public_key": 1, "value": 2},
    ],
)
def test_a_signature_that_is_none_is_refused(signature: Any) -> None:
    document = json.loads(report.signed(made_report(), KEY))
    document["signature"] = signature
    with pytest.raises(InvalidArgument):
        report.verify(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("case", "outcome", "level"),
    [
        ("L1.identity", Outcome.FAILED, Level.NONE),
        ("L2.run", Outcome.CRASHED, Level.NONE),
        ("L2.run", Outcome.EXPECTED, Level.NONE),
        ("L2.view", Outcome.UNSUPPORTED, Level.GOLD),
        (f"{PROFILE_PREFIX}P3", Outcome.UNSUPPORTED, Level.BRONZE),
        (f"{PROFILE_PREFIX}P3", Outcome.EXPECTED, Level.BRONZE),
        ("L3.Op7.f32", Outcome.FAILED, Level.BRONZE),
        ("L3.Op7.f32", Outcome.HUNG, Level.BRONZE),
        ("L3.Op7.f32", Outcome.UNEXPECTED, Level.BRONZE),
        ("L3.Op7.f32", Outcome.EXPECTED, Level.GOLD),
        ("L3.Op7.f32", Outcome.UNSUPPORTED, Level.GOLD),
        ("L4.soak", Outcome.FAILED, Level.SILVER),
        ("L4.minilm", Outcome.UNSUPPORTED, Level.SILVER),
    ],
)
def test_what_a_result_costs(case: str, outcome: Outcome, level: Level) -> None:
    listed = [replace(each, outcome=outcome) if each.case == case else each for each in results(4)]
    found, why = reached(listed, reproduced=True)
    assert found is level
    assert (case in why) == (level is not Level.GOLD)


def test_levels_need_all_of_their_cases() -> None:
    everything = results(4)
    assert reached(everything, reproduced=False)[0] is Level.SILVER
    for missing, level in (("L2.leak", Level.NONE), (f"{PROFILE_PREFIX}P0", Level.BRONZE), ("L4.cnn", Level.SILVER)):
        left = [each for each in everything if each.case != missing]
        assert reached(left, reproduced=True)[0] is level
    few = [each for each in everything if not each.case.startswith("L3.Op5")]
    assert reached(few, reproduced=True)[0] is Level.BRONZE
    assert reached([*everything, everything[0]], reproduced=True)[0] is Level.NONE
    assert reached(everything, reproduced=True, library=True)[0] is Level.NONE
    abi = [Result(name, P) for name in LIBRARY]
    assert reached([*everything, *abi], reproduced=True, library=True)[0] is Level.GOLD


def test_a_report_of_an_older_suite_lacks_the_cases_that_came_later() -> None:
    older = [each for each in results(4) if each.case not in ADDED]
    assert reached(older, reproduced=True)[0] is Level.NONE
    assert reached(older, reproduced=True, suite="1.0")[0] is Level.GOLD


def test_levels_are_in_order() -> None:
    assert Level.GOLD.reaches(Level.SILVER)
    assert Level.SILVER.reaches(Level.SILVER)
    assert not Level.NONE.reaches(Level.BRONZE)


def test_expected_failures_must_shrink() -> None:
    listed = (Result("L3.A.f32", Outcome.FAILED, "wrong"), Result("L3.B.f32", P), Result("L3.C.f32", Outcome.CRASHED))
    found = with_expected(listed, {"L3.A.f32": "why", "L3.B.f32": "why", "L3.C.f32": "why"})
    assert [each.outcome for each in found] == [Outcome.EXPECTED, Outcome.UNEXPECTED, Outcome.CRASHED]


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "",
        "[other]",
        "expected = 1",
        '[expected]\n"L3.A.f32" = ""',
        '[expected]\n"L3.A.f32" = 1',
        '[expected]\n"L2.run" = "why"',
        '[expected]\n"L3.profile.Add" = "why"',
    ],
)
def test_a_list_of_expected_failures_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "expected.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig):
        read_expected(path)


def test_the_matrix_shows_each_outcome_and_keeps_texts_in_their_place() -> None:
    changed = {
        "L3.Op1.f32": Result("L3.Op1.f32", P, "", 4, 2),
        "L3.Op3.f32": Result("L3.Op3.f32", Outcome.CRASHED, "<script>alert(1)</script> | [x](y)"),
    }
    made = made_report(changed=changed)
    text = matrix.markdown(made, signed=False)
    assert "\n\n## Operators\n\n| operator | f32 |\n| --- | --- |\n| Op0 " in text
    assert "| Op1 | some |" in text
    assert "| Op3 | CRASH |" in text
    assert "| Op2 | – |" in text
    assert "unsigned" in text
    assert "<script>" not in text
    assert "a \\| fake \\<b\\>" in text
    page = matrix.html(made, signed=True)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a | fake &lt;b&gt;" in page
    assert '<td class="some">some</td>' in page


def test_keys_are_for_their_owner_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    public = report.new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(AlreadyExists):
        report.new_key(path)
    data = report.signed(made_report(), report.read_key(path))
    assert report.verify(data, report.read_public(report.public_text(public))).level is Level.GOLD
    assert report.verify(data, report.read_public(str(tmp_path / "key.pub"))).level is Level.GOLD
    with pytest.raises(InvalidArgument, match="the private key"):
        report.read_public(str(path))
    for name in ("key.pub", ""):
        with pytest.raises(InvalidArgument, match="no name for a key"):
            report.new_key(tmp_path / name if name else Path())
    path.unlink()
    with pytest.raises(AlreadyExists, match=r"key\.pub"):
        report.new_key(path)
    assert not path.exists()
    for wrong in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"\xff" * 100000):
        path.write_bytes(wrong)
        with pytest.raises(InvalidArgument):
            report.read_key(path)
        with pytest.raises(InvalidArgument):
            report.read_public(str(path))
    for text in ("", "AA==", "not base64", "\x00"):
        with pytest.raises(InvalidArgument):
            report.read_public(text)


def _entry(**changed: str) -> str:
    fields = {
        "backend": "fake",
        "vendor": "nobody",
        "level": "gold",
        "report": "fake.json",
        "public_key": report.public_text(KEY.public_key()),
        **changed,
    }
    return "[[supported]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


def test_an_entry_of_the_support_list_is_held_against_its_report(tmp_path: Path) -> None:
    path = tmp_path / "registry.toml"
    (tmp_path / "fake.json").write_bytes(report.signed(made_report(), KEY))
    (tmp_path / "other.json").write_bytes(report.signed(made_report(), Ed25519PrivateKey.generate()))
    (tmp_path / "unsigned.json").write_bytes(report.signed(made_report(), None))
    path.write_text(_entry())
    assert support.check(support.read(path)[0], tmp_path).level is Level.GOLD
    for changed in ({"level": "silver"}, {"backend": "another"}, {"report": "missing.json"}):
        path.write_text(_entry(**changed))
        with pytest.raises(InvalidConfig):
            support.check(support.read(path)[0], tmp_path)
    for name in ("other.json", "unsigned.json"):
        path.write_text(_entry(report=name))
        with pytest.raises(NotAuthorized):
            support.check(support.read(path)[0], tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "a = 1",
        "supported = 1",
        "supported = [1]",
        _entry(report="../x.json"),
        _entry(level="best"),
        _entry(vendor=""),
        _entry(more="x"),
        _entry() + _entry(),
    ],
)
def test_a_support_list_that_breaks_its_rules_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "registry.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig):
        support.read(path)


def test_every_entry_of_the_official_list_is_true() -> None:
    listed = support.read()
    for entry in listed:
        support.check(entry)
    # A report that no entry names is nobody's.
    reports = {path.name for path in (support.ROOM / "reports").glob("*.json")}
    assert reports == {entry.report for entry in listed}
