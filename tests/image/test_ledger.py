"""A long run goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "ledger.json"
    monkeypatch.setenv("AI_ASSISTANT_LEDGER", str(path))
    return path


def test_what_has_passed_is_kept(path: Path) -> None:
    ledger = Ledger.from_environment()
    ledger.passed["tests/vm/test_a.py::test_one"] = 61.5
    ledger.figures["states"] = "500"
    ledger.save()
    again = Ledger.from_environment()
    assert (again.passed, again.figures) == (ledger.passed, ledger.figures)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"passed": {}}', '{"passed": {"a": "b"}, "figures": {}}', "null"])
def test_a_broken_ledger_is_begun_again(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    assert Ledger.from_environment().passed == {}


def test_without_a_file_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AI_ASSISTANT_LEDGER", raising=False)
    monkeypatch.chdir(tmp_path)
    ledger = Ledger.from_environment()
    ledger.passed["a"] = 1
    ledger.save()
    assert list(tmp_path.iterdir()) == []
