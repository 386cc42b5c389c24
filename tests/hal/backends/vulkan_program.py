"""What a process with a Vulkan device finds and computes, as JSON: run by test_ggml_vulkan.py.

In a process of its own, because ggml's plug-ins are loaded once, with the environment of that moment.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ai_assistant.errors import OutOfMemory
from ai_assistant.hal.backends.ggml import BACKEND
from ai_assistant.hal.contract import Context, Program
from ai_assistant.hal.ggml import library
from ai_assistant.hal.graph import Array, Graph, Node, Value
from tests.hal.backends.graphs import block, block_result, f32

_PATIENCE_S = 500
"""lavapipe compiles a shader when it is first used; a busy machine takes its time for that."""


def attention(weights: Array) -> Graph:
    """x (24 × 48) → Softmax(x @ weights)."""
    values = (Value("x", f32(24, 48)), Value("w", f32(*weights.shape), weights), Value("s", f32(24, 40)),
              Value("y", f32(24, 40)))  # fmt: skip
    nodes = (Node("MatMul", 13, (0, 1), (2,)), Node("Softmax", 13, (2,), (3,), attributes={"axis": -1}))
    return Graph(values, nodes, (0,), (3,))


def run(context: Context, program: Program, x: Array) -> Array:
    outputs = [context.allocator.tensor(each) for each in program.outputs]
    with closing(context.queue()) as queue:
        queue.submit(program, [context.allocator.upload(x)], outputs).wait(_PATIENCE_S)
    return context.allocator.download(outputs[0])


def use(context: Context, *, twice: bool) -> dict[str, Any]:
    random = np.random.default_rng(5)
    weights = random.standard_normal((48, 40), np.float32)
    x = random.standard_normal((24, 48), np.float32)
    graph = attention(weights)
    program = context.compile(graph)
    # Programs hold memory of the device: none of them may see another's.
    others = [context.compile(attention(-weights)) for _ in range(8 if twice else 0)]
    found = run(context, program, x)
    again = run(context, program, x)
    for each in others:
        each.close()
    small = random.standard_normal((8, 16), np.float32)
    layers = block()
    try:
        context.allocator.allocate(context.capabilities.memory_bytes + 1)
        refused = ""
    except OutOfMemory as error:
        refused = error.message
    before = context.allocator.statistics().in_use_bytes
    tensor = context.allocator.upload(x)
    used = context.allocator.statistics().in_use_bytes - before
    context.allocator.free(tensor.buffer)
    return {
        "memory": context.capabilities.memory_bytes,
        "x": x.tolist(),
        "weights": weights.tolist(),
        "found": found.tolist(),
        "again": again.tolist(),
        "block": float(np.abs(run(context, context.compile(layers), small) - block_result(layers, small)).max()),
        "refused": refused,
        "uploaded": used,
    }


def main() -> None:
    backend = BACKEND()
    probe = backend.probe()
    lib = library.library()
    said: dict[str, Any] = {
        "plug_in": (lib.folder / "libggml-vulkan.so").exists(),
        "devices": {each.id: [each.name, each.kind, each.hal_id] for each in probe.devices},
    }
    if "use" in sys.argv:
        for each in probe.devices:
            with backend.open(each.id) as context:
                said[each.id] = use(context, twice=each.kind == "gpu")
    mapped = Path("/proc/self/maps").read_text()
    said["mapped"] = [name for name in ("libvulkan.so", "libvulkan_", "libLLVM") if name in mapped]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
