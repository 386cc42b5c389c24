"""Training: fixed seeds and a fixed number of steps; it resumes from its last checkpoint.

The data stream is cut into chunks, each from a seed of its own, so that a resumed run sees exactly what
an uninterrupted one would have seen.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ai_assistant.models.recipe.data import Generator
from ai_assistant.models.recipe.network import Network, Shape
from ai_assistant.models.recipe.tokenizer import END, load_tokenizer, prompt_ids

SEED = 20
STEPS = 2400
BATCH = 128
CHUNK_STEPS = 50
WARM_UP = 200
PEAK_RATE = 1.5e-3
FINAL_RATE = 3e-5
WEIGHT_DECAY = 0.05
EMA = 0.998
CUT_SHARE = 0.25
"""Of the questions, cut into odd tokens."""
_SYSTEMS = (
    "you are a helpful assistant", "You are a helpful assistant.", "你是一个有用的助手", "You control this appliance.",
    "answer with one tool call", "today is monday", "Be brief.", "be polite and answer in the language of the user",
)  # fmt: skip


def batches(chunk: int, tokenizer: Any) -> list[tuple[Any, Any, Any]]:
    """The batches of one chunk: ids, targets and loss weights, each (batch, time), padded on the right."""
    rng = random.Random(SEED * 100_003 + chunk)
    samples = list(itertools.islice(Generator(SEED * 1_000_003 + chunk), CHUNK_STEPS * BATCH))
    rows: list[tuple[list[int], int]] = []
    for sample in samples:
        system = rng.choice(_SYSTEMS) if rng.random() < 0.06 else ""
        prompt = prompt_ids(tokenizer, sample.text, system, cut=rng if rng.random() < CUT_SHARE else None)
        rows.append((prompt + tokenizer.encode(sample.answer).ids + [END], len(prompt)))
    rows.sort(key=lambda row: len(row[0]))
    groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    rng.shuffle(groups)
    return [_tensors(group) for group in groups]


def _tensors(rows: list[tuple[list[int], int]]) -> tuple[Any, Any, Any]:
    longest = max(len(ids) for ids, _ in rows)
    data = torch.full((len(rows), longest), END)
    weight = torch.zeros((len(rows), longest))
    for i, (ids, prompt) in enumerate(rows):
        data[i, : len(ids)] = torch.tensor(ids)
        # Only the answer is learned: predicting questions would cost more than all the rest together.
        weight[i, prompt : len(ids)] = 1.0
    return data[:, :-1], data[:, 1:], weight[:, 1:]


def rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    share = (step - WARM_UP) / max(1, steps - WARM_UP)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def loss_of(network: Any, batch: tuple[Any, Any, Any]) -> Any:
    ids, targets, weight = batch
    hidden = network.hidden(ids)
    wanted = weight > 0
    losses = functional.cross_entropy(network.logits(hidden[wanted]).float(), targets[wanted], reduction="none")
    return (losses * weight[wanted]).sum() / weight.sum()


def train(work: Path, *, steps: int = STEPS) -> None:
    """Train from `work`/tokenizer.json into `work`/weights.pt, with a checkpoint every chunk or two minutes."""
    torch.manual_seed(SEED)
    # One thread: the products are small, and barriers between threads cost more than they gain
    # as soon as anything else runs on the machine.
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(work / "tokenizer.json")
    network = Network(Shape(vocabulary=tokenizer.get_vocab_size()))
    average = {name: value.clone() for name, value in network.state_dict().items()}
    matrices = [each for each in network.parameters() if each.ndim > 1]
    vectors = [each for each in network.parameters() if each.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    checkpoint = work / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["steps"] == steps:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            average, step = saved["average"], saved["step"]
            torch.set_rng_state(saved["random"])
            print(f"train: resuming at step {step}", flush=True)
    half = faster_in_half()
    print(f"train: {parameters(network)} parameters, {'bfloat16' if half else 'float32'} products", flush=True)
    started, first, saved_at, running = time.monotonic(), step, time.monotonic(), 0.0
    while step < steps:
        network.train()
        for batch in batches(step // CHUNK_STEPS, tokenizer):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(network, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            decay = min(EMA, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in network.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
            running += (loss.item() - running) * (1 if running == 0 else 0.02)
        spent = time.monotonic() - started
        left = spent / (step - first) * (steps - step)
        print(f"train: step {step}/{steps} loss {running:.4f} {spent:.0f} s, about {left:.0f} s left", flush=True)
        if time.monotonic() - saved_at > 120 or step >= steps:
            _save(checkpoint, {
                "network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
                "step": step, "steps": steps, "random": torch.get_rng_state(),
            })  # fmt: skip
            saved_at = time.monotonic()
    _save(work / "weights.pt", average)


def parameters(network: Any) -> int:
    return sum(each.numel() for each in network.parameters())


def faster_in_half() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32; many can only emulate it."""
    spent: list[float] = []
    for kind in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=kind), torch.ones(256, 768, dtype=kind)
        a @ b
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        spent.append(time.perf_counter() - started)
    return spent[1] < spent[0]


def _save(path: Path, values: Any) -> None:
    """Replace in one step: an interrupted save leaves the previous checkpoint."""
    partial = path.with_suffix(".partial")
    torch.save(values, partial)
    partial.replace(path)
