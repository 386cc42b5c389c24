"""Writes GGUF files for tests and benches: any header, and whole Llama-shaped models of random weights.

Standard library only. A 0.5 B model takes a few seconds, since large tensors repeat one random block.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

ALIGNMENT = 32
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
GGML = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34)}
"""Name → number, elements per block, bytes per block."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Typed:
    """A metadata value with its GGUF type; for arrays the type of the elements."""

    type: int
    value: Any


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """A value with its type in front. int → u32, float → f32, str, bool, list → array, or a `Typed`."""
    kind = item.type if isinstance(item, Typed) else None
    item = item.value if isinstance(item, Typed) else item
    if isinstance(item, str | bytes):
        return struct.pack("<I", STRING) + string(item)
    if isinstance(item, Sequence):
        return struct.pack("<I", ARRAY) + _array(item, kind)
    if kind is None:
        kind = BOOL if isinstance(item, bool) else U32 if isinstance(item, int) else F32
    return struct.pack("<I" + _FORMATS[kind], kind, item)


def _array(items: Sequence[Any], kind: int | None) -> bytes:
    if kind is None:
        kinds = {str: STRING, bytes: STRING, float: F32, bool: BOOL}
        kind = kinds.get(type(items[0]), I32) if items else I32
    head = struct.pack("<IQ", kind, len(items))
    if kind == STRING:
        return head + b"".join(map(string, items))
    return head + struct.pack(f"<{len(items)}{_FORMATS[kind]}", *items)


def header(
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Sequence[int], str]],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = ALIGNMENT,
) -> bytes:
    """Everything before the weights, padded to where they begin. Tensors are (name, shape, type name)."""
    tensors = list(tensors)
    out = bytearray(magic + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for key, item in metadata.items():
        out += string(key) + value(item)
    offset = 0
    for name, shape, kind in tensors:
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, GGML[kind][0], offset)
        offset += _padded(tensor_bytes(shape, kind), alignment)
    return bytes(out) + bytes(-len(out) % alignment)


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    elements = 1
    for each in shape:
        elements *= each
    _, block, size = GGML[kind]
    return elements // block * size


