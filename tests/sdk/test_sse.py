"""The parser of event streams, in pieces of every size."""

from __future__ import annotations

import random

import pytest

from ai_assistant import _sse
from ai_assistant._sse import SSEParser
from ai_assistant.errors import InternalError

STREAM = (
    'data: {"a": "气温 °"}\n\n: a comment\r\nevent: x\r\ndata: one\r\ndata:two\r\n\r\n'
    "id: 7\n\ndata:\n\ndata: [DONE]\n\n"
).encode()
EVENTS = ['{"a": "气温 °"}', "one\ntwo", "", "[DONE]"]


def parsed(pieces: list[bytes]) -> list[str]:
    parser = SSEParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 1000])
def test_pieces_of_any_size_give_the_same_events(step: int) -> None:
    assert parsed([STREAM[i : i + step] for i in range(0, len(STREAM), step)]) == EVENTS


def test_random_cuts() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        cuts = sorted(chance.sample(range(len(STREAM)), chance.randrange(1, 20)))
        assert parsed([STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]) == EVENTS


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_line_ends(end: bytes) -> None:
    assert parsed([b"data: x" + end + end, b"data: y" + end + end]) == ["x", "y"]


def test_a_carriage_return_at_the_end_of_a_piece() -> None:
    assert parsed([b"data: x\r", b"\n", b"\r", b"\ndata: y\r\n\r\n"]) == ["x", "y"]


def test_an_unfinished_event_is_no_event() -> None:
    assert parsed([b"data: x\n"]) == []


def test_broken_utf8_loses_a_character_and_nothing_else() -> None:
    assert parsed([b"data: a\xffb\n\n"]) == ["a�b"]


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sse, "MAX_EVENT_BYTES", 1000)
    for end in (b"", b"\n"):
        with pytest.raises(InternalError, match="1000 bytes"):
            parsed([b"data: " + b"x" * 100 + end] * 100)
