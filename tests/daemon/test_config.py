from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from ai_assistant.daemon import config
from ai_assistant.errors import InvalidConfig

SHIPPED = Path(__file__).resolve().parents[2] / "daemon/data/usr/lib/ai-assistant/config.d/00-defaults.toml"


def write(root: Path, directory: str, name: str, text: str) -> Path:
    path = root / directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_without_any_file(tmp_path: Path) -> None:
    loaded = config.load(tmp_path)
    assert loaded.models_default == "assistant:1"
    assert {source for _, _, source in config.explain(tmp_path)} == {"default"}


def test_table_and_dataclass_have_the_same_rows() -> None:
    assert [row.field for row in config.ROWS] == [each.name for each in dataclasses.fields(config.Config)]


def test_shipped_file_has_exactly_the_defaults() -> None:
    tree = tomllib.loads(SHIPPED.read_text())
    flat = {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}
    assert flat == {row.key: row.default for row in config.ROWS}


def test_later_folders_and_later_names_win(tmp_path: Path) -> None:
    usr, etc, run = config.DIRECTORIES
    write(tmp_path, usr, "10-a.toml", "[models]\nsequences = 1\nthreads = 1\n[log]\nlevel = 'error'\n")
    write(tmp_path, etc, "20-b.toml", "[models]\nsequences = 2\n")
    last = write(tmp_path, run, "15-c.toml", "[models]\nthreads = 3\n")
    loaded = config.load(tmp_path)
    assert (loaded.models_sequences, loaded.models_threads, loaded.log_level) == (2, 3, "error")
    sources = {key: source for key, _, source in config.explain(tmp_path)}
    assert sources["models.threads"] == str(last)
    assert sources["models.batch_tokens"] == "default"


def test_same_name_in_a_later_folder_replaces_the_whole_file(tmp_path: Path) -> None:
    usr, etc, _ = config.DIRECTORIES
    write(tmp_path, usr, "10-a.toml", "[models]\nsequences = 7\n")
    write(tmp_path, etc, "10-a.toml", "")
    assert config.load(tmp_path).models_sequences == 4


def test_integers_do_for_numbers(tmp_path: Path) -> None:
    write(tmp_path, config.DIRECTORIES[1], "a.toml", "[models]\nidle_unload_s = 5\n")
    assert config.load(tmp_path).models_idle_unload_s == 5.0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[models]\nsequence = 1\n", "models.sequence"),
        ("[nope]\nx = 1\n", "nope"),
        ("loose = 1\n", "loose"),
        ("models = 3\n", "models"),
        ("[models]\nsequences = 0\n", "models.sequences"),
        ("[models]\nsequences = 1.5\n", "models.sequences"),
        ("[models]\nsequences = true\n", "models.sequences"),
        ("[models]\nsequences = '4'\n", "models.sequences"),
        ("[models]\nidle_unload_s = nan\n", "models.idle_unload_s"),
        ("[models]\nidle_unload_s = inf\n", "models.idle_unload_s"),
        ("[models]\nidle_unload_s = -1\n", "models.idle_unload_s"),
        ("[log]\nlevel = 'loud'\n", "log.level"),
        ("[models]\nhetero_compute = 'on,off'\n", "models.hetero_compute"),
        ("[models]\nhetero_compute = ''\n", "models.hetero_compute"),
        ("[models]\nhetero_compute = true\n", "models.hetero_compute"),
        ("[models\n", None),
        ("a = " + "[" * 5000, None),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, key: str | None) -> None:
    path = write(tmp_path, config.DIRECTORIES[1], "bad.toml", text)
    with pytest.raises(InvalidConfig) as caught:
        config.load(tmp_path)
    assert str(path) in caught.value.message
    assert caught.value.param == key
    if key is not None:
        assert key in caught.value.message


def test_files_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / config.DIRECTORIES[1]
    folder.mkdir(parents=True)
    (folder / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match=r"a\.toml"):
        config.load(tmp_path)
    (folder / "a.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(InvalidConfig, match="larger"):
        config.load(tmp_path)
    (folder / "a.toml").unlink()
    (folder / "a.toml").mkdir()
    with pytest.raises(InvalidConfig, match="cannot read"):
        config.load(tmp_path)
