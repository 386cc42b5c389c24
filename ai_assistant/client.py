"""Clients of a running daemon: `Client` blocks, `AsyncClient` awaits, and both have the same methods.

Models, jobs and the state of the machine go over D-Bus; generating and embedding go over the API
socket. Each connection is made on first use, so a caller that has only one of the two can use its
half. Every failure is one of `ai_assistant.errors`, whichever way it came.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, Unpack

from ai_assistant import _http, _wire
from ai_assistant._loop import LoopThread
from ai_assistant._results import (
    Completion,
    GenerateParams,
    JobStatus,
    Message,
    Model,
    Ranked,
    Results,
    SelfTestResult,
    default_model,
)
from ai_assistant._streams import AsyncTextStream, TextStream
from ai_assistant._transport import DEFAULT_TIMEOUT_S, hetero_compute, socket_path
from ai_assistant.engines.contract import GenerateRequest
from ai_assistant.errors import InvalidArgument, NoSuchModel, Timeout
from ai_assistant.hal.device import Device

if TYPE_CHECKING:
    from ai_assistant._manager import Manager

Messages = str | Sequence[Mapping[str, Any]]
"""A conversation, or one user message."""


MAX_CHOICES = 8
"""Answers to one request."""
RAW_MAX_TOKENS = 128
"""What a raw prompt gets when max_tokens is not given: raw text has no natural end."""


def chat_request(messages: Messages, params: Mapping[str, Any]) -> GenerateRequest:
    """
    Raises:
        InvalidArgument: with the parameter's name.
    """
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return GenerateRequest.from_dict({**_fields(params), "messages": conversation})


def prompt_request(prompt: str, params: Mapping[str, Any]) -> GenerateRequest:
    if not isinstance(prompt, str):
        raise InvalidArgument("prompt must be a string", hint="for a conversation use chat", param="prompt")
    return GenerateRequest.from_dict({"max_tokens": RAW_MAX_TOKENS, **_fields(params), "prompt": prompt})


def _fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as fields of a request."""
    fields = {key: value for key, value in params.items() if key not in ("regex", "keep_alive")}
    if params.get("regex") is not None:
        fields["response_regex"] = params["regex"]
    return fields


