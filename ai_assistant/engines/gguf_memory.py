"""The numbers of a GGUF header that the memory of a loaded model depends on.

They follow the pinned source of llama.cpp: llama-kv-cache.cpp for the cache, llama-hparams.cpp (`n_embd_r`,
`n_embd_s`) for recurrent states, and what the graph allocator reserved for models of many shapes.
"""

from __future__ import annotations

from collections import Counter

from ai_assistant.engines.gguf import Array, Gguf
from ai_assistant.engines.gguf_fields import head_width, integer, per_layer
from ai_assistant.engines.memory import PROCESS_BYTES, MemoryShape
from ai_assistant.engines.repack import repacked_bytes

_TOKEN_BYTES = 120
"""A token in the library's vocabulary: its text, and both directions of the look-up."""
_MERGE_BYTES = 90
"""A merge of the tokenizer: two strings and a number in a hash table."""


def shape_of(model: Gguf, *, encoder: bool) -> MemoryShape:
    """What memory depends on; for headers that `gguf_rules.check` has accepted.

    Args:
        encoder: the model makes embeddings only, and has no cache.
    """
    layers = integer(model, "block_count")
    width = integer(model, "embedding_length")
    heads = per_layer(model, "attention.head_count", layers)
    kv_heads = per_layer(model, "attention.head_count_kv", layers) or heads
    key = integer(model, "attention.key_length", default=head_width(model, width, heads), low=0)
    value = integer(model, "attention.value_length", default=head_width(model, width, heads), low=0)
    if model.of_model("attention.key_length_mla") is not None:
        value = 0  # the compressed keys hold the values
    # Layers that look into another layer's cache have none of their own.
    own = layers - min(layers, integer(model, "attention.shared_kv_layers", default=0, low=0))
    groups = Counter((each * key, each * value) for each in kv_heads[:own] if each)
    merges = model.metadata.get("tokenizer.ggml.merges")
    vocabulary = model.tokens[0]
    most = max(heads, default=0)
    return MemoryShape(
        weights_bytes=model.weight_bytes,
        repacked_bytes=repacked_bytes(model.tensors.values()),
        attention=() if encoder else tuple((count, *group) for group, count in groups.items()),
        state_bytes=0 if encoder else _state_bytes(model, layers, width, heads, kv_heads),
        step_bytes=4 * _step_elements(model, layers, width, most * max(key, value), max(kv_heads, default=0) * key),
        masks=2 if model.of_model("attention.sliding_window") else 1,
        kv_block=_block(key, value),
        vocabulary=vocabulary,
        context_length=integer(model, "context_length"),
        whole_texts=encoder,
        runtime_bytes=PROCESS_BYTES
        + _TOKEN_BYTES * vocabulary
        + _MERGE_BYTES * (merges.count if isinstance(merges, Array) else 0),
    )


def _block(key: int, value: int) -> int:
    """The largest power of two, up to 32, that divides the widths of a head."""
    block = 32
    while key % block or value % block:
        block //= 2
    return block


def _step_elements(model: Gguf, layers: int, width: int, query: int, kv: int) -> int:
    """Activations of one token that are alive at the same time, at the worst place of the graph.

    In the feed-forward part that is gate, up and their product, with the layer's input, its norm and two more; in
    attention the input and its norm, queries before and after their rotation, keys and values.
    """
    hidden = max(per_layer(model, "feed_forward_length", layers), default=0) or 4 * width
    used = max(per_layer(model, "expert_used_count", layers), default=0)
    expert = integer(model, "expert_feed_forward_length", default=hidden if used else 0, low=0)
    forward = max(3 * hidden + 4 * width, used * (3 * expert + width) + 4 * width)
    attention = 2 * width + 2 * query + 2 * kv
    inner = integer(model, "ssm.inner_size", default=0, low=0)
    state = integer(model, "ssm.state_size", default=0, low=0)
    return max(forward, attention, 4 * width + 5 * inner + 2 * state)


def _state_bytes(model: Gguf, layers: int, width: int, heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> int:
    """The recurrent state of one sequence, in bytes: 32-bit numbers."""
    # In a mixed model the layers without attention are the recurrent ones; a model of one kind says 0 or nothing.
    recurrent = sum(1 for each in kv_heads if not each) if any(kv_heads) else layers
    wkv = integer(model, "wkv.head_size", default=0, low=0)
    short = integer(model, "shortconv.l_cache", default=0, low=0)
    if wkv:
        return layers * 4 * width * (integer(model, "token_shift_count", default=2, low=0) + wkv)
    if short:
        return recurrent * 4 * width * (short - 1)
    inner = integer(model, "ssm.inner_size", default=0, low=0)
    state = integer(model, "ssm.state_size", default=0, low=0)
    if not inner:
        return 0
    interval = integer(model, "full_attention_interval", default=0, low=0)
    if interval:
        recurrent = layers - layers // interval
    elif all(kv_heads) and kv_heads:
        recurrent = layers  # attention and a state in each layer
    convolution = max(integer(model, "ssm.conv_kernel", default=0, low=0) - 1, 0)
    groups = integer(model, "ssm.group_count", default=0, low=0)
    return recurrent * 4 * (convolution * (inner + 2 * groups * state) + inner * state)
