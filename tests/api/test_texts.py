"""Bodies of /v1/rerank, /v1/classify, /tokenize and /detokenize: every way to get them wrong."""

from __future__ import annotations

from typing import Any

import pytest

from ai_assistant.daemon.api import texts
from ai_assistant.errors import InvalidArgument, NotSupported


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": ["x"]}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": "x"}, "documents"),
        ({"documents": ["x"] * 2049}, "documents"),
        ({"documents": ["x", 3]}, "documents[1]"),
        ({"documents": [None]}, "documents[0]"),
        ({"documents": [{}]}, "documents[0]"),
        ({"documents": [{"text": 3}]}, "documents[0]"),
        ({"documents": [{"text": "x", "title": "y"}]}, "documents[0]"),
        ({"documents": [{"image": "x"}]}, "documents[0]"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"return_documents": 1}, "return_documents"),
        ({"keep_alive": -2}, "keep_alive"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"rank_fields": []}, "rank_fields"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_rerank_parameter_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidArgument, NotSupported)) as caught:
        texts.parse_rerank({"model": "m", "query": "q", "documents": ["a"], **more})
    assert caught.value.param == param


def test_documents_are_texts_or_have_them() -> None:
    asked = texts.parse_rerank({"model": "m", "query": "q", "documents": ["a", {"text": "b"}, ""]})
    assert (asked.documents, asked.top_n, asked.return_documents) == (("a", "b", ""), None, False)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input[0]"),
        ({"input": ["a", 1]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"labels": ["x"]}, "labels"),
        ({"keep_alive": float("nan")}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"top_k": 1}, "top_k"),
    ],
)
def test_a_wrong_classify_parameter_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidArgument, NotSupported)) as caught:
        texts.parse_classify({"model": "m", "input": "x", **more})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tokens": None}, "tokens"),
        ({"tokens": "1"}, "tokens"),
        ({"tokens": [1, "2"]}, "tokens[1]"),
        ({"tokens": [-1]}, "tokens[0]"),
        ({"tokens": [2**31]}, "tokens[0]"),
        ({"tokens": [True]}, "tokens[0]"),
        ({"tokens": [1.0]}, "tokens[0]"),
        ({"tokens": [0] * 65_537}, "tokens"),
        ({"text": "x"}, "text"),
    ],
)
def test_a_wrong_detokenize_parameter_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        texts.parse_detokenize({"model": "m", "tokens": [1], **more})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"content": None}, "content"),
        ({"content": ["x"]}, "content"),
        ({"content": "x" * (texts.MAX_CONTENT_BYTES + 1)}, "content"),
        ({"with_pieces": "yes"}, "with_pieces"),
        ({"add_bos": True}, "add_bos"),
    ],
)
def test_a_wrong_tokenize_parameter_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        texts.parse_tokenize({"model": "m", "content": "x", **more})
    assert caught.value.param == param
