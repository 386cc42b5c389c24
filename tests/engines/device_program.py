"""A process that loads models on the processor, on a Vulkan device and on both, and tells as JSON what came of it.

`python3 -m tests.engines.device_program EXACT QUANTISED`: the first one answers, of the second only its buffers count.
A process of its own, because the library looks at the environment once, and so that a driver that crashes ends nothing
else.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from ai_assistant.engines import gguf_rules, llama, memory, native, placing
from ai_assistant.engines.contract import Chunk, GenerateRequest, LoadOptions, Placement
from ai_assistant.engines.gguf import opened, read_gguf
from ai_assistant.engines.gguf_layers import sizes_of
from ai_assistant.engines.split_cost import Costs, SplitDevice
from ai_assistant.hal.hetero.intent import Objective, parse

DEVICE = "Vulkan0"
NAME = f"ggml:{DEVICE}"
OPTIONS = LoadOptions(sequences=2, threads=1, batch_tokens=256, speculative="off")
_REPORT = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size =\s+([\d.]+) MiB")


class Report:
    """The library's own account of its buffers, in MiB."""

    def __init__(self, lib: Any) -> None:
        self.sizes: dict[str, float] = {}

        @lib.llama_log_callback  # type: ignore[untyped-decorator]
        def listen(_level: int, text: bytes, _data: Any) -> None:
            if found := _REPORT.search(text.decode(errors="replace")):
                self.sizes[f"{found[1]} {found[2]}"] = float(found[3])

        self._keep = listen
        lib.llama_log_set(listen, None)


def answer(engine: llama.LlamaEngine, prompt: str) -> list[Any]:
    request = GenerateRequest(prompt=prompt, max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)
    events = engine.generate(request)
    found = [each for chunk in events if isinstance(chunk, Chunk) for each in chunk.logprobs]
    return [(list(each.bytes), each.logprob) for each in found]


def runs(path: Path, report: Report, prompts: tuple[str, ...]) -> dict[str, Any]:
    """The model on the processor, half of it on the device, and all of it: answers, buffers and the estimate."""
    with opened(path) as fd:
        header = read_gguf(fd)
    shape = gguf_rules.memory_shape(header)
    sizes = sizes_of(header, shape, memory.settled(shape, OPTIONS))
    count = len(sizes.layers) + 1
    device, host = SplitDevice(name=NAME), SplitDevice(name="cpu")
    costs = Costs(sizes, host, [device], Objective.LATENCY)
    found: dict[str, Any] = {}
    for name, on_device in (("processor", 0), ("half", count // 2), ("device", count)):
        begin = count - on_device
        parts = ((("cpu", begin),) if begin else ()) + (((NAME, on_device),) if on_device else ())
        report.sizes.clear()
        there = mock.patch.object(llama, "decide", return_value=Placement(parts))
        with there, llama.LlamaEngine.open(path, OPTIONS) as engine:
            answers = [answer(engine, prompt) for prompt in prompts]
        found[name] = {
            "answers": answers,
            "buffers": dict(report.sizes),
            "warning": engine.placement.warning,
            "device_bytes": costs.bytes_of(device, begin, count) if on_device else 0,
            "host_bytes": costs.bytes_of(host, 0, begin),
            "runtime_bytes": shape.runtime_bytes,
        }
    return found


def opened_with(path: Path, wish: str, **extra: Any) -> Placement:
    options = LoadOptions(sequences=2, threads=1, hetero_compute=wish, extra=extra)
    with llama.LlamaEngine.open(path, options) as engine:
        return engine.placement


def main(exact: Path, quantised: Path) -> None:
    lib = native.library()
    known = native.devices()
    if DEVICE not in known:
        print(json.dumps({"devices": list(known)}))
        return
    report = Report(lib)
    out: dict[str, Any] = {
        "exact": runs(exact, report, ("hi", "the same again")),
        "quantised": runs(quantised, report, ()),
        **{wish: opened_with(exact, wish).devices for wish in ("ON", "OFF", "performance")},
        "named": opened_with(exact, NAME).devices,
    }
    avoided = opened_with(exact, NAME, avoid_devices=[NAME])
    out["avoided"] = [avoided.devices, avoided.warning]
    host, others, _ = placing.look(parse("ON"))
    out["look"] = [[each.name, each.software, each.usable, each.free_bytes] for each in (host, *others)]
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
