"""The worker's side of the connection: one thread reads, others pump events back.

Every blocking write goes through one lock; a daemon that does not read therefore stops the pumps, the
pumps stop reading their generations, and the engine stops decoding for them. Memory stays bounded
without a queue of its own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from typing import Any

from ai_assistant.daemon.worker.frames import MAX_EVENT, MAX_FILES, FrameReader, ProtocolError, encode, framed
from ai_assistant.daemon.worker.messages import MAX_LABELS
from ai_assistant.daemon.worker.stall import STALL_S, StallTimer
from ai_assistant.engines.contract import (
    Chunk,
    Engine,
    Event,
    GenerateRequest,
    Generation,
    LoadOptions,
    PacedGeneration,
    Placed,
    Placement,
    Supervised,
    event_to_dict,
)
from ai_assistant.engines.hetero import Wish, honour, reader, told
from ai_assistant.errors import AIAssistantError, Busy, Cancelled, InternalError, InvalidArgument

MAX_REQUESTS = 128
_POOL_BEYOND_SEQUENCES = 16
_SIDE_THREADS = 2
"""For embeddings, which the engine makes one after the other, and a tokenisation beside them."""
_CONTROL = ("stats", "trim")
"""Answered while everything else is full or waits."""
_MAX_CONTROL = 16
BROKEN_STATUS = 3
_HEADROOM_BYTES = 512 << 20
"""Beyond the model's memory limit: the interpreter, and stacks, which count as reserved and not as used."""
_RECEIVE = 1 << 18
_PACE_S, _PACE_EACH_S, _PACE_MOST_S = 0.035, 0.005, 0.1
"""Between two writes for one generation, after its first: alone, more for each request that runs, and at most. Each
write wakes the daemon and its client, and with as many decoding threads as cores every wake-up stops a decode step.
Text that comes ten times a second still flows; 25 times is more than anybody sees."""

Open = Callable[[int, LoadOptions, Callable[[float], None], Mapping[str, int]], Engine]
"""(model, options, progress, descriptors of the files that go with it, by name); these stay the caller's."""


