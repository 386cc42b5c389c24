"""The GGUF reader against good, broken and hostile headers."""

from __future__ import annotations

import os
import random
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.gguf import Gguf, read_gguf
from ai_assistant.engines.gguf_rules import (
    DECODERS,
    ENCODERS,
    RECURRENT,
    check,
    context_of,
    estimate_memory_bytes,
    kv_bytes,
)
from ai_assistant.errors import InvalidModel
from tests.support import gguf_writer as writer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writer.write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", width=64, hidden=128, kind="Q8_0")


def _write(path: Path, metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    """A small file with some keys replaced; None removes one."""
    keys = {**writer.llama_metadata(width=64, hidden=128), **(metadata or {})}
    tensors = options.pop("tensors", writer.llama_tensors(width=64, hidden=128))
    head = writer.header({k: v for k, v in keys.items() if v is not None}, tensors, **options)
    size = sum(-(-writer.tensor_bytes(shape, kind) // 32) * 32 for _, shape, kind in tensors)
    path.write_bytes(head)
    os.truncate(path, len(head) + size)
    return path


def _reason(path: Path) -> str:
    with pytest.raises(InvalidModel) as caught:
        check(read_gguf(path))
    return caught.value.message


def test_an_architecture_writes_text_or_makes_vectors() -> None:
    assert not ENCODERS & DECODERS
    assert RECURRENT < DECODERS


def test_a_good_file_is_described(model: Path) -> None:
    header = read_gguf(model)
    info = check(header)
    assert (info.format, info.architecture, info.context_length) == ("gguf", "llama", 512)
    assert info.quantization == "Q8_0"
    assert info.has_chat_template
    assert info.size_bytes == model.stat().st_size
    assert info.parameters == 512 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert header.chat_template == writer.CHATML
    assert header.special_tokens[511] == "<|im_end|>"


def test_the_descriptor_is_neither_moved_nor_closed(model: Path) -> None:
    with model.open("rb") as file:
        file.seek(7)
        read_gguf(file.fileno())
        assert file.tell() == 7


def test_memory_estimate_grows_with_context_and_sequences(model: Path) -> None:
    header = read_gguf(model)
    one = kv_bytes(header, LoadOptions(context_length=512, sequences=1))
    # Two layers, two key-value heads of 16, keys and values, 16 bit.
    assert one == 2 * 2 * (16 + 16) * 2 * 512
    assert kv_bytes(header, LoadOptions(context_length=512, sequences=4)) == 4 * one
    small = estimate_memory_bytes(header, LoadOptions(context_length=256, sequences=1))
    assert header.weight_bytes < small < estimate_memory_bytes(header, LoadOptions(context_length=512))


def test_default_context_is_bounded_by_what_its_cache_takes(tmp_path: Path) -> None:
    keys = {"llama.context_length": 131_072, "llama.block_count": 40}
    header = read_gguf(_write(tmp_path / "x", {**keys, "llama.attention.key_length": 512,
                                              "llama.attention.value_length": 512}))  # fmt: skip
    assert context_of(header, LoadOptions()) < 8192
    assert kv_bytes(header, LoadOptions(context_length=context_of(header, LoadOptions()))) <= 1 << 30
    assert context_of(header, LoadOptions(context_length=20_000)) == 20_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GG", "truncated"),
        (b"GGUF" + bytes(10), "truncated"),
        (b"NOPE" + bytes(100), "not GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 1, 1) + bytes(100), "version is 1"),
        (b"GGUF" + struct.pack("<IQQ", 4, 1, 1) + bytes(100), "version is 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1) + bytes(100), "absurd"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**64 - 1) + bytes(100), "absurd"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(100), "no tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 2**40) + bytes(100), "bytes long"),
    ],
)
def test_broken_beginnings(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model"
    path.write_bytes(content)
    assert reason in _reason(path)


def test_unreadable_things(tmp_path: Path) -> None:
    assert "cannot be opened" in _reason(tmp_path / "missing")
    assert "regular file" in _reason(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "regular file" in _reason(tmp_path / "fifo")
    with pytest.raises(InvalidModel, match="cannot be opened"):
        read_gguf(9999)
    write_only = os.open(_write(tmp_path / "w"), os.O_WRONLY)
    with pytest.raises(InvalidModel, match="cannot be read"):
        read_gguf(write_only)
    os.close(write_only)


@pytest.mark.parametrize("count", [0, 1_000_000_000, 2**62])
def test_a_sparse_file_of_100_gb_is_refused_at_once(tmp_path: Path, count: int) -> None:
    """Zeroes are cheap to write and expensive to read: bounded time and memory whatever the header claims."""
    path = tmp_path / "sparse"
    array = struct.pack("<IIQ", 9, 8, count) if count else b""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1000, 1000) + writer.string("a") + array)
    os.truncate(path, 100 * 10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    _reason(path)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"general.architecture": None}, "what architecture"),
        ({"general.architecture": "clip"}, "'clip' are not supported"),
        ({"general.architecture": writer.Typed(writer.U32, 5)}, "not supported"),
        ({"general.type": "adapter"}, "not a whole model"),
        ({"split.count": 3}, "split model"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.block_count": 513}, "block_count is 513"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.block_count": "2"}, "not a number"),
        ({"llama.context_length": 0}, "context_length is 0"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 3}, "no multiple"),
        ({"llama.attention.head_count": [4, 4, 4]}, "one value for each"),
        ({"llama.attention.head_count_kv": 3}, "no multiple"),
        ({"llama.attention.head_count": 64, "llama.attention.head_count_kv": 64}, "positive even"),
        ({"llama.rope.dimension_count": 64}, "more dimensions are rotated"),
        ({"llama.rope.dimension_count": 7}, "odd"),
        ({"llama.rope.scaling.type": "nonsense"}, "rope scaling"),
        ({"llama.expert_count": 4}, "experts"),
        ({"llama.expert_used_count": 4}, "experts"),
        ({"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_group_count": 3}, "groups"),
        ({"tokenizer.ggml.model": None}, "no tokenizer"),
        ({"tokenizer.ggml.model": "no_vocab"}, "not supported"),
        ({"tokenizer.ggml.tokens": None}, "list of tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 512}, "same token twice"),
        ({"tokenizer.ggml.tokens": [str(n) for n in range(600)]}, "do not match"),
        ({"tokenizer.ggml.token_type": [1]}, "do not match"),
        ({"tokenizer.ggml.eos_token_id": 512}, "512 tokens"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "not a number"),
        ({"general.alignment": 24}, "power of two"),
        ({"general.alignment": 0}, "power of two"),
        ({"general.alignment": "32"}, "power of two"),
        ({"x": writer.Typed(99, [1])}, "elements of type"),
    ],
)
def test_what_the_engine_would_abort_on(tmp_path: Path, keys: dict[str, Any], reason: str) -> None:
    writer._FORMATS.setdefault(99, "I")
    assert reason in _reason(_write(tmp_path / "model", keys))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (("a", (0,), "F32"), "absurd shape"),
        (("a", (2**40, 2**40), "F32"), "absurd shape"),
        (("a", (2**62,), "F32"), "truncated"),
        (("a", (33,), "Q8_0"), "no multiple of 32"),
        (("a", (1, 1, 1, 1, 1), "F32"), "5 dimensions"),
        (("a" * 64, (1,), "F32"), "64 bytes long"),
        (("output_norm.weight", (64,), "F32"), "there twice"),
    ],
)
def test_bad_tensors(tmp_path: Path, tensor: tuple[str, tuple[int, ...], str], reason: str) -> None:
    keys = writer.llama_metadata(width=64, hidden=128)
    head = writer.header(keys, [*writer.llama_tensors(width=64, hidden=128), tensor])
    path = tmp_path / "model"
    path.write_bytes(head + bytes(1 << 20))
    assert reason in _reason(path)


