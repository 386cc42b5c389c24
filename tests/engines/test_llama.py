"""The llama engine on a tiny model of random weights: everything but good taste."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.engines import open_model
from ai_assistant.engines.contract import (
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    LoadOptions,
    TokenLogprob,
)
from ai_assistant.engines.gguf import read_gguf
from ai_assistant.engines.llama import LlamaEngine, LlamaGeneration
from ai_assistant.errors import (
    AIAssistantError,
    Busy,
    Cancelled,
    ContextOverflow,
    InternalError,
    InvalidArgument,
    InvalidModel,
    OutOfMemory,
)
from tests.support import gguf_writer

pytestmark = pytest.mark.engine

_TOOLS: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "set_profile", "parameters": {
        "type": "object",
        "properties": {"profile": {"enum": ["eco", "fast"]}, "hours": {"type": "integer", "minimum": 1, "maximum": 24}},
        "required": ["profile", "hours"]}}},
    {"type": "function", "function": {"name": "status"}},
)  # fmt: skip


@pytest.fixture
def unread_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation stands still after a few events that nobody reads, so that it cannot end by itself."""
    monkeypatch.setattr("ai_assistant.engines.scheduler.MAX_UNREAD", 8)


def _endless(prompt: str) -> GenerateRequest:
    """With log-probabilities every token is an event."""
    return GenerateRequest(prompt=prompt, temperature=1.0, seed=2, max_tokens=450, logprobs=0)


def _run(engine: LlamaEngine, **fields: Any) -> tuple[str, Finished, list[Event]]:
    fields = {"max_tokens": 24, "temperature": 0.0, **fields}
    events = list(engine.generate(GenerateRequest(**fields)))
    last = events[-1]
    assert isinstance(last, Finished)
    return "".join(each.text for each in events if isinstance(each, Chunk)), last, events


def test_an_answer_and_what_it_cost(engine: LlamaEngine) -> None:
    text, last, _ = _run(engine, prompt="hello world", max_tokens=10)
    assert text
    assert last.reason is FinishReason.LENGTH
    usage = last.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(engine.tokenize("hello world")), 10)
    assert usage.prefill_s > 0
    assert usage.decode_s > 0
    assert 0 <= usage.queue_s < 5


def test_greedy_is_the_same_alone_and_in_a_batch(engine: LlamaEngine) -> None:
    prompts = [f"prompt number {n} " + "abc " * n for n in range(3)]
    alone = [_tokens(engine, prompt=each) for each in prompts]
    together: list[list[TokenLogprob]] = [[], [], []]

    def work(index: int) -> None:
        together[index] = _tokens(engine, prompt=prompts[index])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for one, other in zip(alone, together, strict=True):
        _assert_same(one, other)


def _tokens(engine: LlamaEngine, **fields: Any) -> list[TokenLogprob]:
    events = _run(engine, max_tokens=40, logprobs=2, **fields)[2]
    return [entry for each in events if isinstance(each, Chunk) for entry in each.logprobs]


def _assert_same(one: list[TokenLogprob], other: list[TokenLogprob]) -> None:
    """The same tokens with the same probabilities. Sums are made in another order in a batch, so where two
    tokens are equally likely to within rounding, and only there, the choice may differ."""
    assert len(one) >= 10
    for a, b in zip(one, other, strict=False):
        if a.bytes != b.bytes:
            assert a.top[0].logprob - a.top[1].logprob < 0.02
            return
        assert abs(a.logprob - b.logprob) < 0.02
    assert len(one) == len(other)


def test_a_prompt_longer_than_a_batch_reads_like_any_other(tiny: Path) -> None:
    prompt = "the weather in the north is cold and " * 8
    with LlamaEngine.open(tiny, LoadOptions(sequences=2, threads=1)) as whole:
        expected = _tokens(whole, prompt=prompt)
    with LlamaEngine.open(tiny, LoadOptions(sequences=2, threads=1, batch_tokens=16)) as pieces:
        _assert_same(_tokens(pieces, prompt=prompt), expected)


