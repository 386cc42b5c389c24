"""The overhead bench: what it concludes from known timings, and how it reads a stream."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from bench.api_overhead import Timing, judge, over_the_socket


def timing(ttft_ms: float, tpot_ms: float, *, outside_ms: float = 1.0) -> Timing:
    first = ttft_ms / 1000
    return Timing(first, first + 10 * tpot_ms / 1000, 11, first - outside_ms / 1000, 10 * tpot_ms / 1000)


def test_little_is_fine_and_much_is_not() -> None:
    bare = [timing(50, 30)] * 9
    assert [each.holds for each in judge([timing(52, 30.3)] * 9, bare)] == [True] * 4
    assert [each.holds for each in judge([timing(54, 30.3)] * 9, bare)] == [False, True, True, True]
    assert [each.holds for each in judge([timing(52, 31)] * 9, bare)] == [True, True, False, True]
    assert [each.holds for each in judge([timing(52, 30, outside_ms=4)] * 9, bare)] == [True, False, True, True]


def serve_once(path: Path, answer: bytes) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def run() -> None:
        with listener, listener.accept()[0] as sock:
            assert b'"stream": true' in sock.recv(65536)
            for piece in answer.split(b"|"):
                sock.sendall(piece)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def events(tokens: int) -> bytes:
    usage = {"prompt_tokens": 2, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 0},
             "queue_s": 0.25, "prefill_s": 0.5, "decode_s": 2.0}  # fmt: skip
    return (
        b"HTTP/1.1 200 OK\r\n\r\n|data: {}\n\n|"
        + b'data: {"choices":[],"usage":' + json.dumps(usage, separators=(",", ":")).encode()
        + b"}\n\nda|ta: [DONE]\n\n"
    )  # fmt: skip


def test_a_stream_is_read_to_its_end(tmp_path: Path) -> None:
    thread = serve_once(tmp_path / "s", events(3))
    found = over_the_socket(tmp_path / "s", "m", "hello", 3)
    thread.join()
    assert 0 < found.first <= found.last
    assert (found.tokens, found.engine_first, found.engine_decode) == (3, 0.75, 2.0)


@pytest.mark.parametrize("answer", [events(2), b"HTTP/1.1 500 X\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n"])
def test_anything_else_is_no_measurement(tmp_path: Path, answer: bytes) -> None:
    thread = serve_once(tmp_path / "s", answer)
    with pytest.raises(SystemExit, match="api_overhead"):
        over_the_socket(tmp_path / "s", "m", "hello", 3)
    thread.join()
