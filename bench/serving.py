"""Serving, against llama-server from the same source: same weights, same plug-ins, same threads.

Ours is the whole way through the product: HTTP on the unix socket, the daemon's service, a worker, the engine.

    tests/overlay bench serving [--only decode,prefill,...] [--shape 0.5B,1B] [--pairs N] [--tiny] [--json]

| part | claim |
|---|---|
| decode, prefill | ≥ 1.00 × in tokens per second: at 1, 4, 8 and 16 streams; of a prompt |
| poisson | p95 of the time to the first token under a Poisson load ≤ 1.00 × |
| trace | mean time to the first token ≤ 1 / 1.5 × with shared prefixes and returning conversations |
| variants | the plug-in that is picked ≥ 1.00 × baseline x86-64 and AVX2 |
| overhead | ≤ 60 µs per token and step outside native code, with a vocabulary of 32 k |
| api | the API's process ≤ 8 % of one core at 200 tokens/s |
| memory | ≤ 1.00 × llama-server's memory beyond the weights, with eight sequences of mixed length |
| transformers | ≤ 0.60 × that of Hugging Face transformers; only when asked for: fetches 200 MB, takes 2 GB |
| seven | 7 B-shaped: loads, estimate within 5 %; speed and its share of the bandwidth |

In `trace` and `memory` llama-server has its default settings (and 8 slots in `memory`), elsewhere room for as many
sequences of the same context as ours. `_sizes.py` chooses how much each part does, so that all of it ends within 70
minutes on two cores once the models are made. Each part that has ended is a line in build/bench-serving.jsonl, and is
not run again by `--resume`; one that fails is told with the side and its log, and the others go on. `--tiny` is a trial
of the bench itself with a tiny model: its figures mean nothing and are kept nowhere.
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
from typing import TypeVar

from bench import _engine, harness
from bench._load import (
    Answer,
    LoadError,
    conversations,
    decode_rate,
    one_by_one,
    percentile,
    poisson,
    rate_between,
    replay,
    together,
    words,
)
from bench._records import PATH, Record, append, done, machine
from bench._servers import (
    CONTEXT,
    SHAPES,
    Server,
    cache,
    children,
    cpu_s,
    like_ours,
    llama_server,
    memory_of,
    model_file,
    ours,
)
from bench._sizes import (
    MIXED_TOKENS,
    MIXED_WORDS,
    SEVEN_CONTEXT,
    SEVEN_WORDS,
    SIZES,
    STREAMS,
    TRACE_TOKENS,
    Sizes,
    expected_s,
)
from bench.harness import Row, arguments, at_least, at_most, limit, note, report

T = TypeVar("T")

API_SHARE, API_RATE = 0.08, 200.0
OVERHEAD_US = 60.0
LEAST_PAIRS = 5
_BEFORE = 8
"""Tokens per stream of the answers that the decoding of longer ones is counted from."""
_ASIDE = 512 << 20
"""Bytes for states of idle conversations; the peer's default is 8 GiB."""
_TRACE_GOAL = 1 / 1.5
_TRANSFORMERS_GOAL = 0.6
_SHORT = 512
"""Tokens per sequence where many run: two servers with caches of whole contexts would not fit small machines."""


class PartError(Exception):
    """A part did not end; the message names the side and its log."""


