"""org.ai_assistant1.Inference: answers over the bus; long ones as a stream on a descriptor."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from dbus_fast import Variant

from ai_assistant.daemon.authority import Authority
from ai_assistant.daemon.bus.model import no_options
from ai_assistant.daemon.contract import Scope
from ai_assistant.daemon.service import DaemonService
from ai_assistant.engines.contract import Chunk, Finished, GenerateRequest
from ai_assistant.engines.hetero import PARAM, Wish
from ai_assistant.errors import Busy, InternalError, InvalidArgument
from ai_assistant.services.connection import Call, Outgoing
from ai_assistant.services.values import plain, variants

log = logging.getLogger(__name__)

INTERFACE = "org.ai_assistant1.Inference"
MAX_TEXTS = 2048
MAX_VECTOR_BYTES = 16 << 20
STALL_S = 60.0
_JSON_OPTIONS = {"messages": list, "tools": list, "response_schema": dict}
_FLOATS = frozenset({"temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"})


class Inference:
    def __init__(self, service: DaemonService, authority: Authority) -> None:
        self._service = service
        self._authority = authority
        self._streams: Counter[int] = Counter()
        self._pumps: set[asyncio.Task[None]] = set()

    def properties(self) -> Mapping[str, Any]:
        return {}

    async def generate(
        self, call: Call, model: str, prompt: str, options: Mapping[str, Variant]
    ) -> tuple[str, dict[str, Variant]]:
        uid = await self._authority.require(call, Scope.INFER)
        template = self._service.registry.get(model, uid).info.has_chat_template
        request = parse_options(prompt, plain(options), chat_default=template)
        texts: list[str] = []
        async with aclosing(self._service.generate(model, request)) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    texts.append(event.text)
                elif isinstance(event, Finished):
                    return "".join(texts).replace("\0", "\ufffd"), usage(event)
        raise InternalError("the generation ended without a result")

    async def open_stream(self, call: Call, request: str) -> Outgoing:
        # Only needed here, and it is not small.
        from ai_assistant.daemon.api.jsonbody import parse_object
        from ai_assistant.daemon.api.openai import numbered, parse_chat

        uid = await self._authority.require(call, Scope.INFER)
        body = parse_object(request.encode("utf-8", "replace"))
        name, parsed, options = parse_chat(body | {"stream": True})
        if self._streams[uid] >= self._service.config.limits_streams_per_caller:
            raise Busy("too many open streams", hint="close one of them")
        self._streams[uid] += 1
        events = numbered(lambda each: self._service.generate(name, each, options.keep_alive_s), parsed, options.n)
        try:
            # What is wrong with the request is known by the first event, and then it is an error of this call.
            first = await anext(events)
            ours, theirs = socket.socketpair()
        except StopAsyncIteration:
            self._released(uid)
            raise InternalError("the generation ended without a result") from None
        except BaseException:
            self._released(uid)
            await events.aclose()
            raise
        task = asyncio.get_running_loop().create_task(self._pump(ours, name, events, first, options))
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)
        task.add_done_callback(lambda done: self._released(uid))
        return Outgoing(theirs.detach())

    async def embed(self, call: Call, model: str, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        await self._authority.require(call, Scope.INFER)
        return await self._embed(model, texts, None)

    async def embed_with(
        self, call: Call, model: str, texts: Sequence[str], options: Mapping[str, Variant]
    ) -> tuple[list[list[float]], dict[str, Variant]]:
        await self._authority.require(call, Scope.INFER)
        values = plain(options)
        wish = Wish.of(values.pop(PARAM, None))
        no_options(values)
        vectors, tokens = await self._embed(model, texts, wish)
        return vectors, variants({"tokens": tokens, "devices": None if wish is None else list(wish.devices)})

    async def _embed(self, model: str, texts: Sequence[str], wish: Wish | None) -> tuple[list[list[float]], int]:
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise InvalidArgument(f"texts takes 1 to {MAX_TEXTS} entries", param="texts")
        vectors, tokens = await self._service.embed(model, list(texts), wish=wish)
        if sum(map(len, vectors)) * 8 > MAX_VECTOR_BYTES:
            raise InvalidArgument("the vectors are too large for one reply", hint="send fewer texts", param="texts")
        return vectors, tokens

    def _released(self, uid: int) -> None:
        self._streams[uid] -= 1
        if self._streams[uid] <= 0:
            del self._streams[uid]

    async def _pump(
        self, ours: socket.socket, model: str, events: AsyncGenerator[Any], first: Any, options: Any
    ) -> None:
        """Write the stream; the reader's going away ends it at once, its stalling after `STALL_S`."""
        from ai_assistant.daemon.api.openai import sse

        reader, writer = await asyncio.open_connection(sock=ours)
        body = asyncio.current_task()
        assert body is not None

        async def watch() -> None:
            while await reader.read(4096):
                pass
            body.cancel()

        watcher = asyncio.get_running_loop().create_task(watch())
        try:
            async with aclosing(sse(model, events, options, first=first)) as pieces:
                async for piece in pieces:
                    writer.write(piece)
                    async with asyncio.timeout(STALL_S):
                        await writer.drain()
            async with asyncio.timeout(STALL_S):
                await _flushed(writer)
        except (ConnectionError, TimeoutError):
            log.info("the reader of a stream has gone or does not read")
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            watcher.cancel()
            await events.aclose()
            writer.close()


