"""The serving bench's own logic: traces, statistics, readers of streams and of /proc, records and their table."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

from bench._load import Answer, LoadError, ask, conversations, decode_rate, percentile, poisson, rate_between, usage_of
from bench._records import Record, append, done, table
from bench._servers import CONTEXT, Server, cpu_s, status_bytes
from bench._sizes import (
    SEVEN_CONTEXT,
    SEVEN_WORDS,
    SIZES,
    TOKENS_PER_WORD,
    TRACE_TOKENS,
    expected_s,
)
from bench._transformers import anonymous_ranges, bytes_within
from bench.harness import Row, limit
from bench.serving import DEFAULT, LEAST_PAIRS, ONCE, PARTS, PartError, Plan, _compare, chosen_parts, in_turn
from bench.serving import main as serving_main
from bench.soak import growth


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile([7.0], 0.95) == 7.0
    for values, share in (([], 0.5), ([1.0], 1.5), ([1.0], float("nan"))):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, share)


def test_a_poisson_trace_has_the_rate_and_repeats_itself() -> None:
    found = poisson(1, 2000, 4.0, 10, 5)
    gaps = [b.at - a.at for a, b in pairwise(found)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert min(gaps) > 0
    assert found == poisson(1, 2000, 4.0, 10, 5) != poisson(2, 2000, 4.0, 10, 5)
    assert len({each.prompt for each in found}) == 2000
    with pytest.raises(ValueError, match="rate"):
        poisson(1, 1, 0, 1, 1)


def test_conversations_come_back_and_share_beginnings() -> None:
    found = [each.prompt for each in conversations(3, 6, 4, 50, 5, 2)]
    assert len(found) == 24
    assert len({each.partition("\n")[0] for each in found}) == 2
    continued = [any(each.startswith(old) for old in found[:n]) for n, each in enumerate(found)]
    assert sum(continued) == 18
    assert any(not found[n + 1].startswith(found[n]) for n in range(23))


def test_the_rate_of_streams_that_overlap() -> None:
    answers = [Answer(0.0, 1.0, 3.0, 11, 5), Answer(1.0, 1.0, 4.0, 21, 5)]
    assert decode_rate(answers) == pytest.approx(30 / 4)


def test_reading_of_prompts_cancels_out() -> None:
    # Two seconds of reading, then ten tokens a second for both together; in turn, the first one writes meanwhile.
    together = [[Answer(0.0, 2.0, 2.0 + each, each * 5, 5)] * 2 for each in (1, 5)]
    in_turn = [
        [Answer(0.0, 1.0, 2.0 + each, each * 5, 5), Answer(0.0, 2.0, 2.0 + each, each * 5, 5)] for each in (1, 5)
    ]
    assert rate_between(*together) == rate_between(*in_turn) == pytest.approx(10)


def stream(tokens: object = 3, end: str = "data: [DONE]\n\n") -> bytes:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 9}})
    return f'HTTP/1.1 200 OK\r\n\r\n: waiting\n\ndata: {{"usage": null}}\n\ndata: {usage}\n\n{end}'.encode()


def test_the_usage_is_read() -> None:
    assert usage_of(stream())["completion_tokens"] == 3


@pytest.mark.parametrize(
    "bad", [b"", stream(end=""), stream(None), stream("x"), b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}",
            b"data: {broken\ndata: [DONE]", b"\xff\x00data: [DONE]"],
)  # fmt: skip
def test_anything_else_is_no_measurement(bad: bytes) -> None:
    with pytest.raises(LoadError):
        usage_of(bad)


async def served(path: Path, answer: bytes) -> Answer:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(handle, str(path)):
        return await ask(path, "m", "hello", 3)


async def test_the_client_reads_a_stream_and_names_a_refusal(tmp_path: Path) -> None:
    found = await served(tmp_path / "a", stream())
    assert (found.tokens, found.prompt_tokens) == (3, 9)
    assert 0 < found.first <= found.last
    with pytest.raises(LoadError, match=" 429 "):
        await served(tmp_path / "b", b"HTTP/1.1 429 Too Many Requests\r\n\r\n" + b"x" * 1000)
    with pytest.raises(LoadError, match="2 tokens came"):
        await served(tmp_path / "c", stream(2))
    with pytest.raises(LoadError, match="no answer"):
        await ask(tmp_path / "nobody", "m", "hello", 3)


def test_proc_is_read() -> None:
    assert status_bytes("Name:\tx\nRssAnon:\t  12 kB\nRssShmem:\t 3 kB\n", "RssAnon", "RssShmem") == 15 << 10
    text = "7 (a ) S 1 b) S " + " ".join(str(each) for each in range(1, 40))
    assert cpu_s(text) == (11 + 12) / os.sysconf("SC_CLK_TCK")


def test_growth_leaves_the_first_tenth_out() -> None:
    assert growth([1, *[100] * 8, 102]) == pytest.approx(0.02)
    with pytest.raises(ValueError, match="three"):
        growth([1, 2])


def test_records_survive_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "build" / "r.jsonl"
    assert done(path) == {}
    old, new = (Record("api", "-", (limit("share", each, 0.08, "x"),), "a box") for each in (0.5, 0.02))
    append(path, old)
    append(path, new)
    with path.open("a") as out:
        out.write('{"part": "decode", "sha\n[]\n{"part": "x"}\n')
    assert done(path) == {("api", "-"): new}
    text = table(done(path), {"api": ("-",), "decode": ("1B",)})
    assert "| api | - | share | 0.02 | 0.08 | 0.25 | ≤ 0.08 x | yes |" in text
    assert "| decode | 1B | not measured |" in text
    assert "Measured on: a box." in text


def test_parts_are_chosen_by_name() -> None:
    assert chosen_parts("prefill, decode") == ["decode", "prefill"]
    assert chosen_parts("") == [each for each in PARTS if each != "transformers"]
    assert chosen_parts("transformers") == ["transformers"]
    with pytest.raises(argparse.ArgumentTypeError, match="speed"):
        chosen_parts("decode,speed")


def test_the_whole_bench_ends_in_time() -> None:
    parts = [(name, shape) for name in DEFAULT if name not in ONCE for shape in ("0.5B", "1B")]
    whole = sum(expected_s(*each) for each in parts) + sum(expected_s(each, "0.5B") for each in DEFAULT if each in ONCE)
    assert 30 * 60 < whole < 70 * 60
    for name, shape in parts:
        if name != "memory":
            assert expected_s(name, shape, 21) > 2 * expected_s(name, shape, 5) * 0.75
    with pytest.raises(KeyError):
        expected_s("speed", "0.5B")
    assert all(min(each.pairs, each.cheap_pairs) >= LEAST_PAIRS for each in SIZES.values())


def test_what_is_asked_fits_the_contexts() -> None:
    assert TOKENS_PER_WORD * SEVEN_WORDS + 8 + 32 <= SEVEN_CONTEXT
    for sizes in SIZES.values():
        asks = conversations(1, sizes.people, sizes.turns, sizes.shared_words, sizes.said_words, TRACE_TOKENS)
        longest = max(len(each.prompt.split()) for each in asks)
        assert TOKENS_PER_WORD * longest * 1.2 + TRACE_TOKENS < CONTEXT
        assert max(sizes.decode_tokens) + TOKENS_PER_WORD * 8 + 8 < 512


def test_progress_is_told_after_each_pair(capsys: pytest.CaptureFixture[str]) -> None:
    mine, theirs = in_turn("trial", lambda index: index, lambda index: -index, 5)
    assert (mine, theirs) == ([0, 1, 2, 3, 4], [0, -1, -2, -3, -4])
    told = capsys.readouterr().err.splitlines()
    assert [each.partition(",")[0] for each in told] == [f"serving:   trial: pair {each} of 5" for each in range(1, 6)]


def test_a_sample_that_fails_names_its_side_and_its_log() -> None:
    sides = tuple(Server(Path("/nowhere"), "m", 1, name, f"{name}.log") for name in ("ours", "llama-server"))
    with pytest.raises(PartError, match=r"poisson: ours failed: no answer.*; its log: ours\.log"):
        _compare("poisson", (sides[0], sides[1]), lambda side, index: 1.0, 5)


def test_other_parts_go_on_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(plan: Plan) -> list[Row]:
        raise PartError("decode: llama-server failed: why; its log: a.log")

    monkeypatch.setattr("bench.serving.PATH", tmp_path / "r.jsonl")
    monkeypatch.setitem(PARTS, "decode", broken)
    monkeypatch.setitem(PARTS, "api", lambda plan: [limit("share", 0.01, 0.08, "x")])
    monkeypatch.setattr("sys.argv", ["serving", "--only", "decode,api", "--shape", "1B", "--threads", "1"])
    assert serving_main() == 1
    out = capsys.readouterr()
    assert "decode 1B failed: decode: llama-server failed: why; its log: a.log" in out.err
    assert "minutes that are left" in out.err
    assert "share" in out.out
    assert list(done(tmp_path / "r.jsonl")) == [("api", "-")]
    for bad in (["--pairs", "4"], ["--pairs", "-1"], ["--shape", "2B"]):
        monkeypatch.setattr("sys.argv", ["serving", "--threads", "1", *bad])
        with pytest.raises(SystemExit):
            serving_main()


def test_weights_count_only_where_no_file_stands_behind_them() -> None:
    maps = (
        "1000-2000 rw-p 00000000 00:00 0 \n"
        "2000-3000 r--p 00000000 08:01 77   /a b/model.safetensors\n"
        "5000-6000 rw-p 00000000 00:00 0    [heap]\n"
    )
    ranges = anonymous_ranges(maps)
    assert ranges == [(0x1000, 0x2000), (0x5000, 0x6000)]
    # The second is mapped; the last is the first again, as tied weights are.
    blocks = [(0x1000, 100), (0x2000, 1000), (0x5FFF, 10), (0x6000, 5), (0x1000, 100)]
    assert bytes_within(blocks, ranges) == 110
    assert bytes_within([], ranges) == 0
