"""Load for a server that speaks the OpenAI interface: traces, a client that looks at the clock, statistics."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS = ("rain", "hill", "stone", "river", "light", "sand", "cold", "tree", "salt", "iron", "tone", "lane")


class LoadError(Exception):
    """A server answered something that is no measurement."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation. Seconds from its request; `begin` on this process's clock."""

    begin: float
    first: float
    last: float
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of a trace: when it is sent, in seconds from the beginning."""

    at: float
    prompt: str
    tokens: int


Address = Path | tuple[str, int]
"""A unix socket, or a host and port."""


def words(seed: int, count: int) -> str:
    """Text of so many words that no other seed begins with."""
    rng = random.Random(seed)
    return f"{seed} " + " ".join(rng.choice(_WORDS) for _ in range(count))


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the closest ranks; `share` from 0 to 1."""
    if not values or not 0 <= share <= 1:
        raise ValueError("a percentile of nothing, or outside of 0 to 1")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def poisson(seed: int, count: int, per_s: float, prompt_words: int, tokens: int) -> list[Ask]:
    """Requests that come independently of each other, `per_s` a second on average, each with a prompt of its own."""
    if per_s <= 0:
        raise ValueError("a rate is above 0")
    rng = random.Random(seed)
    at, out = 0.0, []
    for index in range(count):
        at += rng.expovariate(per_s)
        out.append(
            Ask(at, words(seed * 100_003 + index, max(1, round(prompt_words * rng.uniform(0.25, 1.75)))), tokens)
        )
    return out


def conversations(seed: int, people: int, turns: int, shared_words: int, said_words: int, tokens: int) -> list[Ask]:
    """Conversations that begin with one of two long texts and come back in random order, one request at a time.

    A turn repeats all that was said before. `at` is 0: the next is sent when the last has ended.
    """
    rng = random.Random(seed)
    texts = [words(seed * 7 + each, shared_words) for each in range(2)]
    said = [f"{texts[each % 2]}\n" for each in range(people)]
    order = [each for each in range(people) for _ in range(turns)]
    rng.shuffle(order)
    out = []
    for number, each in enumerate(order):
        said[each] += f"{words(seed * 1009 + number, said_words)}\n"
        out.append(Ask(0.0, said[each], tokens))
    return out


async def ask(address: Address, model: str, prompt: str, tokens: int, timeout_s: float = 600) -> Answer:
    """One streamed completion over a connection of its own.

    Raises:
        LoadError: anything but a whole stream of `tokens` tokens.
    """
    body = json.dumps(
        {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(address, Path):
                reader, writer = await asyncio.open_unix_connection(str(address))
            else:
                reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(head.encode() + body)
                received, first = bytearray(), 0.0
                while piece := await reader.read(65536):
                    received += piece
                    # Comments and headers are no token.
                    if not first and b"\ndata: " in received:
                        first = time.perf_counter() - begin
                    if b"data: [DONE]" in received[-64 - len(piece) :]:
                        break
                last = time.perf_counter() - begin
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise LoadError(f"no answer: {error!r}") from error
    usage = usage_of(bytes(received))
    if usage["completion_tokens"] != tokens:
        raise LoadError(f"{usage['completion_tokens']} tokens came instead of {tokens}")
    return Answer(begin, first, last, tokens, int(usage["prompt_tokens"]))


def usage_of(stream: bytes) -> dict[str, Any]:
    """The usage that a streamed answer ends with.

    Raises:
        LoadError: the stream broke off, is an error, or has none.
    """
    found: dict[str, Any] | None = None
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            try:
                event = json.loads(line[6:])
            except ValueError as error:
                raise LoadError(f"not JSON: {line[:200]!r}") from error
            if isinstance(event.get("usage"), dict):
                found = event["usage"]
    if found is None or b"data: [DONE]" not in stream:
        status = stream.partition(b"\r\n")[0][:80]
        raise LoadError(f"no whole answer ({status.decode(errors='replace')} ): {stream[-300:]!r}")
    try:
        return found | {name: int(found[name]) for name in ("completion_tokens", "prompt_tokens")}
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"usage without token counts: {found!r}") from error


async def together(address: Address, model: str, prompts: Sequence[str], tokens: int) -> list[Answer]:
    """All at once."""
    return list(await asyncio.gather(*(ask(address, model, each, tokens) for each in prompts)))


async def replay(address: Address, model: str, trace: Sequence[Ask]) -> list[Answer]:
    """Send a trace by its clock."""
    begin = time.perf_counter()

    async def one(each: Ask) -> Answer:
        await asyncio.sleep(begin + each.at - time.perf_counter())
        return await ask(address, model, each.prompt, each.tokens)

    return list(await asyncio.gather(*(one(each) for each in trace)))


async def one_by_one(address: Address, model: str, trace: Sequence[Ask]) -> list[Answer]:
    return [await ask(address, model, each.prompt, each.tokens) for each in trace]


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of all streams, from the first one's first token to the last one's end.

    Of several streams this also counts the reading of later prompts: see `rate_between`.
    """
    begin = min(each.begin + each.first for each in answers)
    return sum(each.tokens - 1 for each in answers) / (_end(answers) - begin)


def rate_between(short: Sequence[Answer], long: Sequence[Answer]) -> float:
    """Tokens per second that the longer answers to prompts of equal length took beyond the short ones.

    What both have, reading the prompts in whatever order, cancels out: a server that lets the first stream write while
    it reads for the next is not worse for it.
    """
    more = sum(each.tokens for each in long) - sum(each.tokens for each in short)
    return more / (_took(long) - _took(short))


def _took(answers: Sequence[Answer]) -> float:
    return _end(answers) - min(each.begin for each in answers)


def _end(answers: Sequence[Answer]) -> float:
    return max(each.begin + each.last for each in answers)
