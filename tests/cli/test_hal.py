"""`ai-assistant hal …`: list, certify, reports and keys, on fakes and the processor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ai_assistant.hal import discovery
from ai_assistant.hal.remote import RemoteBackend
from tests.cli.conftest import CHECKOUT, Cli
from tests.hal.conformance.conftest import fake_file


@pytest.fixture
def right(tmp_path: Path) -> str:
    return str(fake_file(tmp_path, "Right"))


def test_list_names_every_backend_of_the_product_with_devices_or_what_is_missing(cli: Cli) -> None:
    result = cli("hal", "list", "--json")
    assert result.status == 0
    rows = json.loads(result.out)
    assert {"cpu", "null"} <= {row["backend"] for row in rows}
    assert all(row["devices"] or row["unavailable"] for row in rows)
    assert "cpu" in cli("hal", "list").out


def test_a_backend_in_a_process_of_its_own_is_listed_with_its_version(
    cli: Cli, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = discovery.Discovery({"vendor": RemoteBackend(right)})
    monkeypatch.setattr(discovery, "discover", lambda: found)
    (row,) = json.loads(cli("hal", "list", "--json").out)
    assert (row["version"], [each["id"] for each in row["devices"]]) == ("1", ["0"])


def test_certify_writes_a_signed_report_that_verifies(cli: Cli, right: str, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    public = cli("hal", "keygen", str(key)).out.strip()
    assert cli("hal", "keygen", str(key)).status == 1
    folder = tmp_path / "certified"
    result = cli("hal", "certify", right, "--level", "bronze", "--out", str(folder), "--key", str(key))
    assert result.status == 0, result.out + result.err
    assert "level        bronze" in result.out
    assert "unsupported: L2.queues.limit  the device has any number of queues" in result.out
    assert {path.name for path in folder.iterdir()} == {"report.json", "matrix.md", "matrix.html"}
    report = str(folder / "report.json")
    assert "signed by" in cli("hal", "verify-report", report).out
    found = json.loads(cli("hal", "verify-report", report, "--public-key", public, "--json").out)
    assert (found["level"], found["trusted"], found["same_suite"]) == ("bronze", True, True)
    assert cli("hal", "verify-report", report, "--public-key", str(key.with_suffix(".pub"))).status == 0
    assert "that is the private key" in cli("hal", "verify-report", report, "--public-key", str(key)).err
    assert found["backend"]["file"] == "right.py"
    text = Path(report).read_text()
    assert str(tmp_path) not in text
    Path(report).write_text(text.replace('"bronze"', '"gold"'))
    changed = cli("hal", "verify-report", report)
    assert changed.status == 3
    assert "changed after it was signed" in changed.err


def test_a_file_with_the_name_of_a_backend_of_the_product_is_told(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from tests.hal.conformance.fakes import Right\nclass BACKEND(Right):\n    name = 'cpu'\n")
    result = cli("hal", "certify", str(path), "--level", "bronze")
    assert "the file calls itself cpu" in result.err


def test_a_level_that_is_not_reached_is_an_error_and_names_the_case(cli: Cli, tmp_path: Path) -> None:
    path = fake_file(tmp_path, "ForgetsFailure")
    result = cli("hal", "certify", str(path), "--level", "bronze", "--json")
    assert result.status == 1
    report = json.loads(result.out)
    assert report["level"] == "none"
    assert report["next"].startswith("L2.failure failed")


def test_an_unsigned_report_is_called_so(cli: Cli, right: str, tmp_path: Path) -> None:
    result = cli("hal", "certify", right, "--level", "bronze", "--out", str(tmp_path))
    assert "report.json, unsigned" in result.out
    verified = cli("hal", "verify-report", str(tmp_path / "report.json"))
    assert verified.status == 3
    assert "unsigned" in verified.err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("certify", "no-such-backend", "--level", "bronze"), 1, "no backend"),
        (("certify", "./missing.so", "--level", "bronze"), 1, "no file"),
        (("certify", "cpu", "--level", "best"), 2, "no level"),
        (("certify", "cpu", "--level", "bronze", "--seed", "-1"), 2, "seed"),
        (("certify", "cpu", "--level", "bronze", "--device", "9"), 1, "no such device"),
        (("certify", "cpu", "--level", "bronze", "--key", "/dev/null"), 1, "no key to sign with"),
        (("certify", "cpu", "--level", "bronze", "--expected", "/dev/null"), 1, "[expected]"),
        (("verify-report", "/dev/null"), 1, "no report"),
        (("verify-report", "/nonexistent"), 1, "cannot be read"),
        (("verify-report", "/dev/null", "--public-key", "x"), 1, "no public key"),
        (("keygen", "/nonexistent/key"), 1, "cannot be written"),
    ],
)
def test_what_is_wrong_is_said(cli: Cli, arguments: tuple[str, ...], status: int, says: str) -> None:
    result = cli("hal", *arguments)
    assert result.status == status, result.err
    assert says in result.err


def test_an_unavailable_device_comes_with_its_hint(cli: Cli, tmp_path: Path) -> None:
    result = cli("hal", "certify", str(fake_file(tmp_path, "Absent")), "--level", "bronze")
    assert result.status == 1
    assert "the firmware is missing" in result.err
    assert "install firmware-fake" in result.err


def test_ctrl_c_ends_the_backend_too(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    path = tmp_path / "slow.py"
    path.write_text(
        "import os, pathlib, time\nfrom tests.hal.conformance.fakes import Right\n"
        "class BACKEND(Right):\n    def probe(self):\n"
        f"        pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n        time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "ai_assistant", "hal", "certify", str(path), "--level", "bronze"]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not started.exists() or not started.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
