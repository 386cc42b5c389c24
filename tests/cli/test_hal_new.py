"""`ai-assistant hal new` and `include`: what a vendor begins with."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Cli


def test_a_backend_is_begun_and_what_comes_next_is_said(cli: Cli, tmp_path: Path) -> None:
    result = cli("hal", "new", "acme-npu", "--folder", str(tmp_path))
    assert result.status == 0
    files = {Path(line).name for line in result.out.splitlines()}
    assert files == {"acme_npu.py", "pyproject.toml", "README.md"}
    assert "hal certify" in result.err
    assert "--level bronze" in result.err
    again = cli("hal", "new", "acme-npu", "--folder", str(tmp_path), "--json")
    assert again.status == 1
    assert again.error["name"] == "AlreadyExists"


def test_wrong_names_and_languages(cli: Cli, tmp_path: Path) -> None:
    assert cli("hal", "new", "../evil", "--folder", str(tmp_path)).status == 1
    assert cli("hal", "new", "acme", "--language", "rust", "--folder", str(tmp_path)).status == 2
    assert not list(tmp_path.iterdir())


def test_the_header_is_where_it_is_said_to_be(cli: Cli) -> None:
    folder = Path(cli("hal", "include").out.strip())
    headers = {each.name for each in folder.glob("*.h")}
    assert headers == {"ai_hal.h", "ai_hal_util.h", "ai_hal_onnx.h", "ai_hal_host.h"}
    assert cli("hal", "include", "--json").json == {"include": str(folder)}