def check_n(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
        raise InvalidArgument(f"n must be between 1 and {MAX_CHOICES}", param="n")


def completion_of(answers: Sequence[_wire.Answer], model: str) -> Completion:
    """The first of several, which knows all."""
    made = [
        Completion(each.text, finish_reason=each.end.reason, usage=each.end.usage, model=model, logprobs=each.logprobs)
        for each in answers
    ]
    made[0].choices = tuple(made)
    return made[0]


def message_of(answers: Sequence[_wire.Answer], model: str) -> Message:
    """The first of several, which knows all."""
    made = [
        Message(
            content=each.text, tool_calls=each.end.tool_calls, finish_reason=each.end.reason, usage=each.end.usage,
            model=model, logprobs=each.logprobs,
        )
        for each in answers
    ]  # fmt: skip
    return replace(made[0], choices=tuple(made))


def embed_body(model: str, texts: Sequence[str], wish: str | None = None) -> dict[str, Any]:
    if isinstance(texts, str) or not all(isinstance(each, str) for each in texts):
        raise InvalidArgument("texts must be a list of strings", param="texts")
    return {"model": model, "input": list(texts), "encoding_format": "float", **_wished(wish)}


def _wished(wish: str | None) -> dict[str, str]:
    return {} if wish is None else {"hetero_compute": wish}


def served_default(rows: Any) -> str:
    """The default among the rows of /v1/models."""
    listed = [
        Model(
            name=str(row.get("id", "")),
            state=str(row.get("state", "")),
            created=int(row.get("created") or 0),
            builtin=row.get("owned_by") == "ai-assistant",
            transient=bool(row.get("transient", False)),
        )
        for row in rows
    ]
    found = default_model(listed)
    if found is None:
        raise NoSuchModel("there is no model", hint="import one: ai-assistant model import FILE")
    return found.name


def _manager(address: str | None) -> Manager:
    from ai_assistant._manager import Manager  # the bus library costs 0.1 s and is not always needed

    return Manager(address)


class Job:
    """A long piece of work in the daemon. It goes on when nobody watches, until it ends or is cancelled."""

    def __init__(self, client: Client, path: str) -> None:
        self._client = client
        self.path = path

    def status(self) -> JobStatus:
        status: JobStatus = self._client._run("job", self.path)
        return status

    def watch(self) -> Iterator[JobStatus]:
        """Its state now and after each change; the last one has ended."""
        changes = self._client._manager.watch_job(self.path)
        try:
            while (status := self._client._loop.run(_next(changes))) is not None:
                yield status
        finally:
            self._client._loop.run(changes.aclose())

    def wait(self) -> JobStatus:
        """Wait for the end.

        Raises:
            AIAssistantError: why the work failed; `Cancelled` when it was cancelled.
        """
        status = None
        for status in self.watch():  # noqa: B007 the last one counts
            pass
        return _result(status)

    def cancel(self) -> None:
        self._client._run("cancel_job", self.path)


class Client:
    """A blocking client; may be used from several threads.

    Args:
        socket: the API socket; default is $AI_ASSISTANT_SOCKET or /run/ai-assistant/api.sock.
        bus_address: the bus; default is the system bus ($DBUS_SYSTEM_BUS_ADDRESS).
        timeout: seconds of silence from the API after which a request fails with `Timeout`.
        hetero_compute: devices that may share the work, see docs/hetero.md; default: $HETERO_COMPUTE. A request's own
            goes before it.
    """

    def __init__(
        self,
        *,
        socket: str | os.PathLike[str] | None = None,
        bus_address: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        hetero_compute: str | None = None,
    ) -> None:
        self._hetero = hetero_compute
        self._socket = socket_path(socket)
        self._timeout = timeout
        self._bus_address = bus_address
        self._loop = LoopThread()
        self._made: Manager | None = None
        self._ending: weakref.finalize[[LoopThread, Manager], Client] | None = None

    @property
    def _manager(self) -> Manager:
        if self._made is None:
            self._made = _manager(self._bus_address)
            # A client that is dropped without close() must not leave a thread and a connection behind.
            self._ending = weakref.finalize(self, _end, self._loop, self._made)
        return self._made

    def _run(self, method: str, *arguments: Any) -> Any:
        return self._loop.run(getattr(self._manager, method)(*arguments))

    def close(self) -> None:
        """Idempotent. Transient models that were opened through this client end."""
        if self._ending is not None:
            self._ending()
            self._made = self._ending = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Over the bus.

    def present(self) -> bool:
        """Whether a daemon is on the bus, or can be started by it. False without a bus."""
        return bool(self._run("present"))

    def status(self) -> dict[str, Any]:
        """The state of the machine and the daemon; the keys are listed in daemon/README.md."""
        return dict(self._run("status"))

    def statistics(self) -> dict[str, Any]:
        """What the models do; the keys are those of GetStatistics in docs/dbus.md."""
        return dict(self._run("statistics"))

    def models(self) -> list[Model]:
        """All models, sorted by name; transient ones last."""
        return list(self._run("models"))

    def devices(self) -> list[Device]:
        """The hardware of the appliance, by kind."""
        return list(self._run("devices"))

    def measure_devices(self) -> Job:
        """Find out how fast processor and memory are, once: a few seconds with every core busy."""
        return Job(self, self._run("measure_devices"))

    def model(self, name: str) -> Model:
        """By full name, or by the bare name of its newest version; raises `NoSuchModel`."""
        found: Model = self._run("model", name)
        return found

    def import_model(self, path: str | os.PathLike[str], name: str) -> Job:
        """Check a model file and copy it into the daemon's store. The job's result has the full "name"."""
        return Job(self, self._run("import_model", path, name))

    def pull_model(self, source: str, name: str = "", *, token: str = "", endpoint: str = "", sha256: str = "") -> Job:
        """Let the daemon download a model and import it. The job's result has the full "name".

        What a failure or a cancellation leaves is kept: the next pull of the same source goes on with it.

        Args:
            source: ``hf:owner/name[:file or quantisation][@revision]``, or a URL.
            name: empty: from the file's name.
            token: for the source's own host.
            endpoint: URL of another hub than the configured one.
            sha256: what the file must be.
        """
        options = {"token": token, "endpoint": endpoint, "sha256": sha256}
        return Job(self, self._run("pull_model", source, name, options))

    def open_model(self, fd: int, *, name: str = "", context_length: int = 0, hetero_compute: str | None = None) -> str:
        """Serve an open file as a transient model, without a copy, until this client is closed.

        Args:
            fd: open for reading; it may be closed afterwards.
            name: what the given name begins with.
            context_length: tokens per sequence; 0: chosen by the model and the memory.
            hetero_compute: devices that may have layers of a language model; default: as for requests, or the daemon's.
        """
        return str(self._run("open_model", fd, name, context_length, self._wish(hetero_compute)))

    def load(self, name: str) -> Job:
        """Load now, instead of at the first request."""
        return Job(self, self._run("load", name))

    def unload(self, name: str) -> None:
        self._run("unload", name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep a model in memory once it is loaded, over restarts, or no longer."""
        self._run("pin", name, pinned)

    def drain(self, name: str) -> Job:
        """Take no more requests for a model, let those that run finish, then unload it."""
        return Job(self, self._run("drain", name))

    def estimate(self, name: str, *, context_length: int = 0, sequences: int = 0) -> dict[str, int]:
        """What loading a model takes, in bytes; the keys are those of Memory in docs/dbus.md."""
        return dict(self._run("estimate", name, context_length, sequences))

    def remove(self, name: str) -> None:
        self._run("remove", name)

    def self_test(self) -> list[SelfTestResult]:
        return list(self._run("self_test"))

    def log(self, lines: int = 50, priority: str = "info") -> list[str]:
        """The newest journal lines of the daemon's own units, oldest first."""
        return list(self._run("log", lines, priority))

    # Over the socket.

    def _get(self, target: str) -> bytes:
        return _http.call(self._socket, "GET", target, timeout=self._timeout)

    def post(self, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The parsed answer to a JSON body, for what the other methods have no word for."""
        return dict(_wire.load(_http.call(self._socket, "POST", target, body, timeout=self._timeout)))

    def health(self) -> dict[str, Any]:
        return dict(_wire.load(self._get("/health")))

    def metrics(self) -> str:
        """Counters in the text format of Prometheus."""
        return self._get("/metrics").decode()

    def served_models(self) -> list[dict[str, Any]]:
        """The rows of /v1/models; cheaper than `models`, and without a bus."""
        return [dict(row) for row in _wire.load(self._get("/v1/models"))["data"]]

    def default_model(self) -> str:
        """The model that is meant when none is named; raises `NoSuchModel` when there is none."""
        return served_default(self.served_models())

    def start(
        self, request: GenerateRequest, *, model: str | None = None, keep_alive: float | str | None = None
    ) -> TextStream:
        """Start a generation that is already a request."""
        name = model or self.default_model()
        wish = hetero_compute(request.hetero_compute, self._hetero)
        target, body = _wire.generation(name, request, keep_alive=keep_alive, hetero_compute=wish)
        exchange = _http.Exchange(self._socket, "POST", target, body, self._timeout)
        return TextStream(_http.events(exchange), exchange.close, name)

    def several(
        self, request: GenerateRequest, n: int, *, model: str | None = None, keep_alive: float | str | None = None
    ) -> tuple[list[_wire.Answer], str]:
        """`n` answers to a request, and the model that gave them."""
        check_n(n)
        name = model or self.default_model()
        wish = hetero_compute(request.hetero_compute, self._hetero)
        target, body = _wire.generation(name, request, n=n, keep_alive=keep_alive, hetero_compute=wish)
        exchange = _http.Exchange(self._socket, "POST", target, body, self._timeout)
        decoder = _wire.ChoicesDecoder(n)
        for _ in _http.events(exchange, decoder):
            pass
        return decoder.answers(), name

    def stream(self, prompt: Messages, *, model: str | None = None, **params: Unpack[GenerateParams]) -> TextStream:
        """Text as it is generated: a string is a raw prompt, a list of messages a conversation."""
        make = prompt_request if isinstance(prompt, str) else chat_request
        return self.start(make(prompt, params), model=model, keep_alive=params.get("keep_alive"))  # type: ignore[arg-type]

    def generate(
        self, prompt: str, *, model: str | None = None, n: int = 1, **params: Unpack[GenerateParams]
    ) -> Completion:
        """Continue a raw prompt."""
        request, keep = prompt_request(prompt, params), params.get("keep_alive")
        if n != 1:
            return completion_of(*self.several(request, n, model=model, keep_alive=keep))
        with self.start(request, model=model, keep_alive=keep) as stream:
            return stream.completion()

    def chat(
        self, messages: Messages, *, model: str | None = None, n: int = 1, **params: Unpack[GenerateParams]
    ) -> Message:
        """The assistant's next turn; a string is one user message."""
        request, keep = chat_request(messages, params), params.get("keep_alive")
        if n != 1:
            return message_of(*self.several(request, n, model=model, keep_alive=keep))
        with self.start(request, model=model, keep_alive=keep) as stream:
            return stream.message()

    def embed(
        self, texts: Sequence[str], *, model: str | None = None, hetero_compute: str | None = None
    ) -> Results[list[float]]:
        """A vector of length 1 for each text, in their order.

        Args:
            hetero_compute: devices that may share the work, see docs/hetero.md; `devices` of the list are those used.
        """
        wish = self._wish(hetero_compute)
        body = self.post("/v1/embeddings", embed_body(model or self.default_model(), texts, wish))
        return Results(_wire.vectors_from(body)[0], _wire.devices_from(body))

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        top_n: int | None = None,
        hetero_compute: str | None = None,
    ) -> Results[Ranked]:
        """The documents that answer the query best, best first; raises `NotSupported` for models that cannot."""
        wish = _wished(self._wish(hetero_compute))
        asked = {"model": model or self.default_model(), "query": query, "documents": list(documents), "top_n": top_n}
        body = self.post("/v1/rerank", asked | wish)
        return Results(_wire.ranks_from(body), _wire.devices_from(body))

    def classify(
        self, texts: Sequence[str], *, model: str | None = None, hetero_compute: str | None = None
    ) -> Results[list[tuple[str, float]]]:
        """For each text its labels with their probabilities, likeliest first."""
        wish = _wished(self._wish(hetero_compute))
        body = self.post("/v1/classify", {"model": model or self.default_model(), "input": list(texts), **wish})
        return Results(_wire.labels_from(body), _wire.devices_from(body))

    def _wish(self, given: str | None) -> str | None:
        return hetero_compute(given, self._hetero)

    def tokenize(self, text: str, *, model: str | None = None) -> list[int]:
        body = {"model": model or self.default_model(), "content": text}
        return [int(each) for each in _wire.member(self.post("/tokenize", body), "tokens")]

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        body = {"model": model or self.default_model(), "tokens": list(tokens)}
        return str(_wire.member(self.post("/detokenize", body), "content"))


class AsyncJob:
    """The asynchronous twin of `Job`."""

    def __init__(self, manager: Manager, path: str) -> None:
        self._manager = manager
        self.path = path

    async def status(self) -> JobStatus:
        return await self._manager.job(self.path)

    async def watch(self) -> AsyncGenerator[JobStatus]:
        """Its state now and after each change; the last one has ended."""
        async with contextlib.aclosing(self._manager.watch_job(self.path)) as changes:
            async for status in changes:
                yield status

    async def wait(self) -> JobStatus:
        """Wait for the end; raises why the work failed."""
        status = None
        async for status in self.watch():  # noqa: B007 the last one counts
            pass
        return _result(status)

    async def cancel(self) -> None:
        await self._manager.cancel_job(self.path)


class AsyncClient:
    """The asynchronous twin of `Client`; belongs to the event loop that first uses it."""

    def __init__(
        self,
        *,
        socket: str | os.PathLike[str] | None = None,
        bus_address: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        hetero_compute: str | None = None,
    ) -> None:
        self._hetero = hetero_compute
        self._socket = socket_path(socket)
        self._timeout = timeout
        self._bus_address = bus_address
        self._made: Manager | None = None

    @property
    def _manager(self) -> Manager:
        if self._made is None:
            self._made = _manager(self._bus_address)
        return self._made

    async def aclose(self) -> None:
        if self._made is not None:
            await self._made.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def present(self) -> bool:
        return await self._manager.present()

    async def status(self) -> dict[str, Any]:
        return await self._manager.status()

    async def statistics(self) -> dict[str, Any]:
        return await self._manager.statistics()

    async def models(self) -> list[Model]:
        return await self._manager.models()

    async def devices(self) -> list[Device]:
        return await self._manager.devices()

    async def measure_devices(self) -> AsyncJob:
        return AsyncJob(self._manager, await self._manager.measure_devices())

    async def model(self, name: str) -> Model:
        return await self._manager.model(name)

    async def import_model(self, path: str | os.PathLike[str], name: str) -> AsyncJob:
        return AsyncJob(self._manager, await self._manager.import_model(path, name))

    async def pull_model(
        self, source: str, name: str = "", *, token: str = "", endpoint: str = "", sha256: str = ""
    ) -> AsyncJob:
        options = {"token": token, "endpoint": endpoint, "sha256": sha256}
        return AsyncJob(self._manager, await self._manager.pull_model(source, name, options))

    async def open_model(
        self, fd: int, *, name: str = "", context_length: int = 0, hetero_compute: str | None = None
    ) -> str:
        return await self._manager.open_model(fd, name, context_length, self._wish(hetero_compute))

    async def load(self, name: str) -> AsyncJob:
        return AsyncJob(self._manager, await self._manager.load(name))

    async def unload(self, name: str) -> None:
        await self._manager.unload(name)

    async def pin(self, name: str, pinned: bool = True) -> None:
        await self._manager.pin(name, pinned)

    async def drain(self, name: str) -> AsyncJob:
        return AsyncJob(self._manager, await self._manager.drain(name))

    async def estimate(self, name: str, *, context_length: int = 0, sequences: int = 0) -> dict[str, int]:
        return await self._manager.estimate(name, context_length, sequences)

    async def remove(self, name: str) -> None:
        await self._manager.remove(name)

    async def self_test(self) -> list[SelfTestResult]:
        return await self._manager.self_test()

    async def log(self, lines: int = 50, priority: str = "info") -> list[str]:
        return await self._manager.log(lines, priority)

    async def _call(self, method: str, target: str, body: Any = None) -> bytes:
        from ai_assistant import _ahttp

        return await _ahttp.call(self._socket, method, target, body, timeout_s=self._timeout)

    async def post(self, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The parsed answer to a JSON body, for what the other methods have no word for."""
        return dict(_wire.load(await self._call("POST", target, body)))

    async def health(self) -> dict[str, Any]:
        return dict(_wire.load(await self._call("GET", "/health")))

    async def metrics(self) -> str:
        return (await self._call("GET", "/metrics")).decode()

    async def served_models(self) -> list[dict[str, Any]]:
        return [dict(row) for row in _wire.load(await self._call("GET", "/v1/models"))["data"]]

    async def default_model(self) -> str:
        return served_default(await self.served_models())

    async def start(
        self, request: GenerateRequest, *, model: str | None = None, keep_alive: float | str | None = None
    ) -> AsyncTextStream:
        from ai_assistant import _ahttp

        name = model or await self.default_model()
        wish = hetero_compute(request.hetero_compute, self._hetero)
        target, body = _wire.generation(name, request, keep_alive=keep_alive, hetero_compute=wish)
        exchange = await _ahttp.Exchange.start(self._socket, "POST", target, body, self._timeout)
        return AsyncTextStream(_ahttp.events(exchange), exchange.close, name)

    async def several(
        self, request: GenerateRequest, n: int, *, model: str | None = None, keep_alive: float | str | None = None
    ) -> tuple[list[_wire.Answer], str]:
        """`n` answers to a request, and the model that gave them."""
        from ai_assistant import _ahttp

        check_n(n)
        name = model or await self.default_model()
        wish = hetero_compute(request.hetero_compute, self._hetero)
        target, body = _wire.generation(name, request, n=n, keep_alive=keep_alive, hetero_compute=wish)
        exchange = await _ahttp.Exchange.start(self._socket, "POST", target, body, self._timeout)
        decoder = _wire.ChoicesDecoder(n)
        async for _ in _ahttp.events(exchange, decoder):
            pass
        return decoder.answers(), name

    async def stream(
        self, prompt: Messages, *, model: str | None = None, **params: Unpack[GenerateParams]
    ) -> AsyncTextStream:
        make = prompt_request if isinstance(prompt, str) else chat_request
        return await self.start(make(prompt, params), model=model, keep_alive=params.get("keep_alive"))  # type: ignore[arg-type]

    async def generate(
        self, prompt: str, *, model: str | None = None, n: int = 1, **params: Unpack[GenerateParams]
    ) -> Completion:
        request, keep = prompt_request(prompt, params), params.get("keep_alive")
        if n != 1:
            return completion_of(*await self.several(request, n, model=model, keep_alive=keep))
        async with await self.start(request, model=model, keep_alive=keep) as stream:
            return await stream.completion()

    async def chat(
        self, messages: Messages, *, model: str | None = None, n: int = 1, **params: Unpack[GenerateParams]
    ) -> Message:
        request, keep = chat_request(messages, params), params.get("keep_alive")
        if n != 1:
            return message_of(*await self.several(request, n, model=model, keep_alive=keep))
        async with await self.start(request, model=model, keep_alive=keep) as stream:
            return await stream.message()

    async def embed(
        self, texts: Sequence[str], *, model: str | None = None, hetero_compute: str | None = None
    ) -> Results[list[float]]:
        wish = self._wish(hetero_compute)
        body = await self.post("/v1/embeddings", embed_body(model or await self.default_model(), texts, wish))
        return Results(_wire.vectors_from(body)[0], _wire.devices_from(body))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        top_n: int | None = None,
        hetero_compute: str | None = None,
    ) -> Results[Ranked]:
        """The documents that answer the query best, best first; raises `NotSupported` for models that cannot."""
        wish = _wished(self._wish(hetero_compute))
        name = model or await self.default_model()
        asked = {"model": name, "query": query, "documents": list(documents), "top_n": top_n}
        body = await self.post("/v1/rerank", asked | wish)
        return Results(_wire.ranks_from(body), _wire.devices_from(body))

    async def classify(
        self, texts: Sequence[str], *, model: str | None = None, hetero_compute: str | None = None
    ) -> Results[list[tuple[str, float]]]:
        """For each text its labels with their probabilities, likeliest first."""
        wish = _wished(self._wish(hetero_compute))
        body = await self.post(
            "/v1/classify", {"model": model or await self.default_model(), "input": list(texts), **wish}
        )
        return Results(_wire.labels_from(body), _wire.devices_from(body))

    def _wish(self, given: str | None) -> str | None:
        return hetero_compute(given, self._hetero)

    async def tokenize(self, text: str, *, model: str | None = None) -> list[int]:
        body = {"model": model or await self.default_model(), "content": text}
        return [int(each) for each in _wire.member(_wire.load(await self._call("POST", "/tokenize", body)), "tokens")]

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        body = {"model": model or await self.default_model(), "tokens": list(tokens)}
        return str(_wire.member(_wire.load(await self._call("POST", "/detokenize", body)), "content"))


async def _next(changes: AsyncIterator[JobStatus]) -> JobStatus | None:
    return await anext(changes, None)


def _end(loop: LoopThread, manager: Manager) -> None:
    if loop.running:
        loop.run(manager.close())
    loop.close()


def _result(status: JobStatus | None) -> JobStatus:
    if status is None:
        raise Timeout("the job gave no state")
    if status.error is not None:
        raise status.error
    return status
