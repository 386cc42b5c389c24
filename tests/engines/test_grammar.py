"""JSON schemas as grammars: what fits matches as `json.dumps` writes it, what does not fit does not."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ai_assistant.engines.gbnf import Walk, parsed
from ai_assistant.engines.grammar import MAX_CALLS, call_grammar, grammar_of
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
        ({"type": "integer", "minimum": float("inf")}, "whole number"),
        ({"type": "integer", "maximum": float("nan")}, "whole number"),
        ({"const": float("nan")}, "constant"),
        ({"const": 10**5000}, "constant"),
        ({"enum": ["a", "\ud800"]}, "constant"),
        ({"properties": {"\ud800": {}}}, "constant"),
        ({"type": "array", "minItems": 5_000_000}, "minItems"),
        ({"type": "array", "maxItems": 10**400}, "maxItems"),
        ({"type": "string", "minLength": True}, "minLength"),
        ({"type": "array", "prefixItems": [{}] * 2000}, "prefixItems"),
        ({"anyOf": [{"const": n} for n in range(500)]}, "alternatives"),
        ({"allOf": [{"properties": 5}, {}]}, "properties"),
        ({"allOf": [{}, {"required": 5}]}, "required"),
        ({"properties": {"a": {}}, "required": [["a"]]}, "required"),
        ({"properties": {"a": {}}, "required": {"a": 1}}, "required"),
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
        grammar_of({"enum": [str(n) + "x" * 1000 for n in range(2000)]})
    with pytest.raises(InvalidArgument, match="too large"):
        grammar_of({"enum": list(range(5000))})


def test_every_kind_of_nesting_is_bounded() -> None:
    for wrap in (
        lambda inner: {"allOf": [inner]}, lambda inner: {"anyOf": [inner]}, lambda inner: {"properties": {"a": inner}},
        lambda inner: {"prefixItems": [inner]}, lambda inner: {"additionalProperties": inner},
    ):  # fmt: skip
        deep: dict[str, Any] = {"type": "null"}
        for _ in range(300):
            deep = wrap(deep)
        with pytest.raises(InvalidArgument, match="deeper"):
            grammar_of(deep)
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(500)}
    with pytest.raises(InvalidArgument, match="deeper"):
        grammar_of({"$ref": "#/$defs/d0", "$defs": {**chain, "d500": {"type": "null"}}})
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidArgument, match="constant"):
        grammar_of({"const": nested})


def test_any_json_at_all_is_a_schema_or_an_error() -> None:
    rng = random.Random(8)
    keys = [
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
    ]
    keys += ["$defs", "minLength", "maxLength", "minItems", "maxItems", "minimum", "exclusiveMaximum", "nullable"]
    keys += ["additionalProperties"]
    leaves: list[Any] = [
        "object",
        "array",
        "string",
        "integer",
        "number",
        "#",
        "#/$defs/a",
        "#/properties/type",
        "",
        None,
        True,
    ]
    leaves += [False, 0, 1, -3, 2.5, 1e400, 10**20, [], {}]

    def value(depth: int) -> Any:
        kind = rng.random()
        if depth == 0 or kind < 0.4:
            return rng.choice(leaves)
        if kind < 0.6:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice([*keys, "a"]): value(depth - 1) for _ in range(rng.randint(0, 4))}

    good = 0
    for _ in range(4000):
        schema = {rng.choice(keys): value(3) for _ in range(rng.randint(0, 3))}
        try:
            Walk(parsed(grammar_of(schema)))
            good += 1
        except InvalidArgument:
            pass
    assert 200 < good < 3800


def _reads(grammar: str, text: str) -> bool:
    walk = Walk(parsed(grammar))
    walk.feed(text)
    return walk.may_end


def test_long_enums_are_read_with_one_way_to_go_on() -> None:
    rng = random.Random(2)
    words = sorted({"".join(rng.choice('ab"\\é') for _ in range(rng.randint(0, 7))) for _ in range(800)})
    for values in (words, [*words[:50], 1, 12, 123, None, True, 1.5, {"a": [1]}], ["a" * n for n in range(150)]):
        grammar = grammar_of({"type": "object", "properties": {"w": {"enum": values}}, "required": ["w"]})
        for each in [*values[:12], *values[-12:]]:
            text = json.dumps({"w": each}, ensure_ascii=False)
            assert _reads(grammar, text)
            assert not _reads(grammar, text.replace("}", "x}", 1))
    walk = Walk(parsed(grammar_of({"enum": words})))
    for each in '"ab':
        walk.feed(each)
        assert walk.width <= 8


def test_calls() -> None:
    tools: list[dict[str, Any]] = [
        {"name": "warm", "parameters": {"properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}},
        {"name": "warn", "parameters": {"type": "object", "properties": {"at": {"$ref": "#/$defs/time"}},
                                        "required": ["at"], "$defs": {"time": {"type": "integer"}}}},
        {"name": "status"},
    ]  # fmt: skip
    calls = [
        {"name": "warm", "arguments": {"unit": "C"}}, {"name": "warn", "arguments": {"at": 5}},
        {"name": "status", "arguments": {}},
    ]  # fmt: skip
    single, several = (call_grammar(tools, parallel=each) for each in (False, True))
    for call in calls:
        assert _reads(single, json.dumps(call))
        assert _reads(several, json.dumps(call))
    for count in (1, 3, MAX_CALLS):
        assert _reads(several, json.dumps((calls * count)[:count]))
        assert not _reads(single, json.dumps((calls * count)[:count]))
    for wrong in ([], (calls * MAX_CALLS)[: MAX_CALLS + 1], {**calls[0], "name": "warn"}, {"name": "other"}):
        assert not _reads(several, json.dumps(wrong))
    with pytest.raises(InvalidArgument) as caught:
        call_grammar([{"name": "x", "parameters": {"type": "potato"}}], parallel=True)
    assert caught.value.param == "tools"


def test_the_grammar_grows_with_the_schema_and_not_faster() -> None:
    sizes = [len(grammar_of({"properties": {f"p{n}": _INT for n in range(count)}})) for count in (50, 100, 200)]
    assert sizes[2] / sizes[1] < 2.3
