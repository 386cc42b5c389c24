"""ONNX models before anything native sees them: archives, the file's outline, what is supported. No ONNX Runtime."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant._transport import open_model_file
from ai_assistant.daemon.inspection import inspect_here
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.onnx_file import read_onnx
from ai_assistant.engines.onnx_package import Member, folder_package, pack, package_of
from ai_assistant.engines.onnx_rules import Checked, Pooling, check
from ai_assistant.engines.sniff import ModelFormat, sniff
from ai_assistant.errors import AIAssistantError, InvalidModel, NotSupported
from tests.support import onnx_writer as writer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer.write_folder(tmp_path / "tiny")
    return tmp_path / "tiny"


def checked(folder: Path) -> Checked:
    with folder_package(folder) as package:
        return check(package)


def checked_file(path: Path) -> Checked:
    with path.open("rb") as file:
        return check(package_of(file.fileno()))


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tar(folder: Path, path: Path, top: str = "") -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=top or ".")
    return path


def zipped(folder: Path, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for each in sorted(folder.rglob("*")):
            if each.is_file():
                archive.write(each, each.relative_to(folder))
    return path


def test_every_form_of_a_package_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    expected = checked(folder).plan
    (tmp_path / "hub" / "onnx").mkdir(parents=True)
    for each in folder.iterdir():
        (tmp_path / "hub" / ("onnx" if each.suffix == ".onnx" else ".") / each.name).write_bytes(each.read_bytes())
    assert checked(tmp_path / "hub").plan == expected
    for path in (
        tar(folder, tmp_path / "a.tar"),
        tar(folder, tmp_path / "b.tar", "some/model"),
        tar(tmp_path / "hub", tmp_path / "c.tar"),
        zipped(folder, tmp_path / "d.zip"),
    ):
        assert sniff(path) is ModelFormat.ONNX
        assert checked_file(path).plan == expected
    with pack(folder) as file:
        assert check(package_of(file.fileno())).plan == expected
    with (folder / "model.onnx").open("rb") as model, (folder / "config.json").open("rb") as config:
        with (folder / "tokenizer.json").open("rb") as tokenizer:
            files = {"config.json": config.fileno(), "tokenizer.json": tokenizer.fileno()}
            assert check(package_of(model.fileno(), files)).plan == expected
        with pytest.raises(InvalidModel, match="alone has no tokenizer"):
            package_of(model.fileno())


def test_a_folder_is_handed_over_as_one_file(folder: Path, tmp_path: Path) -> None:
    fd = open_model_file(folder)
    try:
        found = inspect_here(fd, LoadOptions())
        assert os.get_inheritable(fd) is False
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)
    assert found.info.format == "onnx"
    assert (found.info.can_embed, found.info.can_generate) == (True, False)
    assert found.memory.weights_bytes == (folder / "model.onnx").stat().st_size
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidModel, match=r"no tokenizer\.json"):
        open_model_file(folder)
    with pytest.raises(InvalidModel, match="is a directory"):
        open_model_file(tmp_path)


def test_archives_that_are_refused(folder: Path, tmp_path: Path) -> None:
    packed = zipped(folder, tmp_path / "packed.zip", zipfile.ZIP_DEFLATED)
    assert sniff(packed) is ModelFormat.ONNX
    with pytest.raises(InvalidModel, match="compressed") as caught:
        checked_file(packed)
    assert "zip -0" in caught.value.hint

    def with_name(name: str, kind: bytes = tarfile.REGTYPE) -> Path:
        path = tar(folder, tmp_path / "evil.tar")
        with tarfile.open(path, "a") as archive:
            header = tarfile.TarInfo(name)
            header.size, header.type = 3, kind
            archive.addfile(header, io.BytesIO(b"abc"))
        return path

    for name in ("../../etc/passwd", "a/../../b", "/etc/passwd", "a\\b"):
        with pytest.raises(InvalidModel, match="impossible name"):
            checked_file(with_name(name))
    with pytest.raises(InvalidModel, match="twice"):
        checked_file(with_name("model.onnx"))
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for number in range(4100):
            archive.addfile(tarfile.TarInfo(f"f{number}"))
    with pytest.raises(InvalidModel, match="more than 4096"):
        checked_file(tmp_path / "many.tar")


def test_a_link_in_an_archive_is_no_file(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(InvalidModel, match=r"no config\.json"):
        checked_file(tar(folder, tmp_path / "link.tar"))


@pytest.mark.parametrize("make", [tar, zipped])
def test_damaged_archives_are_named_errors(folder: Path, tmp_path: Path, make: Callable[..., Path]) -> None:
    whole = make(folder, tmp_path / "whole").read_bytes()
    rng = random.Random(4)
    path = tmp_path / "broken"
    accepted = 0
    for _ in range(400):
        data = bytearray(whole)
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                data[rng.choice([rng.randrange(2000), rng.randrange(len(data)), -rng.randint(1, 900)])] = rng.randrange(
                    256
                )
        path.write_bytes(data)
        try:
            if data:
                checked_file(path)
                accepted += 1
        except AIAssistantError:
            pass  # anything else fails the test
    assert accepted < 400


def test_mutated_models_are_named_errors(folder: Path) -> None:
    whole = (folder / "model.onnx").read_bytes()
    rng = random.Random(5)
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / "model.onnx").write_bytes(data)
        try:
            checked(folder)
        except (InvalidModel, NotSupported):
            refused += 1
    assert refused > 100


def test_a_sparse_file_costs_nothing(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 100 << 30)
    with pytest.raises(InvalidModel, match="more than an ONNX file can have"):
        checked(folder)
    os.truncate(folder / "tokenizer.json", 1 << 30)
    with pytest.raises(InvalidModel, match=r"tokenizer\.json has"):
        checked(folder)


def _model(nodes: list[bytes] | None = None, weights: list[bytes] | None = None, **others: Any) -> bytes:
    info = writer.value_info
    return writer.model(
        nodes or [],
        weights or [],
        [info("input_ids", 7, ("b", "l")), info("attention_mask", 7, ("b", "l"))],
        others.pop("outputs", [info("last_hidden_state", 1, ("b", "l", 32))]),
        **others,
    )


_FIELD = writer.field
_INFO = writer.value_info
_OUT = [_INFO("x", 1, ("b", 2))]
_SCAN = _FIELD(1, writer.node("Scan", ["a"], ["b"]))
_IF = writer.node("If", ["input_ids"], ["x"]) + _FIELD(5, _FIELD(1, "then_branch") + _FIELD(6, _SCAN))
_PASSWD = _FIELD(13, _FIELD(1, "location") + _FIELD(2, "/etc/shadow"))


def _weight(length: int, kind: int, rest: bytes) -> bytes:
    return _model(weights=[_FIELD(1, length) + _FIELD(2, kind) + _FIELD(8, "w") + rest])


def _asks_for(*inputs: bytes) -> bytes:
    return writer.model([], [], inputs, _OUT)


_FIXED = _asks_for(_INFO("input_ids", 7, ("b", 128)), _INFO("attention_mask", 7, ("b", 128)))


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (_weight(4, 1, _PASSWD), InvalidModel, "weights are in another file"),
        (_weight(4, 1, _FIELD(14, 1)), InvalidModel, "another file"),
        (_weight(1 << 62, 1, _FIELD(9, b"1234")), InvalidModel, "absurd shape"),
        (_weight(4, 1, _FIELD(9, b"1234")), InvalidModel, "4 bytes for 4 values"),
        (_weight(1, 99, _FIELD(9, b"1234")), InvalidModel, "unknown type 99"),
        (_model(weights=[writer.tensor("w", np.zeros(2, np.float32))] * 2), InvalidModel, "there twice"),
        (_model([writer.node("Evil", ["input_ids"], ["x"], domain="evil.corp")]), NotSupported, "'evil.corp'"),
        (_model([writer.node("Loop", ["input_ids"], ["x"])]), NotSupported, "never end"),
        (_model([_IF]), NotSupported, "'Scan'"),
        (_model(opset=99), NotSupported, "version 99"),
        (_model(ir_version=99), NotSupported, "version 99"),
        (_model() + _FIELD(25, b""), NotSupported, "functions"),
        (_model() + _FIELD(7, b""), InvalidModel, "more than one graph"),
        (_FIELD(1, 8), InvalidModel, "no graph"),
        (_model(outputs=[]), InvalidModel, "no output"),
        (_model(outputs=[_INFO("x", 8, ("b", 2))]), InvalidModel, "no table of numbers"),
        (_model(outputs=[_INFO("x", 1, ("b", 1 << 40))]), InvalidModel, "absurd width"),
        (_model(outputs=[_INFO("logits", 1, ("b", "l", 100))]), NotSupported, "are not run"),
        (_asks_for(_INFO("pixels", 1, ("b", 3))), NotSupported, "'pixels'"),
        (_FIXED, NotSupported, "fixed shape"),
        (_asks_for(_INFO("input_ids", 7, ("b", "l"))), InvalidModel, "lacks the inputs"),
        (b"\x08\x08" + b"\x80" * 40, InvalidModel, "damaged"),
        (b"", NotSupported, "version 0"),
    ],
)
def test_models_that_are_refused(folder: Path, data: bytes, kind: type[AIAssistantError], message: str) -> None:
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(kind, match=message) as caught:
        checked(folder)
    assert "Traceback" not in caught.value.message


def test_graphs_in_graphs_have_an_end(tmp_path: Path) -> None:
    inner = b""
    for _ in range(40):
        inner = _FIELD(1, writer.node("If", ["a"], ["b"]) + _FIELD(5, _FIELD(6, inner)))
    path = tmp_path / "deep"
    path.write_bytes(_FIELD(1, 8) + _FIELD(7, inner))
    with path.open("rb") as file, pytest.raises(InvalidModel, match="deep"):
        read_onnx(Member(file.fileno(), 0, path.stat().st_size))


_EMPTY = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"max_position_embeddings": -4}, "max_position_embeddings"),
        ("config.json", {"max_position_embeddings": "many"}, "max_position_embeddings"),
        ("config.json", {"max_position_embeddings": 5}, "no room"),
        ("config.json", {"vocab_size": 10}, "the model 10"),
        ("config.json", {"hidden_size": 1e9}, "hidden_size"),
        ("config.json", {"architectures": ["BertForSequenceClassification"]}, "one row for each"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "BPE"),
        ("tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "unknown token"),
        ("tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"[UNK]": -1}}}, "no usable number"),
        ("tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 0}}}, "same number"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ("tokenizer.json", {"normalizer": None}, "normalizer"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "ByteLevel"}}, "ByteLevel"),
        ("tokenizer.json", {"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
        ("tokenizer.json", {"post_processor": _EMPTY}, "each text once"),
        ("tokenizer.json", {"added_tokens": [{"id": 1, "content": "x", "single_word": True}]}, "whole words"),
        ("tokenizer.json", {"added_tokens": 5}, "no list"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(folder: Path, name: str, values: dict[str, Any], message: str) -> None:
    change(folder, name, **values)
    with pytest.raises((InvalidModel, NotSupported), match=message):
        checked(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InvalidModel):
        checked(folder)


def test_pooling_and_modules(tmp_path: Path) -> None:
    def plan(number: int, **files: Any) -> Checked:
        folder = tmp_path / str(number)
        writer.write_folder(folder, **files)
        return checked(folder)

    assert plan(0).plan.pooling is Pooling.MEAN
    for number, (key, expected) in enumerate(
        {"mean_tokens": Pooling.MEAN, "cls_token": Pooling.CLS, "lasttoken": Pooling.LAST}.items(), 1
    ):
        assert (
            plan(number, pooling_json={f"pooling_mode_{key}": True, "pooling_mode_max_tokens": False}).plan.pooling
            is expected
        )
    with pytest.raises(NotSupported, match="max_tokens"):
        plan(9, pooling_json={"pooling_mode_max_tokens": True})
    with pytest.raises(NotSupported, match="mean_tokens, cls_token"):
        plan(10, pooling_json={"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    with pytest.raises(NotSupported, match="'Dense'"):
        plan(11, modules_json=[{"type": "sentence_transformers.models.Dense"}])


def test_what_a_model_can_do_follows_from_its_files(tmp_path: Path) -> None:
    for labels, expected in ((0, (True, False, False)), (1, (False, True, False)), (3, (False, False, True))):
        writer.write_folder(tmp_path / str(labels), labels=labels)
        found = checked(tmp_path / str(labels))
        assert (found.info.can_embed, found.info.can_rerank, found.info.can_classify) == expected
        assert found.info.can_generate is False
        assert found.info.context_length == 64
        assert found.info.quantization == "F32"
    assert found.plan.labels == ("label 0", "label 1", "label 2")
    change(tmp_path / "3", "config.json", id2label={"0": "a", "1": "a", "2": "b"})
    with pytest.raises(InvalidModel, match="id2label"):
        checked(tmp_path / "3")
    change(tmp_path / "3", "config.json", id2label={"0": "a"})
    with pytest.raises(InvalidModel, match="1 labels, its output 3"):
        checked(tmp_path / "3")
