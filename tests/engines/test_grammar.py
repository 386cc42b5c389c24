"""JSON schemas as grammars: what fits matches as `json.dumps` writes it, what does not fit does not."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ai_assistant.engines.grammar import grammar_of
from ai_assistant.errors import InvalidArgument
from tests.support.gbnf import compiled

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name"],
}
_INT = {"type": "integer"}
_STR = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({}, [{}, {"a": 1}, {"a": [True, None, "x", 1.5e-3]}], [[], 5, "x"]),
        ({"type": "object"}, [{}, {"a": {"b": 2}}], [[]]),
        ({"type": "string"}, ["", "é\"\\\n\t", "温度"], [5, None]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd", ""]),
        ({"type": "boolean"}, [True, False], ["true", 0]),
        ({"type": "null"}, [None], [0, False]),
        ({"type": "number"}, [0, -1, 1.5, -2e10, 123456], ["1"]),
        ({"type": "integer"}, [0, -1, 123456], [1.5, "1"]),
        ({"type": ["integer", "null"]}, [5, None], ["x", 1.5]),
        ({"type": "string", "nullable": True}, ["x", None], [5]),
        ({"enum": ["a", 5, None, {"x": [1]}, 'q"uote']}, ["a", 5, None, {"x": [1]}, 'q"uote'], ["b", 6, {"x": [2]}]),
        ({"const": "only"}, ["only"], ["other"]),
        ({"anyOf": [{"type": "integer"}, {"const": "x"}]}, [3, "x"], ["y", None]),
        ({"oneOf": [{"type": "null"}, {"type": "boolean"}]}, [None, True], [1]),
        (_PERSON,
         [{"name": "x"}, {"name": "x", "age": 3}, {"name": "", "tags": []}, {"name": "x", "age": 1, "tags": ["a"]}],
         [{}, {"age": 3}, {"age": 3, "name": "x"}, {"name": 5}, {"name": "x", "other": 1}, {"name": "x", "tags": [1]}]),
        ({"properties": {"a": _INT, "b": _INT}}, [{}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}], [{"c": 1}]),
        ({"type": "object", "properties": {}, "additionalProperties": False}, [{}], [{"a": 1}]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1, "y": 2}], [{"x": "y"}]),
        ({"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": {"type": "null"}},
         [{"a": 1}, {"a": 1, "b": None}], [{"b": None}, {"a": 1, "b": 2}]),
        ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["x"], {}]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1}, [[1], [1, 2]], [[]]),
        ({"items": _INT, "minItems": 2, "maxItems": 3}, [[1, 2], [1, 2, 3]], [[], [1], [1, 2, 3, 4]]),
        ({"type": "array", "maxItems": 0}, [[]], [[1]]),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, [[], [1]], [[1, 2]]),
        ({"type": "array", "prefixItems": [_INT, _STR]}, [[1, "x"]], [[1], ["x", 1], [1, "x", 2]]),
        ({"allOf": [{"properties": {"a": _INT}, "required": ["a"]}, {"properties": {"b": {"const": 2}}}]},
         [{"a": 1}, {"a": 1, "b": 2}], [{}, {"b": 2}]),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "boolean"}}}, [True], [1]),
        ({"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
         [{"next": None}, {"next": {"next": None}}], [{}, {"next": 5}]),
        ({"title": "T", "description": "D", "$schema": "x", "type": "integer", "default": 5}, [1], ["x"]),
    ],
)  # fmt: skip
def test_schemas(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    pattern = compiled(grammar_of(schema))
    for value in good:
        text = json.dumps(value, ensure_ascii=False)
        assert pattern.fullmatch(text), text
        if "enum" not in schema:  # A constant is written in one way only.
            assert pattern.fullmatch(json.dumps(value, separators=(",", ":"))), text
    for value in bad:
        assert not pattern.fullmatch(json.dumps(value, ensure_ascii=False)), value


def test_pretty_printing_is_allowed_and_bounded() -> None:
    pattern = compiled(grammar_of(_PERSON))
    assert pattern.fullmatch(json.dumps({"name": "x", "tags": ["a", "b"]}, indent=2))
    assert not pattern.fullmatch('{"name":' + " " * 1000 + '"x"}')


def test_integer_bounds_are_exact() -> None:
    rng = random.Random(11)
    cases: list[tuple[int | None, int | None]] = [(0, 0), (0, 9), (5, None), (None, 5), (-3, 3), (None, -7)]
    for _ in range(60):
        low, high = sorted((rng.randint(-1300, 1300), rng.randint(-1300, 1300)))
        cases.append((low, high))
    for least, most in cases:
        bounds = {"minimum": least, "maximum": most}
        schema = {"type": "integer", **{key: value for key, value in bounds.items() if value is not None}}
        pattern = compiled(grammar_of(schema))
        for number in [*range(-1400, 1401), 99_999, -99_999]:
            fits = (least is None or number >= least) and (most is None or number <= most)
            assert bool(pattern.fullmatch(str(number))) == fits, (number, least, most)
        assert not pattern.fullmatch("007")
        assert not pattern.fullmatch("-0")


def test_exclusive_bounds() -> None:
    pattern = compiled(grammar_of({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 11}))
    assert [n for n in range(-5, 20) if pattern.fullmatch(str(n))] == list(range(1, 11))


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "string", "pattern": "^a+$"}, "pattern"),
        ({"type": "number", "minimum": 0}, "minimum"),
        ({"not": {}}, "not"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "potato"}, "potato"),
        ({"type": 5}, "type"),
        ({"enum": []}, "enum"),
        ({"enum": "abc"}, "enum"),
        ({"anyOf": []}, "anyOf"),
        ({"anyOf": [{"type": "null"}], "properties": {}}, "anyOf"),
        ({"properties": [1]}, "properties"),
        ({"properties": {"a": 5}}, "schema must be an object"),
        ({"properties": {"a": False}}, "allows nothing"),
        ({"required": ["a"]}, "required"),
        ({"$ref": "http://example.com"}, "$ref"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "#"}, "itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself"),
        ({"type": "string", "maxLength": 10**6}, "maxLength"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "less than"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no number"),
        ({"type": "integer", "minimum": 0.5}, "whole number"),
        ({"type": "integer", "minimum": 10**30}, "15 digits"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        grammar_of(schema)
    assert word in caught.value.message
    assert caught.value.param == "response_schema"


def test_deep_and_large_schemas_are_refused() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidArgument, match="deeper"):
        grammar_of(deep)
    inner = {"properties": {"a": {"enum": [1, 2]}}}
    wide = {"properties": {f"p{n}": inner for n in range(2000)}}
    with pytest.raises(InvalidArgument, match="too large"):
        grammar_of(wide)
    with pytest.raises(InvalidArgument, match="too large"):
        grammar_of({"enum": ["x" * 1000 + str(n) for n in range(2000)]})


def test_the_grammar_grows_with_the_schema_and_not_faster() -> None:
    sizes = [len(grammar_of({"properties": {f"p{n}": _INT for n in range(count)}})) for count in (50, 100, 200)]
    assert sizes[2] / sizes[1] < 2.3