def test_seeds(engine: LlamaEngine) -> None:
    first, second = (_run(engine, prompt="x", temperature=1.0, seed=7, max_tokens=30)[0] for _ in range(2))
    assert first == second
    others = {_run(engine, prompt="x", temperature=1.0, seed=seed, max_tokens=30)[0] for seed in (1, 2, -3, 2**40)}
    assert len(others) == 4
    free = {_run(engine, prompt="x", temperature=1.0, max_tokens=30)[0] for _ in range(3)}
    assert len(free) == 3


def test_sampling_parameters_narrow_the_choice(engine: LlamaEngine) -> None:
    greedy = _run(engine, prompt="x", max_tokens=30)[0]
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.001}):
        assert _run(engine, prompt="x", max_tokens=30, **{"temperature": 1.0, "seed": 5, **narrow})[0] == greedy
    events = _run(engine, prompt="x", max_tokens=60, logprobs=0, frequency_penalty=2.0, presence_penalty=2.0)[2]
    tokens = [each.logprobs[0].bytes for each in events if isinstance(each, Chunk) and each.logprobs]
    plain = _run(engine, prompt="x", max_tokens=60, logprobs=0)[2]
    repeated = [each.logprobs[0].bytes for each in plain if isinstance(each, Chunk) and each.logprobs]
    assert len(set(tokens)) > len(set(repeated))


def test_logprobs_are_a_distribution(engine: LlamaEngine) -> None:
    events = _run(engine, prompt="once", max_tokens=12, logprobs=20)[2]
    entries = [entry for each in events if isinstance(each, Chunk) for entry in each.logprobs]
    assert len(entries) == 12
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top) == 20
        assert entry.top[0].logprob == entry.logprob  # greedy
        assert [each.logprob for each in entry.top] == sorted((each.logprob for each in entry.top), reverse=True)
        assert 0 < sum(math.exp(each.logprob) for each in entry.top) <= 1 + 1e-6
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_all_probabilities_sum_to_one(engine: LlamaEngine) -> None:
    import numpy as np

    from ai_assistant.engines.sampling import logprobs_of

    logits = np.random.default_rng(1).normal(0, 5, 512).astype(np.float32)
    found = [logprobs_of(logits, token, 0, lambda _token: b"").logprob for token in range(512)]
    assert abs(sum(map(math.exp, found)) - 1) < 1e-5
    logits[3] = -np.inf
    masked: TokenLogprob = logprobs_of(logits, 3, 0, lambda _token: b"")
    assert masked.logprob == -9999.0


def test_stop_strings_end_the_answer_before_they_show(engine: LlamaEngine) -> None:
    whole = _run(engine, prompt="stories", max_tokens=60)[0]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    text, last, events = _run(engine, prompt="stories", max_tokens=60, stop=(middle,))
    assert text == whole[: whole.index(middle)]
    assert last.reason is FinishReason.STOP
    assert all(middle not in each.text for each in events if isinstance(each, Chunk))
    assert last.usage.completion_tokens < 60


@pytest.mark.usefixtures("unread_stops")
def test_cancelling_frees_the_slot_within_a_step(engine: LlamaEngine) -> None:
    long = [engine.generate(_endless(f"run {n}")) for n in range(3)]
    for each in long:
        next(each)
    start = time.monotonic()
    for each in long:
        each.cancel()
    for each in long:
        with pytest.raises(Cancelled):
            list(each)
    _run(engine, prompt="next", max_tokens=1)
    assert time.monotonic() - start < 2
    assert list(long[0]) == []  # A finished iterator stays finished.


@pytest.mark.usefixtures("unread_stops")
def test_a_dropped_generation_is_cancelled(engine: LlamaEngine) -> None:
    generation = engine.generate(_endless("forgotten"))
    next(generation)
    assert engine._scheduler.running == 1
    del generation
    gc.collect()
    deadline = time.monotonic() + 5
    while engine._scheduler.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine._scheduler.running == 0