class WorkerServer:
    """Serves one connection until it ends.

    Args:
        sock: connected to the daemon.
        open_model: makes the engine from a descriptor.
        stall_s: the process ends when its reader does not run for so long while something is to be done.
    """

    def __init__(self, sock: socket.socket, open_model: Open, *, stall_s: float = STALL_S) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._open_model = open_model
        self._sending = threading.Lock()
        self._engine: Engine | None = None
        self._loading = False
        self._pool = ThreadPoolExecutor(1, "request")
        # Texts of many batches must not keep the threads that pass generations on.
        self._side = ThreadPoolExecutor(_SIDE_THREADS, "side")
        self._control = ThreadPoolExecutor(1, "control")
        self._active: dict[int, _Request] = {}
        self._controls = 0
        self._finished = 0
        self._lock = threading.Lock()
        self._stall = StallTimer(stall_s)

    def serve(self) -> None:
        """Read frames until the daemon closes the connection.

        Raises:
            ProtocolError: the daemon does not speak the protocol.
        """
        reader = FrameReader()
        while True:
            self._await_frame()
            try:
                data, fds, _flags, _address = socket.recv_fds(self._sock, _RECEIVE, MAX_FILES, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError:
                return
            if not data:
                return
            try:
                for message in reader.feed(data):
                    self._handle(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _await_frame(self) -> None:
        """Show that this thread runs, for as long as there is work; without work, wait without waking."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            busy = bool(self._active) or (self._loading and self._engine is None)
            self._stall.keep(busy)
            if poll.poll(self._stall.every_s * 1000 if busy else None):
                return

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        number, op = message.get("id"), message.get("op")
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(op, str):
            raise ProtocolError("a request without id or op")
        try:
            if op == "load":
                self._load(message, fds)
            elif op == "cancel":
                self._cancel(number)
            elif op == "ping" and self._engine is not None:
                self._send({"id": number, "event": "result", "value": self._progress()})
            elif self._engine is None:
                raise InvalidArgument("no model is loaded")
            elif op in self._operations:
                self._accept(number, op, message)
            else:
                raise InvalidArgument(f"the operation {op[:40]!r} is unknown")
        except AIAssistantError as error:
            self._send_error(number, error)

    def _load(self, message: dict[str, Any], fds: list[int]) -> None:
        if self._loading or message["id"] != 0:
            raise InvalidArgument("a worker loads one model only")
        names = _names(message.get("files", ["model"]))
        if len(fds) != len(names):
            raise InvalidArgument(f"a load needs a descriptor for each of its {len(names)} files")
        options = _options(message.get("options"))
        self._loading = True
        limit_memory(options.memory_limit_bytes)
        self._stall.keep(True)
        # Not on this thread, so that the daemon's end is noticed while a large file is read.
        files = dict(zip(names, map(os.dup, fds), strict=True))
        threading.Thread(target=self._load_model, args=(files, options), name="load", daemon=True).start()

    def _load_model(self, files: dict[str, int], options: LoadOptions) -> None:
        def progress(value: float) -> None:
            self._send({"id": 0, "event": "progress", "value": value})

        def placing(placement: Placement) -> None:
            self._send({"id": 0, "event": "placing", "placement": asdict(placement)})

        options = replace(options, extra={**options.extra, "placing": placing})
        try:
            others = {name: fd for name, fd in files.items() if name != "model"}
            engine = self._open_model(files["model"], options, progress, others)
            queued = options.extra.get("max_queued", MAX_REQUESTS)
            self._pool = ThreadPoolExecutor(options.sequences + min(queued, _POOL_BEYOND_SEQUENCES), "request")
            self._engine = engine
            placed: object = engine
            placement = placed.placement if isinstance(placed, Placed) else Placement()
            self._send({"id": 0, "event": "loaded", "info": asdict(engine.info), "placement": asdict(placement)})
        except AIAssistantError as error:
            self._send_error(0, error)
        except MemoryError:
            self._send_error(0, InternalError("the worker has no memory left"))
        except Exception as error:
            self._send_error(0, InternalError(f"loading failed: {type(error).__name__}: {error}"))
        finally:
            for fd in files.values():
                os.close(fd)

    @property
    def _operations(self) -> Mapping[str, Callable[[int, _Request, dict[str, Any]], None]]:
        return {
            "generate": self._generate,
            "embed": self._embed,
            "rerank": self._rerank,
            "classify": self._classify,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
            "stats": self._stats,
            "trim": self._trim,
        }

    def _accept(self, number: int, op: str, message: dict[str, Any]) -> None:
        with self._lock:
            if number in self._active:
                raise ProtocolError(f"request {number} is already running")
            waiting, most = (self._controls, _MAX_CONTROL) if op in _CONTROL else (len(self._active), MAX_REQUESTS)
            if waiting >= most:
                raise Busy(f"{waiting} requests are waiting", hint="try again later")
            request = self._active[number] = _Request()
            self._controls += op in _CONTROL
        # Before the work begins: it may keep the interpreter from this thread at once.
        self._stall.keep(True)
        pool = self._pool if op == "generate" else self._control if op in _CONTROL else self._side
        pool.submit(self._run, number, request, self._operations[op], message)

    def _progress(self) -> int:
        """Grows whenever something was done, so that the daemon can tell slow from stuck."""
        engine: object = self._engine
        return self._finished + (engine.steps if isinstance(engine, Supervised) else 0)

    def _cancel(self, number: int) -> None:
        with self._lock:
            request = self._active.get(number)
        if request is not None:
            request.cancel()

    def _run(self, number: int, request: _Request, work: Callable[..., None], message: dict[str, Any]) -> None:
        try:
            if request.cancelled:
                raise Cancelled("the generation was cancelled")
            work(number, request, message)
        except AIAssistantError as error:
            self._send_error(number, error)
            self._leave_if_broken()
        except OSError:
            pass  # The daemon is gone; the reader ends the process.
        except MemoryError:
            self._send_error(number, InternalError("the worker has no memory left"))
        except Exception as error:
            self._send_error(number, InternalError(f"the engine failed: {type(error).__name__}: {error}"))
            self._leave_if_broken()
        finally:
            with self._lock:
                self._active.pop(number, None)
                self._controls -= message["op"] in _CONTROL
                self._finished += 1

    def _leave_if_broken(self) -> None:
        """An engine that can only fail from now on is a crash: the daemon starts another worker for the next one."""
        engine: object = self._engine
        if isinstance(engine, Supervised) and engine.broken:
            print("ai-assistant-worker: the engine is broken", file=sys.stderr, flush=True)
            os._exit(BROKEN_STATUS)

    def _generate(self, number: int, request: _Request, message: dict[str, Any]) -> None:
        values = message.get("request")
        if not isinstance(values, dict):
            raise InvalidArgument("a generation without a request")
        asked = GenerateRequest.from_dict(values)
        wish = Wish.of(asked.hetero_compute)
        if wish is not None:
            honour(self._loaded, wish)
        generation = self._loaded.generate(asked)
        request.attach(generation)
        try:
            if isinstance(generation, PacedGeneration):
                while events := generation.gather(self._pace_s):
                    self._send_bytes(b"".join(_event_frame(number, told(each, wish)) for each in joined(events)))
            else:
                for event in generation:
                    self._send_bytes(_event_frame(number, told(event, wish)))
        finally:
            generation.cancel()

    @property
    def _pace_s(self) -> float:
        return min(_PACE_MOST_S, _PACE_S + _PACE_EACH_S * len(self._active))

    def _embed(self, number: int, request: _Request, message: dict[str, Any]) -> None:
        texts = _texts(message, "texts", "input")
        wish = Wish.of(message.get("hetero_compute"))
        vectors, tokens = reader(self._loaded, wish).embed(texts, lambda: request.cancelled)
        for vector in vectors:
            _check_finite(vector)
        self._result(number, {"vectors": vectors, "tokens": tokens, **_devices(wish)})

    def _rerank(self, number: int, request: _Request, message: dict[str, Any]) -> None:
        query = message.get("query")
        if not isinstance(query, str):
            raise InvalidArgument("query must be a string", param="query")
        documents = _texts(message, "documents", "documents")
        wish = Wish.of(message.get("hetero_compute"))
        scores, tokens = reader(self._loaded, wish).rerank(query, documents, lambda: request.cancelled)
        _check_finite(scores)
        self._result(number, {"scores": scores, "tokens": tokens, **_devices(wish)})

    def _classify(self, number: int, request: _Request, message: dict[str, Any]) -> None:
        texts = _texts(message, "texts", "input")
        wish = Wish.of(message.get("hetero_compute"))
        labels, tokens = reader(self._loaded, wish).classify(texts, lambda: request.cancelled)
        if (count := sum(map(len, labels))) > MAX_LABELS:
            raise InvalidArgument(f"the answer has {count} labels, more than {MAX_LABELS}", hint="send fewer texts")
        for text in labels:
            _check_finite(probability for _, probability in text)
        self._result(number, {"labels": labels, "tokens": tokens, **_devices(wish)})

    def _tokenize(self, number: int, _request: _Request, message: dict[str, Any]) -> None:
        text = message.get("text")
        if not isinstance(text, str):
            raise InvalidArgument("text must be a string")
        self._result(number, self._loaded.tokenize(text))

    def _detokenize(self, number: int, _request: _Request, message: dict[str, Any]) -> None:
        tokens = message.get("tokens")
        if not isinstance(tokens, list):
            raise InvalidArgument("tokens must be a list", param="tokens")
        self._result(number, self._loaded.detokenize(tokens))

    def _stats(self, number: int, _request: _Request, _message: dict[str, Any]) -> None:
        values = asdict(self._loaded.stats())
        # A rate over no time is no number; the daemon would end a worker that sends one.
        self._result(number, {key: each if math.isfinite(each) else 0.0 for key, each in values.items()})

    def _trim(self, number: int, _request: _Request, _message: dict[str, Any]) -> None:
        self._result(number, self._loaded.trim())

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _result(self, number: int, value: Any) -> None:
        self._send({"id": number, "event": "result", "value": value})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            frame = encode(message)
        except ValueError as error:
            frame = encode({"id": message["id"], "event": "error", **InvalidArgument(str(error)).to_dict()})
        self._send_bytes(frame)

    def _send_error(self, number: int, error: AIAssistantError) -> None:
        # As in `_run`: when the daemon is gone, nobody is left to tell.
        with contextlib.suppress(OSError):
            self._send({"id": number, "event": "error", **error.to_dict()})

    def _send_bytes(self, frame: bytes) -> None:
        with self._sending:
            self._sock.sendall(frame)


class _Request:
    """A running request; a cancellation may come before its generation exists."""

    def __init__(self) -> None:
        self.cancelled = False
        self._generation: Generation | None = None
        self._lock = threading.Lock()

    def attach(self, generation: Generation) -> None:
        with self._lock:
            self._generation = generation
            cancelled = self.cancelled
        if cancelled:
            generation.cancel()

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            generation = self._generation
        if generation is not None:
            generation.cancel()


def joined(events: Iterable[Event]) -> Iterator[Event]:
    """The same, with the texts of neighbouring chunks in one, unless each has log-probabilities of its own."""
    texts: list[str] = []
    for event in events:
        if isinstance(event, Chunk) and not event.logprobs:
            texts.append(event.text)
            continue
        if texts:
            yield Chunk("".join(texts))
            texts = []
        yield event
    if texts:
        yield Chunk("".join(texts))


def _event_frame(number: int, event: Event) -> bytes:
    if isinstance(event, Chunk) and not event.logprobs:
        # Once per token: written out, which is four times as fast as going through asdict.
        body = f'{{"id":{number},"event":"chunk","text":{json.dumps(event.text)}}}'.encode()
        return framed(body, MAX_EVENT)
    return encode({"id": number, **event_to_dict(event)}, MAX_EVENT)


def _devices(wish: Wish | None) -> dict[str, list[str]]:
    """What an answer says of devices: nothing, unless it was asked."""
    return {} if wish is None else {"devices": list(wish.devices)}


def _texts(message: Mapping[str, Any], key: str, param: str) -> list[str]:
    texts = message.get(key)
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise InvalidArgument(f"{key} must be a list of strings", param=param)
    return texts


def _check_finite(numbers: Iterable[float]) -> None:
    # Damaged weights; JSON has no such values, so the daemon would take it for the end of the worker.
    if not all(map(math.isfinite, numbers)):
        raise InternalError("the model computes values that are no numbers", hint="its file may be damaged")


def _names(value: Any) -> list[str]:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_FILES
        or not all(isinstance(each, str) for each in value)
        or value[0] != "model"
        or len(set(value)) != len(value)
    ):
        raise InvalidArgument("the files of a load are named, each once, the model first", param="files")
    return value


def _options(values: Any) -> LoadOptions:
    if not isinstance(values, dict):
        raise InvalidArgument("a load without options")
    known = {each.name for each in fields(LoadOptions)}
    for key, value in values.items():
        if key not in known:
            raise InvalidArgument(f"unknown load option {str(key)[:40]!r}", param=str(key)[:40])
        if key == "extra" and not isinstance(value, dict):
            raise InvalidArgument("extra must be an object", param="extra")
    return LoadOptions(**values)


def limit_memory(limit_bytes: int) -> None:
    """Hold this process to a model's memory limit; 0 leaves it as it is.

    RLIMIT_DATA counts private writable memory, so the mapped weights do not count, but copies of them,
    caches and buffers do. RLIMIT_AS bounds the whole, mapped files included.
    """
    if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes <= 0:
        return
    for kind, limit in (
        (resource.RLIMIT_DATA, limit_bytes + _HEADROOM_BYTES),
        (resource.RLIMIT_AS, 2 * limit_bytes + 4 * _HEADROOM_BYTES),
    ):
        _soft, hard = resource.getrlimit(kind)
        wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (wanted, wanted))
