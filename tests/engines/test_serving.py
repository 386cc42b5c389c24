"""Many requests at once on real native code: what is shared, put aside, quantised or guessed does not show."""

from __future__ import annotations

import gc
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.engines.contract import Chunk, Finished, GenerateRequest, LoadOptions, Queued, TokenLogprob
from ai_assistant.engines.llama import LlamaEngine
from ai_assistant.errors import Cancelled, InvalidArgument, InvalidModel
from tests.support import gguf_writer

pytestmark = pytest.mark.engine

_HEAD = "You are the assistant of a small machine. Be brief. " * 2
_BUILT_IN = Path(__file__).parents[2] / "models" / "assistant-1.gguf"


def _entries(engine: LlamaEngine, prompt: str, count: int = 24, **fields: Any) -> tuple[list[TokenLogprob], Finished]:
    request = GenerateRequest(prompt=prompt, max_tokens=count, logprobs=2, **{"temperature": 0.0, **fields})
    events = list(engine.generate(request))
    last = events[-1]
    assert isinstance(last, Finished)
    return [entry for each in events if isinstance(each, Chunk) for entry in each.logprobs], last


def _assert_same(one: list[TokenLogprob], other: list[TokenLogprob], within: float = 0.03) -> None:
    """Sums are made in another order in another batch: where two tokens are equally likely the choice may differ."""
    assert one
    for a, b in zip(one, other, strict=False):
        if a.bytes != b.bytes:
            assert a.top[0].logprob - a.top[1].logprob < within
            return
        assert abs(a.logprob - b.logprob) < within
    assert len(one) == len(other)


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Iterator[LlamaEngine]:
    """One sequence, nothing guessed: what the others must agree with."""
    with LlamaEngine.open(tiny, LoadOptions(sequences=1, threads=1, speculative="off")) as engine:
        yield engine


# Shorter than half of the context it is copied as a state, longer as a whole buffer.
@pytest.mark.parametrize("repeat", [1, 4])
def test_a_copied_beginning_gives_the_answer_of_one_read_alone(tiny: Path, alone: LlamaEngine, repeat: int) -> None:
    head = _HEAD * repeat
    with LlamaEngine.open(tiny, LoadOptions(sequences=3, threads=1, speculative="off")) as engine:
        first = head + "This conversation is a good deal longer than the next ones, for it was first. " * 2
        _entries(engine, first, 8)
        for name in ("one", "two"):
            found, last = _entries(engine, head + name)
            assert last.usage.cached_tokens >= len(engine.tokenize(head)) - 2
            _assert_same(found, _entries(alone, head + name)[0])
        again, last = _entries(engine, first, 8)
        assert last.usage.cached_tokens == last.usage.prompt_tokens - 1
        _assert_same(again, _entries(alone, first, 8)[0])


def test_a_burst_with_one_beginning_reads_it_once(tiny: Path, alone: LlamaEngine) -> None:
    prompts = [_HEAD * 4 + each for each in ("a", "b", "c", "d")]
    with LlamaEngine.open(tiny, LoadOptions(sequences=4, threads=1, batch_tokens=64, speculative="off")) as engine:
        found: list[Any] = [None] * 4

        def work(index: int) -> None:
            found[index] = _entries(engine, prompts[index])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        tokens = len(engine.tokenize(_HEAD * 4))
        assert sorted(last.usage.cached_tokens >= tokens - 2 for _, last in found) == [False, True, True, True]
        assert engine.stats().prefix_tokens >= 3 * (tokens - 2)
        for prompt, (entries, _) in zip(prompts, found, strict=True):
            _assert_same(entries, _entries(alone, prompt)[0])


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("disk", [False, True])
def test_a_conversation_that_was_put_aside_goes_on_as_if_it_had_stayed(tiny: Path, kv_type: str, disk: bool) -> None:
    prompts = [f"{number}: " + "some words of a conversation " * 8 for number in range(3)]
    options: dict[str, Any] = {"threads": 1, "kv_type": kv_type, "speculative": "off"}
    with LlamaEngine.open(tiny, LoadOptions(sequences=3, **options)) as roomy, tempfile.TemporaryFile() as file:
        spill: dict[str, Any] = {"spill_disk_bytes": 64 << 20} if disk else {"spill_memory_bytes": 64 << 20}
        options |= spill
        files = {"spill": file.fileno()} if disk else {}
        with LlamaEngine.open(tiny, LoadOptions(sequences=1, **options), files=files) as engine:
            for prompt in prompts:
                for each in (roomy, engine):
                    _entries(each, prompt, 4)
            for prompt in prompts:
                expected, there = _entries(roomy, prompt + "and more")
                found, last = _entries(engine, prompt + "and more")
                assert last.usage.cached_tokens == there.usage.cached_tokens > 100
                _assert_same(found, expected, 0.001)
            stats = engine.stats()
            assert stats.restored == 3
            assert stats.spilled_bytes > 0
            if disk:
                assert engine.trim() >= 0
                _, last = _entries(engine, prompts[1] + "and more")
                assert last.usage.cached_tokens > 100
                assert engine.stats().restored == 4