@dataclass(frozen=True, slots=True)
class Plan:
    shape: str
    pairs: int
    """0: what the sizes say."""
    threads: int
    tiny: bool

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.shape]

    @property
    def few(self) -> int:
        """Pairs of parts whose samples take long."""
        return self.pairs or self.sizes.pairs

    @property
    def many(self) -> int:
        return self.pairs or self.sizes.cheap_pairs

    def less(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


Sides = tuple[Server, Server]


def _sides(
    stack: ExitStack,
    plan: Plan,
    sequences: int,
    context: int,
    settings: tuple[str, ...] | None = None,
    aside_bytes: int = 0,
) -> Sides:
    """Both, with room for as many sequences of that context, unless the peer gets settings of its own."""
    path = model_file(plan.shape)
    chosen = like_ours(sequences, context) if settings is None else settings
    return (
        stack.enter_context(ours(path, sequences, plan.threads, context, aside_bytes)),
        stack.enter_context(llama_server(path, chosen, plan.threads)),
    )


def _asked(side: Server, what: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except (LoadError, OSError) as error:
        raise PartError(f"{what}: {side.name} failed: {error}; its log: {side.log}") from error


def in_turn(what: str, mine: Callable[[int], T], theirs: Callable[[int], T], count: int) -> tuple[list[T], list[T]]:
    """`harness.pairs` for samples that take long: says how far it is."""
    begin, ended = time.monotonic(), 0

    def told(sample: Callable[[int], T]) -> Callable[[int], T]:
        def one(index: int) -> T:
            nonlocal ended
            found = sample(index)
            ended += 1
            if ended % 2 == 0:
                note(f"serving:   {what}: pair {ended // 2} of {count}, {time.monotonic() - begin:.0f} s")
            return found

        return one

    return harness.pairs(told(mine), told(theirs), count, least=LEAST_PAIRS)


def _compare(
    what: str, sides: Sides, sample: Callable[[Server, int], float], count: int
) -> tuple[list[float], list[float]]:
    def one(side: Server, index: int) -> float:
        return _asked(side, what, lambda: sample(side, index))

    def warm_up(side: Server) -> None:
        _asked(side, what, lambda: asyncio.run(together(side.address, side.model, [words(10**6, 4)], 4)))

    mine, theirs = sides
    for each in sides:
        warm_up(each)
    return in_turn(what, lambda index: one(mine, index), lambda index: one(theirs, index), count)


def decode(plan: Plan) -> list[Row]:
    rows = []
    chosen = list(zip(STREAMS, plan.sizes.decode_tokens, strict=True))
    for streams, tokens in chosen[: plan.less(4, 2)]:
        with ExitStack() as stack:
            sides = _sides(stack, plan, streams, _SHORT)

            def sample(side: Server, index: int, streams: int = streams, tokens: int = tokens) -> float:
                def answers(first: int, most: int) -> list[Answer]:
                    prompts = [words(first + each, 8) for each in range(streams)]
                    return asyncio.run(together(side.address, side.model, prompts, most))

                return rate_between(answers(2000 * index, _BEFORE), answers(2000 * index + 1000, _BEFORE + tokens))

            what = f"decode, {streams} streams"
            rows.append(at_least(f"{what} (tok/s)", *_compare(what, sides, sample, plan.many)))
    return rows


def prefill(plan: Plan) -> list[Row]:
    with ExitStack() as stack:
        sides = _sides(stack, plan, 1, CONTEXT)

        def sample(side: Server, index: int) -> float:
            prompt = words(index, plan.sizes.prefill_words)
            found = asyncio.run(together(side.address, side.model, [prompt], 2))[0]
            return found.prompt_tokens / found.first

        return [at_least("prefill of one prompt (tok/s)", *_compare("prefill", sides, sample, plan.many))]


def poisson_load(plan: Plan) -> list[Row]:
    with ExitStack() as stack:
        sides = _sides(stack, plan, 8, _SHORT)
        sizes = plan.sizes
        count, size, tokens = sizes.arrivals, sizes.arrival_words, sizes.arrival_tokens
        # The load is the same for both, at half of what the peer answers one after the other.
        peer, trial = sides[1], 6

        def serial(seed: int) -> float:
            begin = time.perf_counter()
            asyncio.run(one_by_one(peer.address, peer.model, poisson(seed, trial, 1, size, tokens)))
            return time.perf_counter() - begin

        _asked(peer, "poisson", lambda: serial(8_000_001))
        rate = trial / 2 / _asked(peer, "poisson", lambda: serial(9_000_001))

        def sample(side: Server, index: int) -> float:
            answers = asyncio.run(replay(side.address, side.model, poisson(index, count, rate, size, tokens)))
            return percentile([each.first for each in answers], 0.95)

        found = _compare("poisson", sides, sample, plan.few)
        return [at_most(f"p95 TTFT, Poisson, {rate:.2f}/s (s)", *found, 1.0)]


def trace(plan: Plan) -> list[Row]:
    """More conversations than sequences, so that most come back after somebody else had their place."""
    with ExitStack() as stack:
        # Both choose their contexts: the peer four slots that share one cache of the model's 2048 tokens, ours four
        # sequences of as many.
        sides = _sides(stack, plan, 4, 0, (), _ASIDE)
        sizes = plan.sizes

        def sample(side: Server, index: int) -> float:
            asks = conversations(index, sizes.people, sizes.turns, sizes.shared_words, sizes.said_words, TRACE_TOKENS)
            found: list[Answer] = asyncio.run(one_by_one(side.address, side.model, asks))
            return mean(each.first for each in found)

        found = _compare("trace", sides, sample, plan.few)
        return [at_most("mean TTFT, returning conversations (s)", *found, _TRACE_GOAL)]


def variants(plan: Plan) -> list[Row]:
    path, rows = model_file(plan.shape), []
    size, tokens = plan.sizes.variant_words, plan.sizes.variant_tokens
    for name, plugin in (("baseline x86-64", "x64"), ("AVX2", "haswell")):
        best, other = in_turn(
            f"against {name}",
            lambda _index: _engine.variant(path, None, plan.threads, size, tokens),
            lambda _index, plugin=plugin: _engine.variant(path, plugin, plan.threads, size, tokens),  # type: ignore[misc]
            plan.few,
        )
        for part, what in enumerate(("prefill", "decode")):
            rows.append(
                at_least(f"{what}, picked against {name} (tok/s)", [e[part] for e in best], [e[part] for e in other])
            )
    return rows


def overhead(plan: Plan) -> list[Row]:
    found = _engine.overhead(model_file("tiny", "F32"), plan.less(300, 20))
    return [
        limit(f"outside native code, per token and step, {name} (µs)", each, OVERHEAD_US, "µs")
        for name, each in found.items()
    ]


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


def mixed() -> list[str]:
    return [words(number, count) for number, count in enumerate(MIXED_WORDS)]


def _our_memory(server: Server) -> float:
    """MB beyond the weights after the mixed prompts: F16, which nobody repacks, so what is anonymous is all else."""
    _asked(server, "memory", lambda: asyncio.run(together(server.address, server.model, mixed(), MIXED_TOKENS)))
    note(f"serving:   {server.name}: whole resident set {memory_of(server.pid, 'VmRSS') / 1e6:.0f} MB")
    return memory_of(server.pid, "RssAnon", "RssShmem") / 1e6


def memory(plan: Plan) -> list[Row]:
    path = model_file(plan.shape, "F16")
    # One after the other: two copies of what is resident would not fit small machines. Both choose their contexts.
    with ours(path, 8, plan.threads, 0) as server:
        mine = _our_memory(server)
    with llama_server(path, ("-np", "8"), plan.threads) as server:
        theirs = _our_memory(server)
    return [at_most("memory beyond the weights, 8 sequences (MB)", [mine], [theirs], 1.0)]


def transformers(plan: Plan) -> list[Row]:
    shape = "tiny" if plan.tiny else "0.5B"
    path = model_file(shape, "F16")
    prompts = _engine.tokens_of(path, mixed())
    with ours(path, 8, plan.threads, 0) as server:
        mine = _our_memory(server)
    folder = cache() / f"random-{shape}-transformers-v1"
    found = _engine.transformers(folder, SHAPES[shape], prompts, MIXED_TOKENS, plan.threads)
    note(f"serving:   transformers: whole resident set {found['whole'] / 1e6:.0f} MB")
    other = found["beyond"] / 1e6
    claim = "memory beyond the weights, 8 sequences, against transformers (MB)"
    return [at_most(claim, [mine], [other], _TRANSFORMERS_GOAL)]


def seven(plan: Plan) -> list[Row]:
    path = model_file("tiny" if plan.tiny else "7B")
    estimated = _engine.estimate(path, 1, plan.threads, SEVEN_CONTEXT)
    with ours(path, 1, plan.threads, SEVEN_CONTEXT) as server:
        # The estimate is of a full cache, and memory is taken as the cache fills.
        prompt = words(1, plan.less(SEVEN_WORDS, 8))
        found = asyncio.run(together(server.address, server.model, [prompt], plan.less(32, 4)))
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
    "overhead": overhead, "api": api, "memory": memory, "transformers": transformers, "seven": seven,
}  # fmt: skip
ONCE = ("overhead", "api", "transformers", "seven")
"""Parts that do not depend on the shape."""
BY_NAME = ("transformers",)
"""Parts that are run only when they are asked for."""
DEFAULT = tuple(each for each in PARTS if each not in BY_NAME)


def chosen_parts(text: str) -> list[str]:
    """In the order of `PARTS`; those of `DEFAULT` if there are none. Raises argparse's error for an unknown one."""
    wanted = [each.strip() for each in text.split(",") if each.strip()]
    for each in wanted:
        if each not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {each!r}; there are {', '.join(PARTS)}")
    return [each for each in PARTS if each in wanted] if wanted else list(DEFAULT)


def main() -> int:
    from ai_assistant.engines.native import default_threads

    parser = arguments(__doc__.partition("\n")[0] if __doc__ else "", default_pairs=0)
    parser.add_argument("--only", type=chosen_parts, default=list(DEFAULT), help="parts, with commas between")
    parser.add_argument("--shape", default="0.5B,1B", help="models, with commas between (default 0.5B,1B)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of both sides (default: one per core)")
    parser.add_argument("--resume", action="store_true", help="leave out what build/ has already")
    parser.add_argument("--tiny", action="store_true", help="try the bench itself with a tiny model")
    chosen = parser.parse_args()
    if chosen.pairs and chosen.pairs < LEAST_PAIRS:
        parser.error(f"at least {LEAST_PAIRS} pairs; 0: as many as there is time for")
    shapes = ["tiny"] if chosen.tiny else [each.strip() for each in chosen.shape.split(",")]
    for each in shapes:
        if each not in SIZES:
            parser.error(f"there is no shape {each!r}; there are {', '.join(SIZES)}")
    known = done(PATH) if chosen.resume and not chosen.tiny else {}
    todo = [(name, shape) for name in chosen.only for shape in (shapes if name not in ONCE else ["-"])]
    left = sum(_expected(chosen, *each) for each in todo if each not in known)
    for name in set(BY_NAME) - set(chosen.only):
        note(f"serving: {name} is left out; ask for it: --only {name}")
    rows: list[Row] = []
    failed = False
    for name, shape in todo:
        if (name, shape) in known:
            rows += known[name, shape].rows
            continue
        takes = _expected(chosen, name, shape)
        note(f"serving: {name} {shape}: about {takes / 60:.1f} of {left / 60:.0f} minutes that are left")
        left -= takes
        try:
            found = PARTS[name](Plan(shape, chosen.pairs, chosen.threads, chosen.tiny))
        except (PartError, SystemExit) as error:
            # An hour's other parts are worth having.
            note(f"serving: {name} {shape} failed: {error}")
            failed = True
            continue
        rows += found
        if not chosen.tiny:
            append(PATH, Record(name, shape, tuple(found), machine()))
    return report(rows, as_json=chosen.json) or int(failed)


def _expected(chosen: argparse.Namespace, name: str, shape: str) -> float:
    if chosen.tiny and name == "seven":
        return 30.0
    return expected_s(name, ("tiny" if chosen.tiny else "0.5B") if shape == "-" else shape, chosen.pairs)


if __name__ == "__main__":
    sys.exit(main())
