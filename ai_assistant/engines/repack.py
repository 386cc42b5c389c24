"""Which weights the native library copies into another layout on this processor, and how large the copies are.

ggml multiplies some types faster when eight rows are interleaved, or in the tiles of a matrix unit, and then keeps
such a copy beside the mapped file. The rules are those of the pinned source: ggml-cpu/repack.cpp
(`ggml_repack_get_optimal_repack_type`) and ggml-cpu/amx, for weights that a matrix product reads
(llama-model-loader.cpp `select_weight_buft`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ai_assistant.engines.gguf import Tensor

_EIGHT_ROWS = {
    "avx2": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "avx512f": ("Q2_K",),
    # With SVE alone q4_0 may take another layout of the same size.
    "i8mm": ("Q4_K", "Q5_K", "Q6_K"),
    "asimddp": ("Q4_K", "Q5_K", "Q6_K"),
}
_FOUR_ROWS = {
    "i8mm": ("Q4_0", "Q8_0", "Q1_0"),
    "asimddp": ("Q4_0", "Q8_0", "Q1_0", "IQ4_NL", "MXFP4"),
}
_AMX = {"amx_int8", "avx512_vnni"}
_AMX_EXTRA = {
    "Q4_0": 0.0,
    "Q4_1": 0.0,
    "Q8_0": 4 / 34,
    "Q4_K": 4 / 144,
    "Q5_K": 4 / 176,
    "Q6_K": 0.0,
    "IQ4_XS": 2 / 136,
}
"""What a tile has beside the blocks, as a share of their size."""
_AMX_COLUMNS = 32
_NOT_MULTIPLIED = re.compile(
    r"(_norm|rope_freqs|\.bias|position_embd|token_types|per_layer_token_embd|\.conv1d|shortconv)"
)
_EMBEDDING = "token_embd.weight"
_MAX_CPUINFO = 1 << 20


@cache
def processor_features() -> frozenset[str]:
    """What the first processor of this machine can do, in the words of /proc/cpuinfo."""
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            text = file.read(_MAX_CPUINFO).decode(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def repacked_bytes(tensors: Iterable[Tensor], features: frozenset[str] | None = None) -> int:
    """Bytes of the copies, for the tensors of one model.

    Args:
        features: of the processor; None: of this one.
    """
    features = processor_features() if features is None else features
    listed = list(tensors)
    # Without an output matrix of its own, the embedding is loaded a second time as one.
    tied = not any(each.name == "output.weight" for each in listed)
    return sum(
        _copied(each, features)
        for each in listed
        if not _NOT_MULTIPLIED.search(each.name) and (tied or each.name != _EMBEDDING)
    )


def _copied(tensor: Tensor, features: frozenset[str]) -> int:
    if len(tensor.shape) not in (2, 3):
        return 0
    kind, rows = tensor.type.name, tensor.shape[1]
    if len(tensor.shape) == 2 and features >= _AMX and kind in _AMX_EXTRA and rows % _AMX_COLUMNS == 0:
        return int(tensor.size_bytes * (1 + _AMX_EXTRA[kind]))
    for multiple, table in ((8, _EIGHT_ROWS), (4, _FOUR_ROWS)):
        if rows % multiple == 0 and any(kind in kinds for need, kinds in table.items() if need in features):
            return tensor.size_bytes
    return 0