def test_a_spill_file_that_is_full_costs_only_the_states(tiny: Path) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        options = LoadOptions(sequences=1, threads=1, spill_disk_bytes=64 << 20)
        with LlamaEngine.open(tiny, options, files={"spill": full.fileno()}) as engine:
            for number in range(8):
                assert _entries(engine, f"{number % 2} " + "words " * 40, 3)[1].usage.completion_tokens
            assert engine.stats().restored == 0


def test_quantised_caches_are_smaller_and_close(tiny: Path, alone: LlamaEngine) -> None:
    expected = _entries(alone, _HEAD, 1)[0]
    for kv_type in ("q8_0", "q4_0"):
        options = LoadOptions(sequences=2, threads=1, kv_type=kv_type)
        with LlamaEngine.open(tiny, options) as engine:
            found = _entries(engine, _HEAD, 1)[0]
            assert abs(found[0].logprob - expected[0].logprob) < (0.1 if kv_type == "q8_0" else 1.0)
            sizes = [len(each._scheduler._context.save(0)) for each in (engine, alone)]
            assert sizes[0] < 0.6 * sizes[1]
    for wrong in ("f64", "q8", "", 3):
        with pytest.raises(InvalidArgument) as caught:
            LlamaEngine.open(tiny, LoadOptions(kv_type=wrong))  # type: ignore[arg-type]
        assert caught.value.param == "kv_type"


def test_guessed_tokens_give_the_same_answer(tiny: Path, alone: LlamaEngine) -> None:
    prompt = "one two three four five six seven eight " * 6
    with LlamaEngine.open(tiny, LoadOptions(sequences=1, threads=1, speculative="lookup")) as engine:
        found, last = _entries(engine, prompt, 200, ignore_eos=True)
        expected, _ = _entries(alone, prompt, 200, ignore_eos=True)
        _assert_same(found, expected)
        assert last.usage.completion_tokens == len(found) == 200
        assert engine.stats().draft_tokens > 0


def test_a_draft_model_is_believed_only_where_it_is_right(tiny: Path, alone: LlamaEngine, tmp_path: Path) -> None:
    other = gguf_writer.write_llama(tmp_path / "other.gguf", layers=1, seed=9)
    prompt = "the quick brown fox jumps over the lazy dog"
    expected = _entries(alone, prompt, 60, ignore_eos=True)[0]
    for draft, fits in ((tiny, True), (other, False)):
        with draft.open("rb") as file:
            options = LoadOptions(sequences=2, threads=1, speculative="draft")
            with LlamaEngine.open(tiny, options, files={"draft": file.fileno()}) as engine:
                found, _ = _entries(engine, prompt, 60, ignore_eos=True)
                _assert_same(found, expected)
                stats = engine.stats()
                assert stats.draft_tokens > 0
                # A model guesses itself, but for rounding.
                assert (stats.draft_accepted > 0.8 * stats.draft_tokens) is fits
            assert not file.closed


