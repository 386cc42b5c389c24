"""The network in PyTorch: a small Llama (RMSNorm, rotary positions, SwiGLU, tied embeddings).

Rotary positions turn neighbouring pairs, which is llama.cpp's convention for this architecture, so the
export needs no permutation. All widths are multiples of 256, so that K-quants apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 768
    context: int = 512
    rope_base: float = 10_000.0
    epsilon: float = 1e-5
    dropout: float = 0.1


class Norm(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Any) -> Any:
        return functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = Norm(shape.width, shape.epsilon)
        self.query, self.key, self.value, self.output = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )
        self.feed_norm = Norm(shape.width, shape.epsilon)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        """x: (batch, time, width); cos, sin: (time, head width / 2)."""
        batch, time, width = x.shape
        normed = self.attention_norm(x)
        query, key, value = (
            layer(normed).view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # Written out: for two dozen positions the fused kernel's backward pass costs ten times as much.
        scores = rotate(query, cos, sin) @ rotate(key, cos, sin).transpose(2, 3) * (width // self.heads) ** -0.5
        mixed = (scores + ahead(time)).softmax(-1).to(value.dtype) @ value
        x = x + self.dropout(self.output(mixed.transpose(1, 2).reshape(batch, time, width)))
        normed = self.feed_norm(x)
        return x + self.dropout(self.down(functional.silu(self.gate(normed)) * self.up(normed)))


def ahead(time: int) -> Any:
    """(time, time): minus infinity where a position would look ahead."""
    return torch.full((time, time), float("-inf")).triu(1)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """x: (batch, heads, time, head width); pairs (0, 1), (2, 3), … turn by the position's angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Network(nn.Module):  # type: ignore[misc]
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width, shape.epsilon)
        self.dropout = nn.Dropout(shape.dropout)
        self.apply(self._start)
        half = shape.width // shape.heads // 2
        angles = torch.outer(
            torch.arange(shape.context).float(), shape.rope_base ** (-torch.arange(half).float() / half)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @staticmethod
    def _start(module: Any) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)

    def hidden(self, ids: Any) -> Any:
        """ids: (batch, time) -> normed states (batch, time, width)."""
        time = ids.shape[1]
        x = self.dropout(self.embedding(ids))
        for block in self.blocks:
            x = block(x, self.cos[:time], self.sin[:time])
        return self.norm(x)

    def logits(self, hidden: Any) -> Any:
        """(…, width) -> (…, vocabulary)."""
        return functional.linear(hidden, self.embedding.weight)
