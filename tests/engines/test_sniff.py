"""Formats are told by content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ai_assistant.engines import open_model
from ai_assistant.engines.sniff import ModelFormat, sniff
from ai_assistant.errors import InvalidModel, NotSupported

_ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x052.6.0\x3a\xff\x01"
_TENSORS = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
_SAFE = len(_TENSORS).to_bytes(8, "little") + _TENSORS + bytes(4)


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (b"GGUF\x03\x00\x00\x00", "model.onnx", ModelFormat.GGUF),
        (_ONNX, "model.gguf", ModelFormat.ONNX),
        (_SAFE, "model.gguf", ModelFormat.SAFETENSORS),
        (b"", "model.gguf", ModelFormat.UNKNOWN),
        (b"\x7fELF" + bytes(60), "model.gguf", ModelFormat.UNKNOWN),
        (b"PK\x03\x04" + bytes(60), "model.pt", ModelFormat.UNKNOWN),
        (b'{"model": 1}' + bytes(60), "config.json", ModelFormat.UNKNOWN),
        (bytes(64), "zeroes", ModelFormat.UNKNOWN),
        ((2**40).to_bytes(8, "little") + b"{}", "liar.safetensors", ModelFormat.UNKNOWN),
    ],
)
def test_sniffing(tmp_path: Path, content: bytes, name: str, expected: ModelFormat) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert sniff(path) is expected


def test_formats_without_an_engine_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_SAFE)
    with pytest.raises(NotSupported, match="safetensors") as caught:
        open_model(path)
    assert "GGUF" in caught.value.hint


def test_an_onnx_file_alone_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_ONNX)
    with pytest.raises(InvalidModel, match=r"no tokenizer\.json") as caught:
        open_model(path)
    assert "folder" in caught.value.hint
    with path.open("rb") as file, pytest.raises(InvalidModel, match="alone has no tokenizer"):
        open_model(file.fileno())
    with pytest.raises(InvalidModel, match=r"no model\.onnx"):
        open_model(tmp_path / ".." / tmp_path.name / "..")


def test_no_model_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    with pytest.raises(InvalidModel, match="empty"):
        open_model(path)
    path.write_bytes(b"hello")
    with pytest.raises(InvalidModel, match="no model"):
        open_model(path)
    with pytest.raises(InvalidModel, match="cannot be opened"):
        open_model(tmp_path / "none")
