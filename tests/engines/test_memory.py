"""The estimate against what real workers take, for models of random weights and many shapes."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ai_assistant.daemon.worker.protocol import WorkerClient
from ai_assistant.engines import gguf_rules, memory
from ai_assistant.engines.contract import GenerateRequest, LoadOptions
from ai_assistant.engines.ggml_types import GGML_TYPES
from ai_assistant.engines.gguf import Gguf, Tensor, read_gguf
from ai_assistant.engines.llama import LlamaEngine
from ai_assistant.engines.repack import repacked_bytes
from ai_assistant.errors import OutOfMemory
from tests.support import gguf_writer

_SLACK_BYTES = 16 << 20
_LARGE = Path.home() / ".cache/ai-assistant/bench/half-billion-v1.gguf"
_AVX2, _ARM = frozenset({"avx2"}), frozenset({"asimd", "asimddp"})


def _tensor(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    found = next(each for each in GGML_TYPES.values() if each.name == kind)
    elements = 1
    for each in shape:
        elements *= each
    return Tensor(name, shape, found, 0, elements, 1000)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "features", "copies"),
    [
        ("blk.0.ffn_up.weight", (64, 64), "Q4_0", _AVX2, 1), ("blk.0.ffn_up.weight", (64, 60), "Q4_0", _AVX2, 0),
        ("blk.0.ffn_up.weight", (64, 64), "Q8_0", _AVX2, 0), ("blk.0.ffn_up.weight", (64, 60), "Q8_0", _ARM, 1),
        ("blk.0.ffn_up.weight", (64, 64), "Q4_0", frozenset(), 0), ("blk.0.attn_norm.weight", (64,), "F32", _AVX2, 0),
        ("blk.0.ffn_up_exps.weight", (64, 64, 8), "Q4_K", _AVX2, 1), ("token_embd.weight", (64, 64), "Q4_0", _AVX2, 1),
    ],
)  # fmt: skip
def test_what_is_repacked(name: str, shape: tuple[int, ...], kind: str, features: frozenset[str], copies: int) -> None:
    assert repacked_bytes([_tensor(name, shape, kind)], features) == 1000 * copies


def test_an_embedding_is_copied_only_where_it_is_the_output() -> None:
    embedding, output = _tensor("token_embd.weight", (64, 64), "Q4_0"), _tensor("output.weight", (64, 64), "Q4_0")
    assert repacked_bytes([embedding, output], _AVX2) == 1000


def _header(path: Path) -> Gguf:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_gguf(fd)
    finally:
        os.close(fd)


def test_the_parts_follow_the_options(tmp_path: Path) -> None:
    shape = gguf_rules.memory_shape(_header(gguf_writer.write_llama(tmp_path / "m.gguf", context=4096, kind="Q4_0")))
    one = memory.estimate(shape, LoadOptions(context_length=1024, sequences=1))
    # 2 layers of 2 heads of 64 elements, keys and values, 2 bytes each.
    assert one.kv_bytes == 1024 * 2 * 2 * 2 * 64 * 2
    assert memory.estimate(shape, LoadOptions(context_length=1024, sequences=3)).kv_bytes == 3 * one.kv_bytes
    small = memory.estimate(shape, LoadOptions(context_length=1024, sequences=1, kv_type="q4_0"))
    assert small.kv_bytes * 32 * 2 == one.kv_bytes * 18
    assert memory.estimate(shape, LoadOptions(repack=False)).repacked_bytes == 0
    assert one.total_bytes == sum(value for key, value in one.to_dict().items() if key != "total_bytes")
    # The context is rounded up to 256 cells.
    assert memory.estimate(shape, LoadOptions(context_length=1000, sequences=1)).kv_bytes == one.kv_bytes


def test_guesses_have_rows_of_logits(tmp_path: Path) -> None:
    shape = gguf_rules.memory_shape(_header(gguf_writer.write_llama(tmp_path / "m.gguf", vocabulary=1000)))
    for sequences in (1, 3, 9):
        plain, guessed = (
            memory.estimate(shape, LoadOptions(context_length=512, sequences=sequences, speculative=each)).compute_bytes
            for each in ("off", "auto")
        )
        # A row in the graph and one in the output buffer, 4 bytes each.
        assert guessed - plain == memory.outputs_ahead(1000, sequences) * 1000 * 8 > 0
    recurrent = replace(shape, state_bytes=1)
    without, with_guesses = (memory.estimate(recurrent, LoadOptions(speculative=each)) for each in ("off", "auto"))
    assert without == with_guesses
    assert memory.estimate(replace(shape, vocabulary=0), LoadOptions()).total_bytes > 0


def test_a_draft_model_counts_where_it_is_used(tmp_path: Path) -> None:
    large = gguf_rules.memory_shape(_header(gguf_writer.write_llama(tmp_path / "m.gguf", layers=4, context=4096)))
    small = gguf_rules.memory_shape(_header(gguf_writer.write_llama(tmp_path / "d.gguf", layers=1, context=1024)))
    options = LoadOptions(context_length=2048, sequences=3, kv_type="q4_0")
    alone, both = memory.estimate(large, options), memory.estimate(large, options, small)
    assert both.weights_bytes == alone.weights_bytes + small.weights_bytes
    # As long as the model's own cache, in 16 bits: one layer of 2 heads of 64 elements, keys and values.
    assert both.kv_bytes == alone.kv_bytes + 3 * 2048 * 2 * 2 * 64 * 2
    assert both.compute_bytes > alone.compute_bytes
    # One process, two vocabularies.
    assert 0 < both.runtime_bytes - alone.runtime_bytes < memory.PROCESS_BYTES
    for mode in ("off", "lookup"):
        quiet = replace(options, speculative=mode)
        assert memory.estimate(large, quiet, small) == memory.estimate(large, quiet)


@pytest.mark.engine
def test_a_load_is_refused_for_its_draft_model(tmp_path: Path) -> None:
    path, draft = (gguf_writer.write_llama(tmp_path / each, context=1024) for each in ("m.gguf", "d.gguf"))
    needed = memory.estimate(gguf_rules.memory_shape(_header(path)), LoadOptions(sequences=1)).total_bytes
    limited = LoadOptions(sequences=1, memory_limit_bytes=needed)
    with draft.open("rb") as file:
        with pytest.raises(OutOfMemory, match="limit"):
            LlamaEngine.open(path, limited, files={"draft": file.fileno()})
        with LlamaEngine.open(path, replace(limited, speculative="lookup"), files={"draft": file.fileno()}) as engine:
            assert engine.context_length == 1024


@pytest.mark.engine
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, LoadOptions(sequences=2, threads=1)),
        ({"kind": "Q4_0", "context": 4096, "hidden": 2048}, LoadOptions(sequences=4, threads=2)),
        ({"kind": "Q4_0", "context": 4096, "hidden": 2048}, LoadOptions(sequences=4, threads=2, kv_type="q8_0")),
        ({"kind": "Q8_0", "vocabulary": 32_768, "context": 1024}, LoadOptions(sequences=1, threads=2)),
        (
            {"kind": "Q4_0", "width": 1024, "heads": 16, "kv_heads": 8, "hidden": 4096, "layers": 4, "context": 2048},
            LoadOptions(sequences=2, threads=2, batch_tokens=128),
        ),
    ],
)
async def test_the_estimate_is_what_a_worker_takes(tmp_path: Path, model: dict[str, int], options: LoadOptions) -> None:
    await _compare(gguf_writer.write_llama(tmp_path / "m.gguf", **model), options)  # type: ignore[arg-type]


@pytest.mark.engine
async def test_half_a_billion_weights() -> None:
    if not _LARGE.exists():
        pytest.skip("bench/serving.py has not made its model here")
    await _compare(_LARGE, LoadOptions(sequences=1, threads=2, context_length=256))


async def _compare(path: Path, options: LoadOptions) -> None:
    header = _header(path)
    shape = gguf_rules.memory_shape(header)
    expected = memory.estimate(shape, options).total_bytes
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(  # noqa: ASYNC220 - starting takes no time
        [sys.executable, "-m", "ai_assistant.daemon.worker", "--fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )
    theirs.close()
    client = WorkerClient(ours)
    try:
        with path.open("rb") as file:
            await client.load(file.fileno(), options)
        context = memory.settle(shape, options).context_length
        each = "word " * ((context - 16) * 50 // len(await client.tokenize("word " * 50)) - 1)
        requests = [
            GenerateRequest(prompt=f"{number} {each}", max_tokens=2, ignore_eos=True)
            for number in range(options.sequences)
        ]
        await asyncio.gather(*(_read(client, request) for request in requests))
        measured = _resident(process.pid, path, header.weight_bytes)
    finally:
        await client.close()
        await asyncio.to_thread(process.wait, 20)
    assert abs(expected - measured) <= max(_SLACK_BYTES, measured // 20), (expected, measured)


async def _read(client: WorkerClient, request: GenerateRequest) -> None:
    async for _ in client.generate(request):
        pass


def _resident(pid: int, model: Path, weights: int) -> int:
    """Bytes of the process, with its share of common pages, and the weights whole."""
    inode, total, ours, found = str(model.stat().st_ino), 0, False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            ours = len(fields) > 4 and fields[4] == inode
        elif fields[0] == "Pss:":
            total += int(fields[1]) * 1024
            found += int(fields[1]) * 1024 if ours else 0
    assert found, "the weights are not mapped"
    return total - found + weights
