"""Writes ONNX models of the BERT family: the wire format by hand, so that tests can also write what no library would.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[Any]]
_TYPES = {np.dtype("float32"): 1, np.dtype("int64"): 7, np.dtype("float16"): 10}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "the", "cat", "dog", "sat", "on", "mat", "red", "blue", "sky", "sun", "a", "b", "c", "d", "e", "##s", "##ed",
    "##ing", "run", "walk", ".", ",", "!", "?", "in", "is", "of", "house", "tree", "green", "1", "2", "##3", "é",
)  # fmt: skip


# ---- the wire format


def varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str, array: npt.NDArray[Any]) -> bytes:
    dims = b"".join(field(1, each) for each in array.shape)
    return dims + field(2, _TYPES[array.dtype]) + field(8, name) + field(9, np.ascontiguousarray(array).tobytes())


def attribute(name: str, value: Any) -> bytes:
    head = field(1, name)
    if isinstance(value, float):
        return head + varint(2 << 3 | 5) + struct.pack("<f", value) + field(20, 1)
    if isinstance(value, int):
        return head + field(3, value) + field(20, 2)
    if isinstance(value, np.ndarray):
        return head + field(5, tensor("", value)) + field(20, 4)
    if isinstance(value, bytes):
        return head + field(6, value) + field(20, 5)
    return head + b"".join(field(8, each) for each in value) + field(20, 7)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> bytes:
    out = b"".join(field(1, each) for each in inputs) + b"".join(field(2, each) for each in outputs) + field(4, op)
    out += b"".join(field(5, attribute(name, value)) for name, value in attributes.items())
    return out + (field(7, domain) if domain else b"")


def value_info(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(field(1, field(1, each) if isinstance(each, int) else field(2, each)) for each in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))


def model(
    nodes: Sequence[bytes],
    weights: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    *,
    opset: int = 17,
    ir_version: int = 8,
    domains: Sequence[str] = (),
) -> bytes:
    graph = b"".join(field(1, each) for each in nodes) + field(2, "bert")
    graph += b"".join(field(5, each) for each in weights)
    graph += b"".join(field(11, each) for each in inputs) + b"".join(field(12, each) for each in outputs)
    opsets = field(8, field(1, "") + field(2, opset)) + b"".join(
        field(8, field(1, each) + field(2, 1)) for each in domains
    )
    return field(1, ir_version) + field(2, "tests") + field(7, graph) + opsets


# ---- the encoder


class _Graph:
    def __init__(self, weights: Weights) -> None:
        self.nodes: list[bytes] = []
        self.weights = {name: tensor(name, array) for name, array in weights.items()}
        self.count = 0

    def add(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        self.count += 1
        name = out or f"t{self.count}"
        self.nodes.append(node(op, inputs, [name], **attributes))
        return name

    def constant(self, value: Any, kind: str = "int64") -> str:
        self.count += 1
        name = f"c{self.count}"
        self.weights[name] = tensor(name, np.array(value, kind))
        return name

    def linear(self, value: str, name: str) -> str:
        # Checkpoints keep a matrix as (out, in); MatMul wants (in, out).
        turned = self.add("Transpose", f"{name}.weight", perm=[1, 0])
        return self.add("Add", self.add("MatMul", value, turned), f"{name}.bias")

    def norm(self, value: str, name: str, eps: float) -> str:
        return self.add("LayerNormalization", value, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=eps)


def bert(weights: Weights, *, heads: int, eps: float = 1e-12, labels: int = 0, position_ids: bool = False) -> bytes:
    """A BERT encoder with `last_hidden_state`, or with `labels` logits behind the pooled first token."""
    graph = _Graph(weights)
    width = weights["embeddings.word_embeddings.weight"].shape[1]
    layers = 1 + max(int(each.split(".")[2]) for each in weights if each.startswith("encoder.layer."))
    emb = "embeddings."
    words = graph.add("Gather", emb + "word_embeddings.weight", "input_ids", axis=0)
    types = graph.add("Gather", emb + "token_type_embeddings.weight", "token_type_ids", axis=0)
    if position_ids:
        places = graph.add("Gather", emb + "position_embeddings.weight", "position_ids", axis=0)
    else:
        shape = graph.add("Shape", "input_ids", start=1, end=2)
        places = graph.add("Slice", emb + "position_embeddings.weight", graph.constant([0]), shape, graph.constant([0]))
    state = graph.add("Add", graph.add("Add", words, types), places)
    state = graph.norm(state, emb + "LayerNorm", eps)
    wide = graph.add("Unsqueeze", graph.add("Cast", "attention_mask", to=1), graph.constant([1, 2]))
    mask = graph.add("Mul", graph.add("Sub", graph.constant(1.0, "float32"), wide), graph.constant(-10000.0, "float32"))
    for number in range(layers):
        state = _layer(graph, f"encoder.layer.{number}.", state, mask, heads, width, eps)
    last: Sequence[int | str]
    if labels:
        first = graph.add("Gather", state, graph.constant(0), axis=1)
        pooled = graph.add("Tanh", graph.linear(first, "pooler.dense"))
        graph.add("Identity", graph.linear(pooled, "classifier"), out="logits")
        output, last = "logits", ("batch", labels)
    else:
        graph.add("Identity", state, out="last_hidden_state")
        output, last = "last_hidden_state", ("batch", "length", width)
    names = ["input_ids", "attention_mask", "token_type_ids"] + ["position_ids"] * position_ids
    inputs = [value_info(each, 7, ("batch", "length")) for each in names]
    return model(graph.nodes, list(graph.weights.values()), inputs, [value_info(output, 1, last)])


def _layer(graph: _Graph, name: str, state: str, mask: str, heads: int, width: int, eps: float) -> str:
    split = graph.constant([0, 0, heads, width // heads])

    def headed(which: str, perm: list[int]) -> str:
        flat = graph.linear(state, f"{name}attention.self.{which}")
        return graph.add("Transpose", graph.add("Reshape", flat, split), perm=perm)

    query, key, value = headed("query", [0, 2, 1, 3]), headed("key", [0, 2, 3, 1]), headed("value", [0, 2, 1, 3])
    scores = graph.add("Div", graph.add("MatMul", query, key), graph.constant((width // heads) ** 0.5, "float32"))
    share = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", share, value), perm=[0, 2, 1, 3])
    joined = graph.add("Reshape", mixed, graph.constant([0, 0, width]))
    state = graph.add("Add", graph.linear(joined, f"{name}attention.output.dense"), state)
    state = graph.norm(state, f"{name}attention.output.LayerNorm", eps)
    inner = graph.linear(state, f"{name}intermediate.dense")
    erf = graph.add("Erf", graph.add("Div", inner, graph.constant(2**0.5, "float32")))
    half = graph.add("Mul", graph.add("Mul", inner, graph.add("Add", erf, graph.constant(1.0, "float32"))),
                     graph.constant(0.5, "float32"))  # fmt: skip
    state = graph.add("Add", graph.linear(half, f"{name}output.dense"), state)
    return graph.norm(state, f"{name}output.LayerNorm", eps)


# ---- weights and folders


def random_weights(
    *,
    vocabulary: int,
    width: int = 32,
    layers: int = 2,
    hidden: int = 64,
    places: int = 64,
    labels: int = 0,
    seed: int = 0,
) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    found: dict[str, npt.NDArray[Any]] = {}

    def put(name: str, *shape: int) -> None:
        found[name] = rng.normal(0, 0.4 if len(shape) == 2 else 0.1, shape).astype(np.float32)

    def norm(name: str) -> None:
        put(f"{name}.bias", width)
        found[f"{name}.weight"] = (1 + rng.normal(0, 0.1, width)).astype(np.float32)

    def linear(name: str, out: int, inward: int) -> None:
        put(f"{name}.weight", out, inward)
        put(f"{name}.bias", out)

    for name, rows in (("word", vocabulary), ("position", places), ("token_type", 2)):
        put(f"embeddings.{name}_embeddings.weight", rows, width)
    norm("embeddings.LayerNorm")
    for number in range(layers):
        at = f"encoder.layer.{number}."
        for each in ("query", "key", "value"):
            linear(f"{at}attention.self.{each}", width, width)
        linear(f"{at}attention.output.dense", width, width)
        norm(f"{at}attention.output.LayerNorm")
        linear(f"{at}intermediate.dense", hidden, width)
        linear(f"{at}output.dense", width, hidden)
        norm(f"{at}output.LayerNorm")
    if labels:
        linear("pooler.dense", width, width)
        linear("classifier", labels, width)
    return found


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """A tokenizer of a few words in the shape of published ones."""
    vocabulary = {each: number for number, each in enumerate((*SPECIAL, *WORDS))}
    special = {each: {"id": each, "ids": [vocabulary[each]], "tokens": [each]} for each in ("[CLS]", "[SEP]")}

    def part(kind: str, name: str, which: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": which}}

    single = [part("SpecialToken", "[CLS]", 0), part("Sequence", "A", 0), part("SpecialToken", "[SEP]", 0)]
    pair = [*single, part("Sequence", "B", 1), part("SpecialToken", "[SEP]", 1)]
    added = [
        {"id": vocabulary[each], "content": each, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for each in SPECIAL
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocabulary},
        **changes,
    }  # fmt: skip


def config_json(*, width: int = 32, hidden: int = 64, places: int = 64, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": width, "num_attention_heads": 4,
        "intermediate_size": hidden, "max_position_embeddings": places, "vocab_size": len(SPECIAL) + len(WORDS),
        **changes,
    }  # fmt: skip


def write_folder(
    folder: Path,
    *,
    labels: int = 0,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    position_ids: bool = False,
    **others: Any,
) -> dict[str, npt.NDArray[Any]]:
    """A tiny model of random weights as a folder; returns the weights.

    Args:
        labels: 0 makes vectors; 1 ranks; more classify.
        others: further files: modules_json=…, pooling_json=….
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(vocabulary=len(SPECIAL) + len(WORDS), labels=labels, seed=seed)
    (folder / "model.onnx").write_bytes(bert(weights, heads=4, labels=labels, position_ids=position_ids))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    kind = {"architectures": ["BertForSequenceClassification"]} if labels else {}
    if labels:
        kind["id2label"] = {str(each): f"label {each}" for each in range(labels)}  # type: ignore[assignment]
    (folder / "config.json").write_text(json.dumps(config_json(**{**kind, **(config or {})})))
    names = {"modules_json": "modules.json", "pooling_json": "1_Pooling/config.json"}
    for key, value in others.items():
        path = folder / names[key]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))
    return weights


def write_safetensors_bert(source: Path, folder: Path) -> dict[str, npt.NDArray[Any]]:
    """A published BERT encoder (safetensors, 32-bit) as a folder with model.onnx; returns its weights."""
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, each in json.loads(raw[8 : 8 + length]).items():
        bare = name.removeprefix("bert.")
        if name == "__metadata__" or each["dtype"] != "F32" or bare.startswith("pooler."):
            continue
        begin, end = (8 + length + at for at in each["data_offsets"])
        weights[bare] = np.frombuffer(raw[begin:end], np.float32).reshape(each["shape"])
    config = json.loads((source / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(
        bert(weights, heads=config["num_attention_heads"], eps=config["layer_norm_eps"])
    )
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json", "special_tokens_map.json",
                 "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    return weights
