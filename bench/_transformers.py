"""Hugging Face transformers with a model of random weights: its memory beyond them, printed as JSON.

    RUN bench/_transformers.py FOLDER THREADS < task

A program of its own for the Python that `bench/hugging-face` prepares, without anything of this project on its path.
The task is JSON: `model` (fields of LlamaConfig), `prompts` (lists of token numbers), `tokens` (of each answer).

Prompts go in one padded batch, as `generate` has it. Weights are bfloat16, as large as float16 and what PyTorch
computes with on such processors without converting; they are saved once to FOLDER and loaded from there.
Counted is what is anonymous or shared of the process, less the weights as far as they lie there and are not mapped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def anonymous_ranges(maps: str) -> list[tuple[int, int]]:
    """Address ranges of /proc/PID/maps that no file stands behind."""
    out = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if fields[4] == "0":
            low, _, high = fields[0].partition("-")
            out.append((int(low, 16), int(high, 16)))
    return out


def bytes_within(blocks: Iterable[tuple[int, int]], ranges: Iterable[tuple[int, int]]) -> int:
    """Of blocks (address, bytes), those that begin in one of the ranges; each block once."""
    known = list(ranges)
    return sum(size for start, size in set(blocks) if any(low <= start < high for low, high in known))


def _resident(*names: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in names) * 1024


def _model(folder: Path, values: dict[str, Any], torch: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]

    if not (folder / "config.json").exists():
        torch.set_default_dtype(torch.bfloat16)
        partial = folder.with_suffix(".partial")
        LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(partial, safe_serialization=True)
        partial.rename(folder)
        return None
    return LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True).eval()


def main(arguments: list[str]) -> int:
    import torch

    folder, threads = Path(arguments[0]), int(arguments[1])
    torch.set_num_threads(threads)
    task = json.load(sys.stdin)
    model = _model(folder, task["model"], torch)
    if model is None:
        print(json.dumps({"made": True}))
        return 0
    prompts, tokens = task["prompts"], task["tokens"]
    longest = max(len(each) for each in prompts)
    padded = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    with torch.inference_mode():
        found = model.generate(
            padded, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    if found.shape != (len(prompts), longest + tokens):
        raise SystemExit(f"{tuple(found.shape)} came instead of {len(prompts)} × {longest + tokens} tokens")
    blocks = [(each.data_ptr(), each.nbytes) for each in model.parameters()]
    weights = bytes_within(blocks, anonymous_ranges(Path("/proc/self/maps").read_text()))
    anonymous = _resident("RssAnon", "RssShmem")
    print(json.dumps({
        "beyond": anonymous - weights, "anonymous": anonymous, "weights": sum(size for _, size in set(blocks)),
        "whole": _resident("VmRSS"),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