def test_a_draft_model_of_another_family_is_refused(tiny: Path, tmp_path: Path) -> None:
    larger = gguf_writer.write_llama(tmp_path / "larger.gguf", vocabulary=600)
    tokens, merges, kinds = gguf_writer.byte_level_tokens(512, ("<a>", "<b>", "<c>"))
    del merges, kinds
    named = gguf_writer.write_llama(tmp_path / "named.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:5000])
    for path in (larger, named, broken):
        with path.open("rb") as file, pytest.raises(InvalidModel):
            LlamaEngine.open(tiny, LoadOptions(speculative="draft"), files={"draft": file.fileno()})
    with pytest.raises(InvalidArgument) as caught:
        LlamaEngine.open(tiny, LoadOptions(speculative="draft"))
    assert caught.value.param == "speculative"


def test_the_built_in_model_answers_alike_however_it_is_served() -> None:
    prompts = [f"{_HEAD}Set the profile to eco for {number} hours." for number in (2, 3, 5)]
    options: dict[str, Any] = {"threads": 1, "context_length": 512}
    with LlamaEngine.open(_BUILT_IN, LoadOptions(sequences=1, speculative="off", **options)) as plain:
        expected = [_entries(plain, each, 48)[0] for each in prompts]
    served = LoadOptions(sequences=2, speculative="lookup", spill_memory_bytes=64 << 20, **options)
    with LlamaEngine.open(_BUILT_IN, served) as engine:
        for _ in range(2):
            for prompt, entries in zip(prompts, expected, strict=True):
                _assert_same(_entries(engine, prompt, 48)[0], entries, 0.1)
        assert engine.stats().prefix_hits >= 5


def test_the_end_may_be_ignored(alone: LlamaEngine) -> None:
    for seed in range(3):
        request = GenerateRequest(prompt="x", max_tokens=200, temperature=2.0, seed=seed, ignore_eos=True)
        last = list(alone.generate(request))[-1]
        assert isinstance(last, Finished)
        assert last.usage.completion_tokens == 200


_LONG = 32_768
_LONG_CACHE_BYTES = 4 * _LONG * 2 * 2 * 128 * 2


def test_a_cache_takes_memory_as_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_writer.write_llama(tmp_path / "long.gguf", context=_LONG)
    options = LoadOptions(sequences=4, threads=1, context_length=_LONG)
    with LlamaEngine.open(path, options) as engine:
        untouched = engine.stats().kv_untouched_bytes
        assert untouched > 0.9 * _LONG_CACHE_BYTES
        found = _entries(engine, "hello " * 40)[0]
        after = engine.stats().kv_untouched_bytes
        assert 0.9 * untouched < after < untouched
    monkeypatch.setattr("ai_assistant.engines.pages.Fresh.give_back", lambda _fresh: 0)
    with LlamaEngine.open(path, options) as engine:
        assert engine.stats().kv_untouched_bytes < untouched - 0.9 * _LONG_CACHE_BYTES
        assert _entries(engine, "hello " * 40)[0] == found


def test_trimming_gives_memory_back_and_the_next_answer_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after long conversations: all of the cache is in memory.
    monkeypatch.setattr("ai_assistant.engines.pages.Fresh.give_back", lambda _fresh: 0)
    path = gguf_writer.write_llama(tmp_path / "long.gguf", context=_LONG)
    with LlamaEngine.open(path, LoadOptions(sequences=4, threads=1, context_length=_LONG)) as engine:
        before = _entries(engine, "hello")[0]
        # Half of what the caches took is a safe bound.
        assert engine.trim() > _LONG_CACHE_BYTES // 2
        assert engine.trim() < 16 << 20
        _assert_same(_entries(engine, "hello")[0], before)


def test_sixty_four_requests_with_random_cancels_leave_nothing_behind(tiny: Path) -> None:
    def usage() -> tuple[int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), pages * 4096

    with tempfile.TemporaryFile() as file:
        options = LoadOptions(
            sequences=4, threads=1, spill_memory_bytes=2 << 20, spill_disk_bytes=8 << 20, extra={"max_queued": 64}
        )
        with LlamaEngine.open(tiny, options, files={"spill": file.fileno()}) as engine:

            def round_of(seed: int) -> None:
                rng = random.Random(seed)
                ends: list[str] = []

                def one(number: int) -> None:
                    request = GenerateRequest(
                        prompt=rng.choice((_HEAD, _HEAD * 3, "")) + f"request {number} " * rng.randrange(1, 9),
                        max_tokens=rng.randrange(1, 60),
                        temperature=rng.choice((0.0, 1.0)),
                        priority=rng.choice(("interactive", "batch")),
                        response_schema={"type": "object"} if number % 9 == 0 else None,
                    )
                    after = rng.randrange(1, 8) if number % 3 == 0 else None
                    generation = engine.generate(request)
                    try:
                        for count, event in enumerate(generation):
                            assert isinstance(event, Chunk | Queued | Finished)
                            if count == after:
                                generation.cancel()
                        ends.append("end")
                    except Cancelled:
                        ends.append("cancelled")

                threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
                for each in threads:
                    each.start()
                for each in threads:
                    each.join(120)
                assert len(ends) == 64
                assert engine.stats().running == engine.stats().waiting == 0

            round_of(1)
            before = usage()
            for seed in (2, 3):
                round_of(seed)
            after = usage()
            assert after[:2] == before[:2]
            assert after[2] - before[2] < 8 << 20
            assert engine.stats().prefix_hits > 0


def test_weights_that_are_not_repacked_compute_the_same(tmp_path: Path) -> None:
    path = gguf_writer.write_llama(tmp_path / "small.gguf", kind="Q8_0")
    rows = []
    for repack in (True, False):
        with LlamaEngine.open(path, LoadOptions(sequences=1, threads=1, repack=repack)) as engine:
            rows.append(_entries(engine, _HEAD, 20, ignore_eos=True)[0])
    _assert_same(rows[0], rows[1], 0.1)
