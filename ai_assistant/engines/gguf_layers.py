"""The layers of a GGUF header: what each takes and does, for `split.py`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from ai_assistant.engines import memory
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.gguf import Gguf, Tensor
from ai_assistant.engines.gguf_fields import integer, per_layer
from ai_assistant.engines.memory import MemoryShape
from ai_assistant.engines.repack import repacked_bytes
from ai_assistant.engines.split_cost import Layer, ModelSizes

_OF_LAYER = re.compile(r"blk\.(\d{1,4})\.")
_INPUT = re.compile(r"(token_embd|position_embd|token_types|per_layer_token_embd)")
_EXPERTS = re.compile(r"_(up|down|gate|gate_up)_exps\.")
_EMBEDDING = "token_embd.weight"


def sizes_of(model: Gguf, shape: MemoryShape, options: LoadOptions) -> ModelSizes:
    """What the model's parts take when it is loaded with these options, which `memory.settled` has settled.

    For headers that `gguf_rules.check` has accepted; `shape` is that of the same header.
    """
    count = integer(model, "block_count")
    width = integer(model, "embedding_length")
    by_layer: dict[int, list[Tensor]] = defaultdict(list)
    outside: list[Tensor] = []
    for each in model.tensors.values():
        found = _OF_LAYER.match(each.name)
        if found and int(found[1]) < count:
            by_layer[int(found[1])].append(each)
        elif not _INPUT.match(each.name):
            outside.append(each)
    caches, share = _caches(model, shape, options, count), _share(model, count)
    layers = tuple(_layer(by_layer[place], share, options, caches[place]) for place in range(count))
    tied = model.tensors.get(_EMBEDDING) if not any(each.name == "output.weight" for each in outside) else None
    ending = outside if tied is None else [*outside, tied]
    output = _layer(ending, share, options, host_has_bytes=0 if tied is None else tied.size_bytes)
    whole = memory.estimate(shape, options)
    placed = sum(each.weights_bytes - each.host_has_bytes for each in (*layers, output))
    rows = memory.output_rows(shape, options)
    # Another device works in what the processor does, less the input and its norm, which the host keeps.
    step = memory.step_tokens(shape, options)
    inputs = 2 * step * width * 4
    graph_rows = rows * shape.vocabulary * 4
    masks = memory.mask_bytes(shape, options)
    idle = min(whole.compute_bytes, inputs + masks + max(0, memory.results_bytes(shape, options) - graph_rows))
    return ModelSizes(
        layers=layers,
        output=output,
        width_bytes=4 * width,
        logits_bytes=4 * shape.vocabulary,
        expert_share=share,
        sequences=options.sequences,
        batch_tokens=options.batch_tokens,
        host_bytes=shape.weights_bytes - placed + idle + whole.runtime_bytes + options.spill_memory_bytes,
        host_step_bytes=whole.compute_bytes - idle,
        device_step_bytes=max(0, step * shape.step_bytes - inputs) + masks,
        output_step_bytes=graph_rows,
    )


def _layer(
    tensors: Sequence[Tensor], share: float, options: LoadOptions, cache_bytes: int = 0, host_has_bytes: int = 0
) -> Layer:
    experts = [each for each in tensors if _EXPERTS.search(each.name)]
    matrices = sum(each.elements for each in tensors if len(each.shape) > 1)
    idle = sum(each.elements for each in experts) * (1.0 - share)
    return Layer(
        weights_bytes=sum(each.size_bytes for each in tensors),
        expert_bytes=sum(each.size_bytes for each in experts),
        host_has_bytes=host_has_bytes,
        repacked_bytes=repacked_bytes(tensors) if options.repack else 0,
        cache_bytes=cache_bytes,
        flops=2.0 * (matrices - idle),
    )


def _caches(model: Gguf, shape: MemoryShape, options: LoadOptions, count: int) -> list[int]:
    """Bytes of each layer's cache and state: what `memory` counts for all, by each layer's heads."""
    whole = memory.kv_bytes(shape, options)
    state = min(whole, shape.state_bytes * options.sequences)
    heads = per_layer(model, "attention.head_count_kv", count) or per_layer(model, "attention.head_count", count)
    shared = min(count, integer(model, "attention.shared_kv_layers", default=0, low=0))
    shares = [each if place < count - shared else 0 for place, each in enumerate(heads or (1,) * count)]
    recurrent = [int(not each) for each in shares] if any(shares) and not all(shares) else [1] * count
    attending, kept = max(1, sum(shares)), max(1, sum(recurrent))
    return [
        (whole - state) * share // attending + state * other // kept
        for share, other in zip(shares, recurrent, strict=True)
    ]


def _share(model: Gguf, count: int) -> float:
    """Of the experts, how many a token uses; 1 without experts."""
    experts = integer(model, "expert_count", default=0, low=0)
    used = max(per_layer(model, "expert_used_count", count), default=0)
    return min(1.0, used / experts) if experts and used else 1.0
