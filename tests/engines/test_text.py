"""Incremental decoding and stop strings, cut at every place."""

from __future__ import annotations

import random

import pytest

from ai_assistant.engines.text import StopMatcher, Utf8Decoder


def test_characters_wait_until_they_are_whole() -> None:
    decoder = Utf8Decoder()
    shown = [decoder.feed(bytes([each])) for each in "aé语🙂".encode()]
    assert shown == ["a", "", "é", "", "", "语", "", "", "", "🙂"]
    assert decoder.finish() == ""


def test_broken_bytes_become_replacements_and_end() -> None:
    decoder = Utf8Decoder()
    assert decoder.feed(b"\xff") == "�"
    assert decoder.feed(b"\xe8\xaf") == ""
    assert decoder.finish() == "�"


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (("END",), "to the END of it", "to the "),
        (("END", "the"), "to the END", "to "),
        (("aab",), "aaab", "a"),
        (("\n\n",), "one\ntwo\n\nthree", "one\ntwo"),
        (("。",), "你好。世界", "你好"),
        (("xyz",), "no stop here xy", "no stop here xy"),
        (("abcd", "bc"), "abcabcd", "a"),
        ((), "anything", "anything"),
    ],
)
def test_stop_strings_wherever_the_text_is_cut(stops: tuple[str, ...], text: str, expected: str) -> None:
    rng = random.Random(3)
    for _ in range(200):
        matcher = StopMatcher(stops)
        rest, out = text, ""
        while rest and not matcher.stopped:
            size = rng.randint(1, 4)
            out += matcher.feed(rest[:size])
            # Nothing is shown that is not a part of the answer.
            assert expected.startswith(out)
            rest = rest[size:]
        out += matcher.finish()
        assert out == expected
        assert matcher.stopped == (expected != text)


def test_only_a_possible_stop_is_held_back() -> None:
    matcher = StopMatcher(("STOP",))
    assert matcher.feed("plain") == "plain"
    assert matcher.feed(" S") == " "
    assert matcher.feed("um") == "Sum"
    assert matcher.feed("ST") == ""
    assert matcher.finish() == "ST"
