"""Serving, against llama-server from the same source: same weights, same plug-ins, same threads.

Ours is the whole way through the product: HTTP on the unix socket, the daemon's service, a worker, the engine.

    tests/overlay bench serving [--only decode,prefill,...] [--shape 0.5B,1B] [--pairs N] [--tiny] [--json]

| part | claim |
|---|---|
| decode, prefill | ≥ 1.00 × in tokens per second: at 1, 4, 8 and 16 streams; of a prompt |
| poisson | p95 of the time to the first token under a Poisson load ≤ 1.00 × |
| trace | mean time to the first token ≤ 1 / 1.5 × with shared prefixes and returning conversations |
| variants | the plug-in that is picked ≥ 1.00 × baseline x86-64 and AVX2 |
| overhead | ≤ 60 µs per token and step outside native decoding, with a vocabulary of 32 k |
| api | the API's process ≤ 8 % of one core at 200 tokens/s |
| memory | ≤ 1.00 × llama-server's memory beyond the weights, with eight sequences of mixed length |
| seven | 7 B-shaped: loads, estimate within 5 %; speed and its share of the bandwidth |

Each part that has ended is a line in build/bench-serving.jsonl, and is not run again by `--resume`. `--tiny` is a
trial of the bench itself with a tiny model: its figures mean nothing and are kept nowhere.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bench import _engine
from bench._load import Answer, conversations, decode_rate, one_by_one, percentile, poisson, replay, together, words
from bench._records import PATH, Record, append, done, machine
from bench._servers import Server, children, cpu_s, llama_server, memory_of, model_file, ours
from bench.harness import Row, arguments, at_least, at_most, limit, note, pairs, report

STREAMS = (1, 4, 8, 16)
API_SHARE, API_RATE = 0.08, 200.0
OVERHEAD_US = 60.0
_TRACE_GOAL = 1 / 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    shape: str
    pairs: int
    threads: int
    tiny: bool

    def less(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


Sides = tuple[Server, Server]


def _sides(stack: ExitStack, plan: Plan, sequences: int, kind: str = "Q4_0") -> Sides:
    path = model_file(plan.shape, kind)
    return (
        stack.enter_context(ours(path, sequences, plan.threads)),
        stack.enter_context(llama_server(path, sequences, plan.threads)),
    )


def _compare(sides: Sides, sample: Callable[[Server, int], float], count: int) -> tuple[list[float], list[float]]:
    for each in sides:
        sample(each, 100_000)
    mine, theirs = sides
    return pairs(lambda index: sample(mine, index), lambda index: sample(theirs, index), count)


def decode(plan: Plan) -> list[Row]:
    rows = []
    tokens = plan.less(96, 8)
    for streams in STREAMS[: plan.less(4, 2)]:
        with ExitStack() as stack:
            sides = _sides(stack, plan, streams)

            def sample(side: Server, index: int, streams: int = streams) -> float:
                prompts = [words(1000 * index + each, 8) for each in range(streams)]
                return decode_rate(asyncio.run(together(side.address, side.model, prompts, tokens)))

            rows.append(at_least(f"decode, {streams} streams (tok/s)", *_compare(sides, sample, plan.pairs)))
    return rows


def prefill(plan: Plan) -> list[Row]:
    with ExitStack() as stack:
        sides = _sides(stack, plan, 1)

        def sample(side: Server, index: int) -> float:
            found = asyncio.run(together(side.address, side.model, [words(index, plan.less(200, 20))], 2))[0]
            return found.prompt_tokens / found.first

        return [at_least("prefill of one prompt (tok/s)", *_compare(sides, sample, plan.pairs))]


def poisson_load(plan: Plan) -> list[Row]:
    with ExitStack() as stack:
        sides = _sides(stack, plan, 8)
        size, tokens = plan.less(40, 5), plan.less(32, 4)
        # The load is the same for both, at half of what the peer answers one after the other.
        peer = sides[1]
        asyncio.run(one_by_one(peer.address, peer.model, poisson(8, 1, 1, 60, tokens)))
        begin = time.perf_counter()
        asyncio.run(one_by_one(peer.address, peer.model, poisson(9, 3, 1, 60, tokens)))
        rate = 1.5 / (time.perf_counter() - begin)

        def sample(side: Server, index: int) -> float:
            answers = asyncio.run(replay(side.address, side.model, poisson(index, size, rate, 60, tokens)))
            return percentile([each.first for each in answers], 0.95)

        return [at_most(f"p95 TTFT, Poisson, {rate:.2f}/s (s)", *_compare(sides, sample, plan.pairs), 1.0)]


def trace(plan: Plan) -> list[Row]:
    """More conversations than sequences, so that most come back after somebody else had their place."""
    with ExitStack() as stack:
        sides = _sides(stack, plan, 4)

        def sample(side: Server, index: int) -> float:
            asks = conversations(index, plan.less(12, 3), plan.less(4, 2), plan.less(120, 20), 12, 4)
            found: list[Answer] = asyncio.run(one_by_one(side.address, side.model, asks))
            return mean(each.first for each in found)

        return [at_most("mean TTFT, returning conversations (s)", *_compare(sides, sample, plan.pairs), _TRACE_GOAL)]


def variants(plan: Plan) -> list[Row]:
    path, rows = model_file(plan.shape), []
    size, tokens = plan.less(256, 32), plan.less(48, 4)
    for name, plugin in (("baseline x86-64", "x64"), ("AVX2", "haswell")):
        best, other = pairs(
            lambda _index: _engine.variant(path, None, plan.threads, size, tokens),
            lambda _index, plugin=plugin: _engine.variant(path, plugin, plan.threads, size, tokens),  # type: ignore[misc]
            plan.pairs,
        )
        for part, what in enumerate(("prefill", "decode")):
            rows.append(
                at_least(f"{what}, picked against {name} (tok/s)", [e[part] for e in best], [e[part] for e in other])
            )
    return rows


def overhead(plan: Plan) -> list[Row]:
    found = _engine.overhead(model_file("tiny", "F32"), plan.less(400, 20))
    return [limit("outside native decoding, per token and step (µs)", found, OVERHEAD_US, "µs")]


def api(plan: Plan) -> list[Row]:
    with ours(model_file("tiny", "F32"), 4, plan.threads) as server:
        prompts = [words(each, 8) for each in range(4)]
        asyncio.run(together(server.address, server.model, prompts, 8))
        stat = Path(f"/proc/{server.pid}/stat")
        tokens, seconds, used = 0, 0.0, cpu_s(stat.read_text())
        for _ in range(plan.less(10, 2)):
            answers = asyncio.run(together(server.address, server.model, prompts, plan.less(400, 40)))
            tokens += sum(each.tokens for each in answers)
            seconds += max(each.begin + each.last for each in answers) - min(each.begin for each in answers)
        used = cpu_s(stat.read_text()) - used
    if tokens / seconds < API_RATE:
        note(f"serving: only {tokens / seconds:.0f} tokens/s; the share at {API_RATE:.0f} is calculated from that")
    return [limit("API process at 200 tok/s (share of a core)", used / tokens * API_RATE, API_SHARE, "of a core")]


def memory(plan: Plan) -> list[Row]:
    """F16, which nobody repacks: what is anonymous is caches, buffers and the run time."""
    with ExitStack() as stack:
        sides = _sides(stack, plan, 8, "F16")
        taken = []
        for side in sides:
            prompts = [words(each, round(plan.less(200, 20) * (each + 1) / 8)) for each in range(8)]
            asyncio.run(together(side.address, side.model, prompts, plan.less(32, 2)))
            taken.append(memory_of(side.pid, "RssAnon", "RssShmem") / 1e6)
            note(f"serving: whole resident set {memory_of(side.pid, 'VmRSS') / 1e6:.0f} MB")
    return [at_most("memory beyond the weights, 8 sequences (MB)", taken[:1], taken[1:], 1.0)]


def seven(plan: Plan) -> list[Row]:
    path = model_file("tiny" if plan.tiny else "7B")
    estimated = _engine.estimate(path, 1, plan.threads)
    with ours(path, 1, plan.threads) as server:
        found = asyncio.run(together(server.address, server.model, [words(1, 40)], plan.less(32, 4)))
        rate = decode_rate(found)
        used = sum(memory_of(each, "VmRSS") for each in children(server.pid))
    share = rate * path.stat().st_size / _engine.bandwidth()
    return [
        limit("7 B-shaped: estimate off by", abs(estimated / used - 1), 0.05, "of what is used"),
        Row(
            "7 B-shaped: decode (tok/s), ratio: of the bandwidth limit",
            rate,
            rate / share,
            share,
            share,
            share,
            "–",
            True,
        ),
    ]


PARTS: dict[str, Callable[[Plan], list[Row]]] = {
    "decode": decode, "prefill": prefill, "poisson": poisson_load, "trace": trace, "variants": variants,
    "overhead": overhead, "api": api, "memory": memory, "seven": seven,
}  # fmt: skip
ONCE = ("overhead", "api", "seven")
"""Parts that do not depend on the shape."""


def chosen_parts(text: str) -> list[str]:
    """In the order of `PARTS`. Raises argparse's error for an unknown one."""
    wanted = [each.strip() for each in text.split(",") if each.strip()]
    for each in wanted:
        if each not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {each!r}; there are {', '.join(PARTS)}")
    return [each for each in PARTS if each in wanted] if wanted else list(PARTS)


def main() -> int:
    from ai_assistant.engines.native import default_threads

    parser = arguments(__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--only", type=chosen_parts, default=list(PARTS), help="parts, with commas between")
    parser.add_argument("--shape", default="0.5B,1B", help="models, with commas between (default 0.5B,1B)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of both sides (default: one per core)")
    parser.add_argument("--resume", action="store_true", help="leave out what build/ has already")
    parser.add_argument("--tiny", action="store_true", help="try the bench itself with a tiny model")
    chosen = parser.parse_args()
    shapes = ["tiny"] if chosen.tiny else chosen.shape.split(",")
    known = done(PATH) if chosen.resume and not chosen.tiny else {}
    rows: list[Row] = []
    for name in chosen.only:
        for shape in shapes if name not in ONCE else ["-"]:
            if (name, shape) in known:
                rows += known[name, shape].rows
                continue
            note(f"serving: {name} {shape}")
            found = PARTS[name](Plan(shape, chosen.pairs, chosen.threads, chosen.tiny))
            rows += found
            if not chosen.tiny:
                append(PATH, Record(name, shape, tuple(found), machine()))
    return report(rows, as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