@pytest.mark.usefixtures("unread_stops")
def test_more_than_the_queue_holds_is_busy(engine: LlamaEngine) -> None:
    accepted: list[LlamaGeneration] = []

    def flood() -> None:
        for n in range(50):
            accepted.append(engine.generate(_endless(f"load {n}")))

    with pytest.raises(Busy):
        flood()
    assert len(accepted) == 3 + 4
    for each in accepted:
        each.cancel()
    for each in accepted:
        with pytest.raises(Cancelled):
            list(each)
    assert _run(engine, prompt="afterwards", max_tokens=3)[1].usage.completion_tokens == 3


def test_those_who_wait_are_served_in_turn(engine: LlamaEngine) -> None:
    waiting = [engine.generate(GenerateRequest(prompt=f"w {n}", temperature=0.0, max_tokens=40)) for n in range(6)]
    ends = [list(each)[-1] for each in waiting]
    assert all(isinstance(each, Finished) and each.usage.completion_tokens == 40 for each in ends)
    last = ends[-1]
    assert isinstance(last, Finished)
    assert last.usage.queue_s > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "word " * 2000},
        {"prompt": "x" * 3_000_000},
        {"prompt": "short", "max_tokens": 512},
        {"messages": ({"role": "user", "content": "word " * 2000},)},
    ],
)
def test_overflow_names_the_numbers(engine: LlamaEngine, fields: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises(ContextOverflow) as caught:
        engine.generate(GenerateRequest(**fields))
    assert "512" in caught.value.message
    assert caught.value.hint
    assert time.monotonic() - start < 2


def test_an_answer_may_fill_the_context_exactly(engine: LlamaEngine) -> None:
    prompt = engine.tokenize("fill it")
    # Random weights may say that they are done, so what counts is that nothing beyond the context happens.
    _, last, _ = _run(engine, prompt="fill it", max_tokens=None)
    assert last.usage.prompt_tokens == len(prompt)
    assert last.usage.prompt_tokens + last.usage.completion_tokens <= 512
    if last.reason is FinishReason.LENGTH:
        assert last.usage.prompt_tokens + last.usage.completion_tokens == 512


def test_a_shared_prefix_is_read_once(engine: LlamaEngine, tiny: Path) -> None:
    head = "the same long beginning of a conversation " * 3
    _run(engine, prompt=head + "one", max_tokens=2)
    _, last, _ = _run(engine, prompt=head + "two", max_tokens=20)
    assert last.usage.cached_tokens >= len(engine.tokenize(head)) - 2
    assert last.usage.cached_tokens < last.usage.prompt_tokens
    with LlamaEngine.open(tiny, LoadOptions(sequences=1, threads=1)) as fresh:
        _assert_same(_tokens(engine, prompt=head + "two"), _tokens(fresh, prompt=head + "two"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_always_met(engine: LlamaEngine, temperature: float) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green", "蓝"]},
            "count": {"type": "integer", "minimum": 3, "maximum": 120},
            "note": {"type": "string", "maxLength": 12},
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["colour", "count", "note", "list"],
    }
    for seed in range(8):
        text, last, _ = _run(
            engine, prompt=f"json {seed}", response_schema=schema, max_tokens=300, temperature=temperature, seed=seed
        )
        assert last.reason is FinishReason.STOP
        value = json.loads(text)
        assert list(value) == ["colour", "count", "note", "list"]
        assert value["colour"] in ("red", "green", "蓝")
        assert 3 <= value["count"] <= 120
        # Random weights also write bytes that are no UTF-8, which the library counts otherwise than Python.
        assert len(value["note"]) <= 12 or "\ufffd" in value["note"]
        assert 1 <= len(value["list"]) <= 3


def test_a_constrained_answer_never_begins_half_of_a_surrogate_pair(engine: LlamaEngine) -> None:
    # Token n of the fixture is byte n. Nothing could follow ED A2; other bytes may follow ED.
    text, last, _ = _run(
        engine,
        prompt="x",
        max_tokens=40,
        temperature=1.0,
        seed=1,
        response_schema={"type": "string", "minLength": 9},
        logit_bias={"237": 100.0, "162": 100.0},
    )
    assert last.reason == "length"
    assert "\ud000" <= text[1] < "\ud800"


def test_a_grammar_is_met_even_without_an_end_token(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.token_type": [1] * 512}
    tokens, _merges, _kinds = gguf_writer.byte_level_tokens(512, ("<a>", "<b>", "<c>"))
    path = gguf_writer.write_llama(tmp_path / "m.gguf", metadata={**keys, "tokenizer.ggml.tokens": tokens})
    with LlamaEngine.open(path, LoadOptions(sequences=1, threads=1)) as engine:
        text, last, _ = _run(engine, prompt="x", response_schema={"type": "object", "properties": {"a": {"const": 1}},
                                                                  "required": ["a"]}, max_tokens=100)  # fmt: skip
        assert json.loads(text) == {"a": 1}
        assert last.reason is FinishReason.STOP


@pytest.mark.parametrize("choice", ["required", "set_profile", "status"])
def test_a_forced_tool_is_called_silently_but_with_logprobs(engine: LlamaEngine, choice: str) -> None:
    for seed in range(4):
        text, last, events = _run(
            engine, messages=({"role": "user", "content": "go"},), tools=_TOOLS, tool_choice=choice, logprobs=2,
            temperature=1.0, seed=seed, max_tokens=None, parallel_tool_calls=False,
        )  # fmt: skip
        assert text == ""
        assert last.reason is FinishReason.TOOL_CALLS
        (call,) = last.tool_calls
        assert call.name in (("set_profile", "status") if choice == "required" else (choice,))
        arguments = json.loads(call.arguments)
        if call.name == "set_profile":
            assert arguments["profile"] in ("eco", "fast")
            assert 1 <= arguments["hours"] <= 24
        else:
            assert arguments == {}
        entries = [entry for each in events if isinstance(each, Chunk) for entry in each.logprobs]
        assert len(entries) == last.usage.completion_tokens
        assert json.loads(b"".join(bytes(each.bytes) for each in entries))["name"] == call.name


def test_tools_that_may_be_called_do_not_disturb_text(engine: LlamaEngine) -> None:
    text, last, _ = _run(engine, messages=({"role": "user", "content": "go"},), tools=_TOOLS)
    assert last.reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert text
    assert last.tool_calls == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "x", "response_schema": {"type": "potato"}},
        {"prompt": "x", "tool_choice": "a",
         "tools": ({"type": "function", "function": {"name": "a", "parameters": {"not": {}}}},)},
        {"messages": ({"role": "user", "content": [{"type": "image_url"}]},)},
        {"messages": ({"role": "user", "content": "x"},), "tools": _TOOLS, "tool_choice": "nobody"},
    ],
)  # fmt: skip
def test_wrong_requests_fail_before_anything_is_queued(engine: LlamaEngine, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        engine.generate(GenerateRequest(**fields))
    assert engine._scheduler.running == 0


def test_odd_text_is_read_like_any_other(engine: LlamaEngine) -> None:
    for prompt in ("\x00", "\ud800", "🙂" * 50, "\n" * 100, "<|im_end|>", "\u202e"):
        assert _run(engine, prompt=prompt, max_tokens=2)[1].usage.prompt_tokens > 0


def test_embeddings(engine: LlamaEngine) -> None:
    texts = ["one", "another text", "one", "a much longer text " * 10] + [f"text {n}" for n in range(40)]
    vectors, tokens = engine.embed(texts)
    assert len(vectors) == len(texts)
    assert tokens == sum(len(engine.tokenize(each)) for each in texts)
    assert all(abs(sum(x * x for x in each) - 1) < 1e-4 for each in vectors)
    assert max(abs(a - b) for a, b in zip(vectors[0], vectors[2], strict=True)) < 1e-4
    alone = engine.embed(["another text"])[0][0]
    assert sum(a * b for a, b in zip(alone, vectors[1], strict=True)) > 0.999
    assert sum(a * b for a, b in zip(vectors[0], vectors[1], strict=True)) < 0.999
    with pytest.raises(InvalidArgument):
        engine.embed([])
    with pytest.raises(InvalidArgument):
        engine.embed(["ok", ""])
    with pytest.raises(ContextOverflow):
        engine.embed(["word " * 2000])


def test_embeddings_can_be_cancelled_anywhere(engine: LlamaEngine) -> None:
    texts = [f"text {n}" for n in range(64)]
    for allowed in (0, 5, 64, 66):
        asked = 0

        def cancelled(allowed: int = allowed) -> bool:
            nonlocal asked
            asked += 1
            return asked > allowed

        before = engine.steps
        with pytest.raises(Cancelled):
            engine.embed(texts, cancelled)
        # 64 texts are tokenised first, and then there is a batch after each question but the first.
        assert engine.steps - before == max(0, allowed - 65)
    assert len(engine.embed(texts, lambda: False)[0]) == 64


def test_steps_grow_with_the_work(engine: LlamaEngine) -> None:
    before = engine.steps
    usage = _run(engine, prompt="x", max_tokens=5, temperature=1.0, seed=3)[1].usage
    assert engine.steps - before >= usage.completion_tokens > 0
    assert not engine.broken


def test_a_scheduler_that_broke_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LlamaEngine.open(tiny, LoadOptions(sequences=1, threads=1)) as broken:

        def fail(_started: float) -> None:
            raise RuntimeError("native nonsense")

        monkeypatch.setattr(broken._scheduler, "_decode", fail)
        for _ in range(2):
            with pytest.raises(InternalError, match="native nonsense"):
                _run(broken, prompt="x", max_tokens=1)
        assert broken.broken
    assert not broken.broken


@pytest.mark.usefixtures("unread_stops")
def test_a_slow_reader_pauses_only_itself(engine: LlamaEngine) -> None:
    slow = engine.generate(_endless("slow"))
    time.sleep(0.3)
    assert slow._task.events.qsize() <= 9
    assert _run(engine, prompt="quick", max_tokens=20)[1].usage.completion_tokens > 0
    end = list(slow)[-1]
    assert isinstance(end, Finished)


def test_load_options_and_limits(tiny: Path) -> None:
    with pytest.raises(OutOfMemory) as caught:
        LlamaEngine.open(tiny, LoadOptions(memory_limit_bytes=1 << 20))
    assert "MiB" in caught.value.message
    for wrong in (LoadOptions(sequences=0), LoadOptions(threads=-1), LoadOptions(context_length=1 << 40)):
        with pytest.raises(InvalidArgument):
            LlamaEngine.open(tiny, wrong)


def test_loading_from_a_descriptor_leaves_it_alone(tiny: Path) -> None:
    steps: list[float] = []
    with tiny.open("rb") as file:
        file.seek(100)
        engine = open_model(file.fileno(), LoadOptions(sequences=1, threads=1), steps.append)
        assert not file.closed
        assert os.fstat(file.fileno()).st_size == tiny.stat().st_size
    assert steps[-1] == 1.0
    assert steps == sorted(steps)
    assert engine.tokenize("x")
    engine.close()
    engine.close()
    with pytest.raises(InvalidArgument, match="closed"):
        engine.tokenize("x")


def test_a_missing_tensor_is_the_librarys_own_reason(tmp_path: Path, tiny: Path) -> None:
    raw = tiny.read_bytes()
    at = raw.index(b"blk.1.ffn_up.weight")
    path = tmp_path / "renamed.gguf"
    path.write_bytes(raw[:at] + b"blk.1.ffn_UP.weight" + raw[at + 19 :])
    with pytest.raises(InvalidModel, match="ffn_up"):
        open_model(path)


def test_weights_that_are_not_numbers_end_the_request_only(tmp_path: Path, tiny: Path) -> None:
    raw = bytearray(tiny.read_bytes())
    header = read_gguf(tiny)
    tensor = header.tensors["output_norm.weight"]
    at = header.data_offset + tensor.offset
    raw[at : at + tensor.size_bytes] = b"\xff" * tensor.size_bytes
    path = tmp_path / "nan.gguf"
    path.write_bytes(raw)
    with LlamaEngine.open(path, LoadOptions(sequences=1, threads=1)) as engine:
        for temperature in (0.0, 1.0):
            with pytest.raises(InvalidModel, match="damaged"):
                _run(engine, prompt="x", temperature=temperature)


_MUTANT = """
import random, sys
from ai_assistant.engines import open_model
from ai_assistant.engines.contract import GenerateRequest, LoadOptions
from ai_assistant.errors import AIAssistantError
try:
    engine = open_model(sys.argv[1], LoadOptions(sequences=2, threads=1))
    for temperature in (0.0, 1.0):
        list(engine.generate(GenerateRequest(prompt="hello", max_tokens=20, temperature=temperature)))
    print("ok")
except AIAssistantError as error:
    print(error.name)
"""


def test_mutated_models_are_survived(tmp_path: Path, tiny: Path) -> None:
    """Header and weights with flipped bits, each in a process of its own: an answer or a named error."""
    raw = tiny.read_bytes()
    header = read_gguf(tiny).data_offset
    rng = random.Random(4)
    outcomes: list[str] = []
    for number in range(16):
        mutant = bytearray(raw)
        for _ in range(rng.choice((1, 3, 30))):
            at = rng.randrange(header) if number % 2 else rng.randrange(header, len(mutant))
            mutant[at] ^= 1 << rng.randrange(8)
        path = tmp_path / "mutant.gguf"
        path.write_bytes(mutant)
        done = subprocess.run(
            [sys.executable, "-c", _MUTANT, path], capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        )  # fmt: skip
        outcomes.append(done.stdout.strip() or f"died {done.returncode}: {done.stderr[-300:]}")
    assert not [each for each in outcomes if each.startswith(("died", "InternalError"))], outcomes


def test_nothing_leaks_over_many_requests(engine: LlamaEngine) -> None:
    def usage() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), pages * 4096

    def requests(count: int) -> None:
        for n in range(count):
            fields: dict[str, Any] = {"prompt": f"request {n}", "max_tokens": 6}
            if n % 5 == 0:
                fields["response_schema"] = {"type": "object", "properties": {"a": {"enum": ["x"]}}}
            if n % 7 == 0:
                fields |= {"temperature": 1.0, "logprobs": 3}
            _run(engine, **fields)
            if n % 10 == 0:
                with pytest.raises(AIAssistantError):
                    engine.generate(GenerateRequest(prompt="word " * 999))
                engine.generate(GenerateRequest(prompt="dropped", max_tokens=400)).cancel()

    requests(40)
    gc.collect()
    fds, memory = usage()
    requests(200)
    gc.collect()
    fds_after, memory_after = usage()
    assert fds_after == fds
    assert memory_after - memory < 4 << 20


@pytest.mark.usefixtures("unread_stops")
def test_closing_ends_what_runs(tiny: Path) -> None:
    engine = LlamaEngine.open(tiny, LoadOptions(sequences=1, threads=1))
    running, waiting = engine.generate(_endless("run")), engine.generate(_endless("wait"))
    next(running)
    engine.close()
    for each in (running, waiting):
        with pytest.raises(Cancelled):
            list(each)


def test_without_the_library_the_error_says_what_to_install(tiny: Path) -> None:
    program = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from ai_assistant.engines import open_model\nfrom ai_assistant.errors import NotSupported\n"
        "try: open_model(sys.argv[1])\nexcept NotSupported as error: print(error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tiny], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )  # fmt: skip
    assert "ai-assistant[local]" in done.stdout, done.stderr
