"""Grammars that would ruin the library that follows them are found out first, and others are walked exactly."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from ai_assistant.engines.gbnf import MAX_STACKS, Grammar, Walk
from ai_assistant.engines.grammar import grammar_of
from ai_assistant.errors import InvalidArgument
from tests.support.gbnf import compiled

_STR = {"type": "string"}


def _matches(grammar: Grammar, text: str) -> bool:
    walk = Walk(grammar)
    walk.feed(text)
    return walk.may_end


@pytest.mark.parametrize(
    ("text", "alphabet"),
    [
        ('root ::= "a"* "b"', "ab"),
        ('root ::= ("ab" | "a")+ r?\nr ::= [b-c]{2,3}', "abc"),
        ('root ::= (x y){0,2} "" | [^a]\nx ::= "a"?\ny ::= "b" | ""', "abc"),
        ('root ::= "\\"" [^"\\\\\\x00-\\x1F]{1,} "\\""', 'a"\\\n'),
        ('root ::= [a\\-\\]] [\\u00e9-\\U0001F600]* "\\x41"', "a-]éA😀"),
        ('root ::= ("a"* "b"?)* "c"', "abc"),
        ('root ::= ( "a" | "b" ){3} "\\n"', "ab\n"),
    ],
)
def test_against_a_regular_expression(text: str, alphabet: str) -> None:
    grammar, pattern = Grammar(text), compiled(text)
    rng = random.Random(1)
    both = 0
    for _ in range(3000):
        word = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 6)))
        assert _matches(grammar, word) == bool(pattern.fullmatch(word)), word
        both += bool(pattern.fullmatch(word))
    assert both


def test_recursion_that_a_regular_expression_cannot_follow() -> None:
    grammar = Grammar(grammar_of({}))
    for value in ({"a": [[[[[[{"b": {"c": {"d": [1, "x", None]}}}]]]]]]}, {"a": "é" * 500}):
        assert _matches(grammar, json.dumps(value, ensure_ascii=False))
        assert not _matches(grammar, json.dumps(value, ensure_ascii=False)[:-1])
    walk = Walk(grammar)
    walk.feed('{"a": ' + "[" * 3000)
    assert 0 < walk.width < 20
    walk.feed("x")
    assert walk.width == 0
    assert not walk.must_end


def test_the_end() -> None:
    walk = Walk(Grammar('root ::= "a" "b"?'))
    assert not walk.may_end
    walk.feed("a")
    assert (walk.may_end, walk.must_end) == (True, False)
    walk.feed("b")
    assert walk.must_end


def _doubling(levels: int) -> dict[str, Any]:
    """Both alternatives of each level begin with the one below: 2 to the power of `levels` ways."""
    definitions: dict[str, Any] = {"d0": _STR}
    for n in range(levels):
        inner = {"$ref": f"#/$defs/d{n}"}
        definitions[f"d{n + 1}"] = {"anyOf": [inner, inner]}
    # Asked for one after the other, so that no reference is deep when it is looked up.
    return {"properties": {name: {"$ref": f"#/$defs/{name}"} for name in definitions}, "$defs": definitions}


def test_alternatives_of_alternatives_are_refused_before_anybody_walks_them() -> None:
    assert Grammar(grammar_of(_doubling(5)))
    start = time.thread_time()
    with pytest.raises(InvalidArgument, match="branch"):
        Grammar(grammar_of(_doubling(60)))
    assert time.thread_time() - start < 5


def test_a_rule_that_begins_with_itself_is_refused() -> None:
    for schema in (
        {"anyOf": [{"$ref": "#"}, _STR]},
        {"$ref": "#/$defs/a", "$defs": {
            "a": {"anyOf": [{"$ref": "#/$defs/b"}, _STR]}, "b": {"anyOf": [{"$ref": "#/$defs/a"}, _STR]}}},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match="itself"):
            Grammar(grammar_of(schema))
    with pytest.raises(InvalidArgument, match="itself"):
        Grammar('root ::= ("a"? root "b")* ')


_X = {"$ref": "#/$defs/x"}


@pytest.mark.parametrize(
    ("item", "opening"),
    [
        ({"anyOf": [{"type": "array", "items": _X, "maxItems": n} for n in range(2, 4)]}, "["),
        ({"anyOf": [{"properties": {"a": _X, name: _STR}, "required": ["a", name]} for name in ("b", "c")]}, '{"a":'),
    ],
)
def test_ways_that_double_with_every_bracket_end_in_time(item: dict[str, Any], opening: str) -> None:
    grammar = grammar_of({"properties": {"x": {"$ref": "#/$defs/x"}}, "required": ["x"], "$defs": {"x": item}})
    start = time.thread_time()

    def walk_on() -> None:
        walk = Walk(Grammar(grammar))
        for piece in ['{"x":', *([opening] * 30)]:
            walk.feed(piece)
            assert 0 < walk.width <= MAX_STACKS

    with pytest.raises(InvalidArgument, match="ways"):
        walk_on()
    assert time.thread_time() - start < 10


def test_a_text_that_one_more_token_could_blow_up_is_refused_before_that_token() -> None:
    item = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/x"}, "maxItems": n} for n in range(2, 100)]}
    with pytest.raises(InvalidArgument, match="ways"):
        Walk(Grammar(grammar_of({"$ref": "#/$defs/x", "$defs": {"x": item}})))


def test_alternatives_that_differ_soon_cost_nothing() -> None:
    """Discriminated unions, recursive or not, are what people write."""
    nodes = [
        {"properties": {"op": {"const": op}, "left": _X, "right": _X}, "required": ["op", "left", "right"]}
        for op in ("add", "sub", "mul", "div", "pow")
    ]
    walk = Walk(Grammar(grammar_of({**_X, "$defs": {"x": {"anyOf": [*nodes, {"type": "integer"}]}}})))
    value: Any = 1
    for op in ("add", "mul") * 8:
        value = {"op": op, "left": value, "right": 2}
    for each in json.dumps(value):
        walk.feed(each)
        assert 0 < walk.width <= 32
    assert walk.must_end


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{n}": {"type": "string", "minLength": n, "maxLength": 1000} for n in range(200)}},
        {"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {
            "properties": {f"p{n}": {"type": "array", "items": _STR, "maxItems": 900 + n} for n in range(90)}}}}},
    ],
)  # fmt: skip
def test_repetitions_in_sum_are_bounded(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="too large") as caught:
        Grammar(grammar_of(schema))
    assert caught.value.hint


def test_nested_repetitions_have_too_many_ways() -> None:
    def walk_on() -> None:
        walk = Walk(Grammar('root ::= (("a"{0,90} "b"?){0,90})'))
        for _ in range(200):
            walk.feed("a")

    with pytest.raises(InvalidArgument, match="ways"):
        walk_on()


@pytest.mark.parametrize(
    "text", ['root ::= "a', "root ::= nobody", "root ::= (", "root ::= * ", "root ::= )", "root ::= \x00"]
)
def test_what_is_no_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="GBNF"):
        Grammar(text)


def test_deep_brackets() -> None:
    with pytest.raises(InvalidArgument, match="deeply"):
        Grammar("root ::= " + "(" * 5000 + '"a"' + ")" * 5000)


def test_many_properties() -> None:
    names = [f"p{n}" for n in range(1200)]
    start = time.thread_time()
    grammar = Grammar(grammar_of({"properties": {name: {"type": "boolean"} for name in names}, "required": names}))
    assert _matches(grammar, json.dumps(dict.fromkeys(names, True)))
    few = Grammar(grammar_of({"properties": {name: {"type": "boolean"} for name in names[:150]}}))
    assert _matches(few, '{"p3": true, "p149": false}')
    assert time.thread_time() - start < 20
    # Each that may be left out is a way to go on.
    many = Grammar(grammar_of({"properties": {name: {"type": "boolean"} for name in names}}))
    with pytest.raises(InvalidArgument, match="ways") as caught:
        Walk(many)
    assert "optional" in caught.value.hint