def _padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def byte_level_tokens(count: int, specials: Sequence[str]) -> tuple[list[str], list[str], list[int]]:
    """A GPT-2-like tokenizer: the 256 bytes, merges of letter pairs, and `specials` at the end.

    Returns tokens, merges and token types, `count` tokens in all.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    letters = {each: chr(each) for each in printable} | {each: chr(256 + n) for n, each in enumerate(others)}
    tokens = [letters[each] for each in range(256)]
    alphabet = letters[ord(" ")] + "etaoinshrdlucmfwypvbgkjqxz"
    pairs = [(a, b) for a in alphabet for b in alphabet[1:]]
    wanted = count - 256 - len(specials)
    if wanted < 0:
        raise ValueError(f"a byte-level tokenizer needs at least {256 + len(specials)} tokens")
    chosen = pairs[:wanted]
    merges = [f"{a} {b}" for a, b in chosen]
    tokens += [a + b for a, b in chosen]
    filler = [f"word{n}" for n in range(wanted - len(chosen))]
    kinds = [1] * (len(tokens) + len(filler)) + [3] * len(specials)
    return tokens + filler + list(specials), merges, kinds


SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def llama_metadata(
    *,
    layers: int = 2,
    width: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 512,
    vocabulary: int = 512,
    context: int = 512,
    template: str | None = CHATML,
    name: str = "tiny",
) -> dict[str, Any]:
    tokens, merges, kinds = byte_level_tokens(vocabulary, SPECIALS)
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": name,
        "llama.context_length": context,
        "llama.embedding_length": width,
        "llama.block_count": layers,
        "llama.feed_forward_length": hidden,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges or ["a b"],
        "tokenizer.ggml.bos_token_id": vocabulary - 3,
        "tokenizer.ggml.eos_token_id": vocabulary - 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return metadata


def llama_tensors(
    *,
    layers: int = 2,
    width: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 512,
    vocabulary: int = 512,
    kind: str = "F32",
) -> list[tuple[str, Sequence[int], str]]:
    kv_width = width // heads * kv_heads
    out: list[tuple[str, Sequence[int], str]] = [
        ("token_embd.weight", (width, vocabulary), kind),
        ("output_norm.weight", (width,), "F32"),
    ]
    for layer in range(layers):
        prefix = f"blk.{layer}."
        out += [
            (prefix + "attn_norm.weight", (width,), "F32"),
            (prefix + "attn_q.weight", (width, width), kind),
            (prefix + "attn_k.weight", (width, kv_width), kind),
            (prefix + "attn_v.weight", (width, kv_width), kind),
            (prefix + "attn_output.weight", (width, width), kind),
            (prefix + "ffn_norm.weight", (width,), "F32"),
            (prefix + "ffn_gate.weight", (width, hidden), kind),
            (prefix + "ffn_up.weight", (width, hidden), kind),
            (prefix + "ffn_down.weight", (hidden, width), kind),
        ]
    return out


def write_llama(
    path: Path,
    *,
    layers: int = 2,
    width: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 512,
    vocabulary: int = 512,
    context: int = 512,
    kind: str = "F32",
    seed: int = 1,
    scale: float = 0.08,
    template: str | None = CHATML,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole model of random weights; `metadata` replaces or adds keys (None removes one)."""
    keys = llama_metadata(
        layers=layers, width=width, heads=heads, kv_heads=kv_heads, hidden=hidden, vocabulary=vocabulary,
        context=context, template=template, name=path.stem,
    )  # fmt: skip
    keys.update(metadata or {})
    tensors = llama_tensors(
        layers=layers, width=width, heads=heads, kv_heads=kv_heads, hidden=hidden, vocabulary=vocabulary, kind=kind
    )
    rng = random.Random(seed)
    with path.open("wb") as out:
        out.write(header({key: item for key, item in keys.items() if item is not None}, tensors))
        for name, shape, each in tensors:
            _write_tensor(out, rng, name, shape, each, scale)
    return path


def write_half_billion(path: Path, *, kind: str = "Q4_0", context: int = 2048, vocabulary: int = 65_536) -> Path:
    """The shape that the benches use: about 0.5 B parameters, speed only, no sense."""
    return write_llama(
        path, layers=24, width=1024, heads=16, kv_heads=8, hidden=4096,
        vocabulary=vocabulary, context=context, kind=kind,
    )  # fmt: skip


def _write_tensor(out: BinaryIO, rng: random.Random, name: str, shape: Sequence[int], kind: str, scale: float) -> None:
    size = tensor_bytes(shape, kind)
    if name.endswith("norm.weight"):
        data = struct.pack("<f", 1.0) * shape[0]
    else:
        # An odd number of blocks, so that rows of the repeated part do not become equal.
        unit = _random_block(rng, kind, scale, size if size <= 1 << 20 else (1 << 18) - 101)
        data = (unit * (size // len(unit) + 1))[:size]
    out.write(data)
    out.write(bytes(_padded(size) - size))


def _random_block(rng: random.Random, kind: str, scale: float, limit: int) -> bytes:
    """Up to about `limit` bytes of random weights, spread about ± `scale`, in whole blocks."""
    size = GGML[kind][2]
    count = max(1, limit // size)
    if kind == "F32":
        return struct.pack(f"<{count}f", *(rng.gauss(0, scale) for _ in range(count)))
    if kind == "F16":
        return struct.pack(f"<{count}e", *(rng.gauss(0, scale) for _ in range(count)))
    step = struct.pack("<e", scale / (4 if kind == "Q4_0" else 64))
    body = size - 2
    return b"".join(step + rng.randbytes(body) for _ in range(count))
