"""One exchange of the socket API, with messages that the test plays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Message

from ai_assistant.daemon.api.exchange import DRAIN_BYTES, Exchange, Held
from ai_assistant.daemon.api.limits import Limits
from ai_assistant.daemon.contract import Peer, caller
from ai_assistant.errors import InvalidArgument


class Client:
    """Sends pieces of a body when it is asked for them, and keeps what is answered."""

    def __init__(self, *pieces: bytes, headers: dict[str, str] | None = None, delay_s: float = 0.0) -> None:
        self.left = list(pieces)
        self.delay_s = delay_s
        self.order: list[str] = []
        given = {"content-length": str(sum(map(len, pieces)))} if headers is None else headers
        self.scope = {
            "type": "http",
            "method": "POST",
            "headers": [(key.encode(), value.encode()) for key, value in given.items()],
            "state": {"peer": Peer(1000, 1000, frozenset())},
        }

    async def receive(self) -> Message:
        await asyncio.sleep(self.delay_s)
        self.order.append("read")
        piece = self.left.pop(0) if self.left else b""
        return {"type": "http.request", "body": piece, "more_body": bool(self.left)}

    async def send(self, message: Any) -> None:
        self.order.append(message["type"])

    def exchange(self, held: Held | None = None) -> Exchange:
        return Exchange(self.scope, self.receive, self.send, Limits(), held or Held(1000))


async def test_a_body_is_held_only_until_it_is_parsed() -> None:
    held = Held(1000)
    assert await Client(b'{"a":', b"1}").exchange(held).json() == {"a": 1}
    assert held.now == 0
    with pytest.raises(InvalidArgument):
        await Client(b"not json").exchange(held).json()
    assert held.now == 0


async def test_a_small_body_is_read_before_a_refusal() -> None:
    client = Client(b"x" * 1000, b"y" * 1000)
    await client.exchange().respond(Response(b"no", 403))
    assert client.order == ["read", "read", "http.response.start", "http.response.body"]


@pytest.mark.parametrize(
    "headers", [{}, {"content-length": str(DRAIN_BYTES + 1)}, {"content-length": "5", "expect": "100-continue"}]
)
async def test_nothing_is_read_where_nothing_small_comes(headers: dict[str, str]) -> None:
    client = Client(b"x" * 5, headers=headers)
    await client.exchange().respond(Response(b"no", 403))
    assert "read" not in client.order


async def test_a_body_without_end_is_not_read_to_its_end() -> None:
    client = Client(*[b"x" * 10_000] * 100, headers={"transfer-encoding": "chunked"})
    await client.exchange().respond(Response(b"no", 403))
    assert client.order.count("read") == 7


async def test_what_was_read_is_not_read_again() -> None:
    client = Client(b"{}")
    exchange = client.exchange()
    await exchange.json()
    await exchange.respond(Response(b"yes"))
    assert client.order.count("read") == 1


async def test_the_service_hears_who_asks() -> None:
    Client().exchange()
    assert caller.get() == 1000
    stranger = Client()
    stranger.scope["state"] = {}
    stranger.exchange()
    assert caller.get() == -1
    caller.set(None)
