"""What a hub says, believed as far as it can be, and which file is meant."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ai_assistant.daemon.fetch.hub import RemoteFile, choose, parse_listing
from ai_assistant.daemon.fetch.source import HubSource
from ai_assistant.errors import DownloadFailed, NoSuchModel, NotSupported

SOURCE = HubSource("https://hub.example", "o", "n", revision="v1")
COMMIT = "a" * 40


def listing(*siblings: Any, sha: Any = COMMIT) -> tuple[str, tuple[RemoteFile, ...]]:
    return parse_listing({"sha": sha, "siblings": list(siblings)}, SOURCE)


def files(*paths: str) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(each, f"https://hub.example/{each}", 10) for each in paths)


def test_sizes_and_hashes() -> None:
    revision, found = listing(
        {"rfilename": "m.gguf", "size": 5, "blobId": "b" * 40, "lfs": {"sha256": "c" * 64, "size": 5}},
        {"rfilename": "config.json", "size": 3, "blobId": "d" * 40},
        {"rfilename": "unknown.bin"},
    )
    assert revision == COMMIT
    resolve = f"https://hub.example/o/n/resolve/{COMMIT}"
    assert found == (
        RemoteFile("m.gguf", f"{resolve}/m.gguf", 5, "c" * 64, ""),
        RemoteFile("config.json", f"{resolve}/config.json", 3, "", "d" * 40),
        RemoteFile("unknown.bin", f"{resolve}/unknown.bin", -1, "", ""),
    )


def test_without_a_commit_the_revision_is_used() -> None:
    assert listing(sha=None)[0] == "v1"
    assert listing(sha="../../x")[0] == "v1"


@pytest.mark.parametrize(
    "name",
    ["../up.gguf", "/etc/passwd", "a/../../b.gguf", "a//b", "a/./b", "..", "", "a\\b", "a\nb", "a\x00b", "x" * 2000,
     None, 7, ["a"], {"a": 1}],
)  # fmt: skip
def test_names_that_lead_elsewhere_do_not_exist(name: Any) -> None:
    assert [each.path for each in listing({"rfilename": name, "size": 1}, {"rfilename": "good"})[1]] == ["good"]


@pytest.mark.parametrize("size", [-5, 1 << 60, 1.5, math.nan, "7", True, None, [1]])
def test_sizes_that_are_none(size: Any) -> None:
    assert listing({"rfilename": "a", "size": size})[1][0].size_bytes == -1


@pytest.mark.parametrize("value", ["z" * 64, "c" * 63, 7, None, ["c" * 64]])
def test_hashes_that_are_none(value: Any) -> None:
    assert listing({"rfilename": "a", "lfs": {"sha256": value, "size": 1}})[1][0].sha256 == ""


@pytest.mark.parametrize("body", [None, [], "x", 3, {}, {"siblings": None}, {"siblings": {"a": 1}}, {"error": "x"}])
def test_answers_that_are_none(body: Any) -> None:
    with pytest.raises(DownloadFailed, match="no list of files"):
        parse_listing(body, SOURCE)


def test_too_many_files() -> None:
    with pytest.raises(DownloadFailed, match="lists 20001 files"):
        listing(*[{"rfilename": str(index)} for index in range(20_001)])


def test_rows_of_any_kind() -> None:
    assert listing(None, 3, "x", [], {}, {"rfilename": "a", "lfs": 3}, {"rfilename": "a"})[1] == (
        RemoteFile("a", f"https://hub.example/o/n/resolve/{COMMIT}/a"),
    )


MANY = files(
    "README.md", "model-Q2_K.gguf", "model-Q4_K_M.gguf", "model-Q4_K_S.gguf", "model-Q8_0.gguf", "model-f16.gguf",
    "mmproj-model-f16.gguf", "IQ4_XS/model-IQ4_XS.gguf", "big/model-BF16-00001-of-00002.gguf",
    "big/model-BF16-00002-of-00002.gguf",
)  # fmt: skip


@pytest.mark.parametrize(
    ("selector", "path"),
    [
        ("", "model-Q4_K_M.gguf"),
        ("Q8_0", "model-Q8_0.gguf"),
        ("q8_0", "model-Q8_0.gguf"),
        ("f16", "model-f16.gguf"),
        ("IQ4_XS", "IQ4_XS/model-IQ4_XS.gguf"),
        ("model-Q2_K.gguf", "model-Q2_K.gguf"),
        ("README.md", "README.md"),
    ],
)
def test_which_file_is_meant(selector: str, path: str) -> None:
    assert [each.path for each in choose(MANY, selector, "o/n")] == [path]


def test_the_only_one_needs_no_name() -> None:
    assert [each.path for each in choose(files("a.txt", "weights.gguf"), "", "o/n")] == ["weights.gguf"]


def test_what_is_not_there_lists_what_there_is() -> None:
    with pytest.raises(NoSuchModel, match="nothing that fits 'Q5_0'") as caught:
        choose(MANY, "Q5_0", "o/n")
    assert "model-Q4_K_M.gguf (Q4_K_M)" in caught.value.hint
    assert "mmproj" not in caught.value.hint
    # Q4_K is no Q4_K_M.
    with pytest.raises(NoSuchModel):
        choose(MANY, "Q4_K", "o/n")


def test_more_than_one() -> None:
    two = files("a-Q8_0.gguf", "b-Q8_0.gguf")
    for selector in ("", "Q8_0"):
        with pytest.raises(NoSuchModel, match="more than one model") as caught:
            choose(two, selector, "o/n")
        assert "a-Q8_0.gguf" in caught.value.hint


@pytest.mark.parametrize("selector", ["BF16", "big/model-BF16-00001-of-00002.gguf"])
def test_split_models_are_refused(selector: str) -> None:
    with pytest.raises(NotSupported, match="split"):
        choose(MANY, selector, "o/n")


def test_no_model_at_all() -> None:
    with pytest.raises(NotSupported, match="neither a GGUF nor an ONNX"):
        choose(files("pytorch_model.bin", "config.json"), "", "o/n")


def test_onnx_brings_what_it_needs() -> None:
    found = files("onnx/model.onnx", "onnx/model_q4.onnx", "tokenizer.json", "config.json", "vocab.txt", "x.bin")
    for selector in ("onnx", "onnx/model.onnx"):
        paths = [each.path for each in choose(found, selector, "o/n")]
        assert paths == ["onnx/model.onnx", "tokenizer.json", "config.json", "vocab.txt"]
    with pytest.raises(NotSupported, match="in other files"):
        choose(files("model.onnx", "model.onnx_data"), "", "o/n")


def test_a_hint_is_bounded() -> None:
    with pytest.raises(NoSuchModel) as caught:
        choose(files(*[f"{'x' * 500}-{index}.gguf" for index in range(500)]), "", "o/n")
    assert "and 470 more" in caught.value.hint
    assert len(caught.value.hint) < 5000