async def _flushed(writer: asyncio.StreamWriter) -> None:
    """Wait until everything is with the kernel: closing earlier would cut a slow reader off."""
    writer.transport.set_write_buffer_limits(0)
    await writer.drain()


def parse_options(prompt: str, options: Mapping[str, Any], *, chat_default: bool) -> GenerateRequest:
    """The options of Generate as a request.

    Raises:
        InvalidArgument: with the option's name.
    """
    values = dict(options)
    chat = values.pop("chat", None)
    if chat is not None and not isinstance(chat, bool):
        raise InvalidArgument("chat must be a boolean", param="chat")
    for name, kind in _JSON_OPTIONS.items():
        if isinstance(values.get(name), str):
            values[name] = _json(name, values[name], kind)
    for name in _FLOATS & values.keys():
        if isinstance(values[name], int) and not isinstance(values[name], bool):
            values[name] = float(values[name])
    if "prompt" in values:
        raise InvalidArgument("the prompt is an argument of its own", param="prompt")
    if "messages" in values:
        if prompt or chat is False:
            raise InvalidArgument("give either a prompt or messages", param="messages")
    elif chat or (chat is None and chat_default):
        values["messages"] = [{"role": "user", "content": prompt}]
    else:
        values["prompt"] = prompt
    return GenerateRequest.from_dict(values)


def _json(name: str, text: str, kind: type) -> Any:
    from ai_assistant.daemon.api.jsonbody import parse_object

    # The parser takes objects, so that its limits and messages are the same for a list.
    value = parse_object(b'{"value":' + text.encode("utf-8", "replace") + b"}").get("value")
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} must be a JSON {'list' if kind is list else 'object'}", param=name)
    return value


def usage(event: Finished) -> dict[str, Variant]:
    """The second half of a Generate reply."""
    found = event.usage
    values: dict[str, Any] = {
        "finish_reason": str(event.reason),
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "cached_tokens": found.cached_tokens,
        "queue_s": float(found.queue_s),
        "prefill_s": float(found.prefill_s),
        "decode_s": float(found.decode_s),
        "energy_j": found.energy_j,
    }
    if found.devices:
        values["devices"] = list(found.devices)
    if event.tool_calls:
        calls = [{"name": each.name, "arguments": each.arguments} for each in event.tool_calls]
        values["tool_calls"] = json.dumps(calls, ensure_ascii=False)
    return variants(values)
