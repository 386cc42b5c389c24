"""Bodies from strangers: what passes is plain and bounded, everything else is a named error."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc

import pytest

from ai_assistant.daemon.api.jsonbody import MAX_DEPTH, MAX_VALUES, parse_object
from ai_assistant.errors import InvalidArgument


def test_json_of_every_kind_comes_back_equal() -> None:
    value = {
        "text": 'quotes " back\\slash [{,}] and 世界 🙂',
        "numbers": [0, -1, 1.5, 1e10, 2**63 - 1, -(2**63)],
        "others": [None, True, False, {}, []],
        "": {"deep": {"deeper": ["\u0000", "\n"]}},
    }
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False, indent=2).encode()) == value


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1} trailing', "not JSON"),
        (b'{"a": "unfinished', "not JSON"),
        (b'{"a": "tab\t"}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": "\xff\xfe"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": -1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        (rb'{"a": "\ud800"}', "surrogate"),
        (rb'{"a": ["x", {"\udc00 key": 1}]}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested"),
        (b"[" * 50_000, "nested"),
        (b'{"a": [' + b"0," * (MAX_VALUES + 1) + b"0]}", "values"),
    ],
)
def test_anything_else_is_a_named_error(body: bytes, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        parse_object(body)


def test_nesting_is_allowed_up_to_the_limit() -> None:
    inner = MAX_DEPTH - 1
    assert parse_object(b'{"a":' + b"[" * inner + b"]" * inner + b"}")
    with pytest.raises(InvalidArgument, match="nested"):
        parse_object(b'{"a":' + b"[" * (inner + 1) + b"]" * (inner + 1) + b"}")


def test_brackets_and_commas_inside_text_count_for_nothing() -> None:
    text = "[{," * 200_000
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}


def test_a_whole_pair_of_escaped_surrogates_is_text() -> None:
    assert parse_object(rb'{"a": "\ud83d\ude42"}') == {"a": "🙂"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "' + b"\\" * (8 << 20),
        b'{"a": "' + b"x" * (8 << 20) + b'"}',
        b'{"a": "' + b'\\"' * (4 << 20) + b'"}',
        b'{"a": [' + b"{}," * (2 << 20),
        b'{"' * (2 << 20),
        b'"' * (8 << 20),
    ],
    ids=["backslashes", "text", "quotes", "objects", "open", "strings"],
)
def test_the_longest_bodies_cost_bounded_time_and_memory(body: bytes) -> None:
    tracemalloc.start()
    begin = time.process_time()
    with contextlib.suppress(InvalidArgument):
        parse_object(body)
    seconds = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 64 << 20
