"""Serving for long: 64 clients, 10,000 requests, at least 30 minutes, through the whole product.

    tests/overlay bench soak [--requests N] [--clients N] [--minutes M] [--json]

Claims: no request fails, resident memory of the daemon and its worker grows by at most 2 % after the first tenth, and
no descriptor is left over. Requests are spread over the time; a client that is told to wait (429) tries again, which is
no failure: there are more clients than places.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from bench._load import LoadError, ask, words
from bench._servers import Server, children, memory_of, model_file, ours
from bench.harness import Row, arguments, limit, note, report

GROWTH = 0.02
_RETRY_S = 0.5
_TRIES = 600


def descriptors(pid: int) -> int:
    """Open descriptors of a process and its children."""
    return sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in (pid, *children(pid)))


async def one(server: Server, number: int) -> int:
    """Returns how often it was told to wait."""
    for refused in range(_TRIES):
        try:
            await ask(server.address, server.model, words(number, 3 + number % 60), 4 + number % 24)
            return refused
        except LoadError as error:
            if " 429 " not in str(error):
                raise
            await asyncio.sleep(_RETRY_S)
    raise LoadError("told to wait all the time")


async def run(server: Server, requests: int, clients: int, seconds: float) -> tuple[int, list[int], list[str]]:
    """All requests. Returns how often somebody was told to wait, samples of resident bytes, and failures."""
    numbers = iter(range(requests))
    begin = time.monotonic()
    waited, resident, failures, ended = 0, list[int](), list[str](), 0

    async def client() -> None:
        nonlocal waited, ended
        for number in numbers:
            await asyncio.sleep(begin + seconds * number / requests - time.monotonic())
            try:
                waited += await one(server, number)
            except LoadError as error:
                failures.append(f"request {number}: {error}")
            ended += 1
            if ended % max(1, requests // 100) == 0:
                resident.append(memory_of(server.pid, "VmRSS"))

    await asyncio.gather(*(client() for _ in range(clients)))
    return waited, resident, failures


def growth(resident: list[int]) -> float:
    """Of the last tenth over the second tenth, as a share: in the first, caches are still being touched."""
    if len(resident) < 3:
        raise ValueError("at least three samples")
    tenth = max(1, len(resident) // 10)
    early, late = resident[tenth : 2 * tenth], resident[-tenth:]
    return sum(late) / len(late) / (sum(early) / len(early)) - 1


def measure(requests: int, clients: int, seconds: float, shape: str) -> list[Row]:
    from ai_assistant.engines.native import default_threads

    with ours(model_file(shape, "F32" if shape == "tiny" else "Q4_0"), 8, default_threads()) as server:
        asyncio.run(one(server, 10**6))
        before = descriptors(server.pid)
        waited, resident, failures = asyncio.run(run(server, requests, clients, seconds))
        left = before
        for _ in range(50):  # the server may still be closing the last connections
            left = descriptors(server.pid)
            if left <= before:
                break
            time.sleep(0.1)
    for each in failures[:10]:
        note(f"soak: {each}")
    note(f"soak: told to wait {waited} times; resident at the end {resident[-1] / 1e6:.0f} MB")
    return [
        _none(f"failures of {requests} requests", len(failures)),
        limit("growth of resident memory (share)", growth(resident), GROWTH, ""),
        _none("descriptors left over", max(0, left - before)),
    ]


def _none(claim: str, value: int) -> Row:
    return Row(claim, value, 0, value, value, value, "0", value == 0)


def main() -> int:
    parser = arguments(__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30.0, help="least time that the requests are spread over")
    parser.add_argument("--shape", default="tiny", help="model (default tiny: what is tested is what lies around it)")
    chosen = parser.parse_args()
    return report(measure(chosen.requests, chosen.clients, chosen.minutes * 60, chosen.shape), as_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