def test_a_token_embedding_of_another_size(tmp_path: Path) -> None:
    tensors = writer.llama_tensors(width=64, hidden=128, vocabulary=500)
    assert "token embedding" in _reason(_write(tmp_path / "model", tensors=tensors))


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, model: Path) -> None:
    whole = model.read_bytes()
    rng = random.Random(7)
    ends = [*range(0, 64), *(rng.randrange(len(whole)) for _ in range(200)), len(whole) - 1]
    path = tmp_path / "cut"
    for end in ends:
        path.write_bytes(whole[:end])
        _reason(path)


def test_thousands_of_mutated_headers_are_judged_quickly(tmp_path: Path, model: Path) -> None:
    """Bit flips, overwritten numbers, cuts: each gives InvalidModel or a description, nothing else, and soon."""
    whole = bytearray(model.read_bytes())
    header_bytes = read_gguf(model).data_offset
    rng = random.Random(20)
    path = tmp_path / "mutant"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    accepted = refused = 0
    start = time.monotonic()
    try:
        for _ in range(3000):
            mutant = bytearray(whole[:header_bytes])
            for _ in range(rng.choice((1, 1, 2, 5))):
                at = rng.randrange(header_bytes - 8)
                kind = rng.random()
                if kind < 0.5:
                    mutant[at] ^= 1 << rng.randrange(8)
                elif kind < 0.8:
                    mutant[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)))
                else:
                    mutant[at] = rng.randrange(256)
            os.pwrite(fd, mutant, 0)
            os.ftruncate(fd, len(whole) if rng.random() < 0.9 else rng.randrange(len(whole)))
            try:
                found = read_gguf(fd)
                assert isinstance(found, Gguf)
                check(found)
                estimate_memory_bytes(found, LoadOptions())
                accepted += 1
            except InvalidModel:
                refused += 1
    finally:
        os.close(fd)
    assert accepted > 100  # A flipped bit in a merge or a name is no reason to refuse.
    assert refused > 500
    assert (time.monotonic() - start) / 3000 < 0.05
