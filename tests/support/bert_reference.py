"""A BERT encoder in numpy, one text at a time and in 64 bits: what the engine's vectors are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, npt.NDArray[Any]]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def encode(weights: Weights, ids: Sequence[int], types: Sequence[int], *, heads: int, eps: float = 1e-12) -> Array:
    """The last hidden state of one text, (tokens, width)."""

    def get(name: str) -> Array:
        return weights[name].astype(np.float64)

    def linear(value: Array, name: str) -> Array:
        return np.asarray(value @ get(f"{name}.weight").T + get(f"{name}.bias"))

    def norm(value: Array, name: str) -> Array:
        mean = value.mean(-1, keepdims=True)
        spread = np.sqrt(((value - mean) ** 2).mean(-1, keepdims=True) + eps)
        return np.asarray((value - mean) / spread * get(f"{name}.weight") + get(f"{name}.bias"))

    count = len(ids)
    state = (
        get("embeddings.word_embeddings.weight")[list(ids)]
        + get("embeddings.token_type_embeddings.weight")[list(types)]
        + get("embeddings.position_embeddings.weight")[:count]
    )
    state = norm(state, "embeddings.LayerNorm")
    number = 0
    while f"encoder.layer.{number}.output.dense.weight" in weights:
        name = f"encoder.layer.{number}."
        query, key, value = (
            linear(state, f"{name}attention.self.{each}").reshape(count, heads, -1).transpose(1, 0, 2)
            for each in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = (share @ value).transpose(1, 0, 2).reshape(count, -1)
        state = norm(linear(mixed, f"{name}attention.output.dense") + state, f"{name}attention.output.LayerNorm")
        inner = linear(state, f"{name}intermediate.dense")
        inner = inner * (1 + _erf(inner / math.sqrt(2))) / 2
        state = norm(linear(inner, f"{name}output.dense") + state, f"{name}output.LayerNorm")
        number += 1
    return state


def logits(weights: Weights, state: Array) -> Array:
    """What the head makes of the first token, (labels,)."""
    pooled = np.tanh(state[0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
    return np.asarray(pooled @ weights["classifier.weight"].T + weights["classifier.bias"])


def unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector))
