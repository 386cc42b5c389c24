"""Regular expressions as grammars: the same language as Python's `re`, with one way to go on, or an error."""

from __future__ import annotations

import random
import re
import time

import pytest

from ai_assistant.engines.gbnf import Grammar, Walk
from ai_assistant.engines.regex_grammar import grammar_of_regex
from ai_assistant.errors import InvalidArgument

_ALPHABET = "abfoxré蓝@.com-_1 9\nAü😀$^\\{}"

_CODE = r"\\x[0-9A-F]{2}|\\u[0-9A-F]{4}|\\U[0-9A-F]{8}|[^\\]"


def _matches(grammar: Grammar, text: str) -> bool:
    walk = Walk(grammar)
    widest = 0
    for each in text:
        walk.feed(each)
        widest = max(widest, walk.width)
    # One way for each character that may follow, or the end; never two for one character.
    assert widest <= 64
    return walk.may_end


def _sample(grammar: str, rng: random.Random) -> str:
    """A text that the grammar makes, by going from state to state."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines())
    name, out = "s0", ""
    while True:
        ways = rules[name].split(" | ")
        way = rng.choice(ways)
        if '""' in ways and (way == '""' or len(out) > 40):
            return out
        if way == '""':
            continue
        chosen, _, name = way.partition("] ")
        ranges = re.findall(f"({_CODE})(?:-({_CODE}))?", chosen.strip("[]"))
        low, high = rng.choice(ranges)
        codes = [int(each[2:], 16) if len(each) > 1 else ord(each) for each in (low, high or low)]
        out += chr(rng.randint(codes[0], min(codes[1], codes[0] + 30)))
        if not name:
            return out


_GOOD = [
    r"a+b?", r"(foo|bar){2,3}", r"[^\W_]+@[\w.-]+\.(com|org)", r"\d{4}-\d{2}-\d{2}", r"(a*)*b", r"[é-ü蓝]+|x", r"^a|b$",
    r"(x{0,30}){0,9}", r".{3}", r"[]a-]+", r"(?P<y>a)(?:b|)", r"(?<y>a)", r"a{,3}", r"\x41\u00e9\.", r"a*?b+?",
    r"[\d\s]+x",
    r"\S\D\W", r"(a|b|ab)*o", r"((a|b)?c){2}|", r"[^a]", r"[\^$.|?*+(){}\\]+", r"\$\^", r"}|]", r"(|a)b", r"a{0}b",
    r"[a\-f]{1,}", r"[^\n\r]*", r"^$|a", r"\{\}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", _GOOD)
def test_the_same_language_as_re(pattern: str) -> None:
    text = grammar_of_regex(pattern)
    grammar = Grammar(text)
    python = re.compile(pattern.replace("(?<y>", "(?P<y>"), re.ASCII)
    rng = random.Random(4)
    for _ in range(1500):
        word = "".join(rng.choice(_ALPHABET) for _ in range(rng.randint(0, 6)))
        assert _matches(grammar, word) == bool(python.fullmatch(word)), word
    for _ in range(200):
        word = _sample(text, rng)
        assert python.fullmatch(word), word
        assert _matches(grammar, word)


def test_random_expressions() -> None:
    rng = random.Random(9)

    def make(depth: int) -> str:
        kind = rng.randrange(7) if depth else 0
        if kind < 2:
            return rng.choice(["a", "b", "[ab]", "[^a]", ".", "c"])
        if kind == 2:
            return f"({make(depth - 1)}|{make(depth - 1)})"
        if kind == 3:
            return f"({make(depth - 1)}){rng.choice(['?', '*', '+', '{1,3}', '{2}', '{2,}', '*?'])}"
        return make(depth - 1) + make(depth - 1)

    for _ in range(250):
        pattern = make(4)
        grammar, python = Grammar(grammar_of_regex(pattern)), re.compile(pattern)
        for _ in range(60):
            word = "".join(rng.choice("abc") for _ in range(rng.randint(0, 7)))
            assert _matches(grammar, word) == bool(python.fullmatch(word)), (pattern, word)


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        (r"(a)\1", "back"), (r"(?P<x>a)(?P=x)", "back"), ("(?=a)b", "ahead"), ("(?!a)b", "ahead"), ("(?<=a)b", "ahead"),
        ("(?<!a)b", "ahead"), ("(?i)a", "unknown kind"), ("(?>a)", "unknown kind"), ("(?#x)a", "unknown kind"),
        (r"\bfoo", r"\b"), (r"\Aa", r"\A"), (r"\p{L}", r"\p"), (r"\x4", "digits"), (r"\u12G4", "digits"),
        ("a**", "repeats a repetition"), ("a++", "repeats a repetition"), ("a{2}{3}", "repeats a repetition"),
        ("*a", "nothing to repeat"), ("(|*)", "nothing to repeat"), ("a{2,1}", "wrong way"), ("x{", "no repetition"),
        ("x{a}", "no repetition"), ("x{,}", "no repetition"), ("x{-1}", "no repetition"), ("x{²}", "no repetition"),
        ("a{1001}", "1000 times"), ("a{99999999999999999999}", "1000 times"), ("[b-a]", "range"), (r"[a-\d]", "range"),
        ("[a", "too early"), ("[]", "too early"), ("[^]", "too early"), ("a\\", "too early"), ("(a", "without a )"),
        ("a)", "without a ("), ("a^b", "^"), ("a$b", "$"), ("(^a)", "^"), ("", "empty"), ("(|)*", "empty"),
        ("^$", "empty"), ("\x00", "no character"), (r"\x00", "no character"), ("\ud800", "no character"),
        (r"[^\s\S]", "without characters"),
        ("(?P<1>a)", "wrong name"), ("(?P<a", "wrong name"), ("(" * 100 + ")" * 100, "deeper"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(pattern: str, word: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        grammar_of_regex(pattern)
    assert word in caught.value.message
    assert caught.value.param == "response_regex"


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{1000}){1000}", "((((a{9}){9}){9}){9}){9}", "(x{0,999}){0,999}", ".*a.{20}", "(a|b|ab)*a.{14}",
        "(((a?){20}){20}){20}",
        "|".join(f"[a-{chr(98 + n % 24)}]{{{n},999}}" for n in range(300)), "([a-z]{0,50}[b-y]{0,50}){0,20}x",
        "(" * 60 + "a" + "{9})" * 60, "((a*)*)*" * 500 + "b",
    ],
)  # fmt: skip
def test_bombs_are_refused_in_bounded_time_or_harmless(pattern: str) -> None:
    start = time.thread_time()
    try:
        text = grammar_of_regex(pattern)
        assert len(text) < 1 << 20
        Walk(Grammar(text)).feed("aaaa")
    except InvalidArgument as error:
        # Some are small in the end, and then fine.
        assert "complex" in error.message, error.hint  # noqa: PT017
    assert time.thread_time() - start < 20


def test_what_can_only_end() -> None:
    walk = Walk(Grammar(grammar_of_regex("yes|no")))
    walk.feed("ye")
    assert not walk.must_end
    walk.feed("s")
    assert walk.must_end
