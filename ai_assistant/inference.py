"""One model, ready to answer: from the daemon where there is one, otherwise in this process.

    with InferenceEngine(model_path="model.gguf") as engine:
        print(engine.chat("What is an appliance?"))

The daemon gets an open descriptor of the file: it is neither copied nor imported, and the daemon
forgets it when the engine is closed or this process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, Unpack

from ai_assistant import _local, _wire
from ai_assistant._results import Completion, GenerateParams, Message, Ranked, Results
from ai_assistant._streams import AsyncTextStream, TextStream
from ai_assistant._transport import DEFAULT_TIMEOUT_S, START_HINT, open_model_file
from ai_assistant._transport import hetero_compute as chosen
from ai_assistant.client import (
    AsyncClient,
    Client,
    Messages,
    chat_request,
    check_n,
    completion_of,
    embed_body,
    message_of,
    prompt_request,
    served_default,
)
from ai_assistant.engines.contract import Engine, GenerateRequest
from ai_assistant.errors import AIAssistantError, InvalidArgument, NoSuchModel, NotAuthorized, ServiceUnavailable

Backend = Literal["daemon", "in-process"]
Wanted = Literal["auto", "daemon", "in-process"]

_CLOSED = "this engine is closed"


def _checked(
    model: str | None, model_path: str | os.PathLike[str] | None, context_length: int, backend: Wanted
) -> None:
    if backend not in ("auto", "daemon", "in-process"):
        raise InvalidArgument("backend must be auto, daemon or in-process", param="backend")
    if model is not None and model_path is not None:
        raise InvalidArgument("give a model or a model_path, not both", param="model_path")
    if model_path is None and backend == "in-process":
        raise InvalidArgument(
            "a model is loaded in this process from a file",
            hint="give model_path; models by name are the daemon's",
            param="model_path",
        )
    if isinstance(context_length, bool) or not isinstance(context_length, int) or not 0 <= context_length < 2**31:
        raise InvalidArgument("context_length must be a number of tokens, or 0", param="context_length")
    if model_path is None and context_length:
        raise InvalidArgument(
            "the context length of a model by name is set in the daemon's configuration",
            hint="see models.context_length in ai-assistant config show",
            param="context_length",
        )


def _served(model: str | None, rows: list[dict[str, Any]]) -> str:
    """The full name of `model`, which may lack its version, or the default model."""
    if not model:
        return served_default(rows)
    names = [str(row.get("id", "")) for row in rows]
    if model in names or any(name.startswith(model + ":") for name in names):
        return model
    raise NoSuchModel(f"there is no model {model!r}", hint="see ai-assistant model list", param="model")


def _denied(error: NotAuthorized) -> NotAuthorized:
    # Falling back in silence would load a second copy of the model into memory behind the owner's back.
    hint = "join the group ai-assistant, or say backend='in-process' to load the model in this process"
    return NotAuthorized(error.message, hint=hint)


def _unreachable(error: AIAssistantError) -> AIAssistantError:
    return ServiceUnavailable(error.message, hint=f"{START_HINT}; or give model_path to load a file in this process")


class InferenceEngine:
    """A model that answers.

    Args:
        model: the name of a model that the daemon knows; None is its default model.
        model_path: a model file instead. It is served by the daemon without a copy, or loaded in this
            process when there is no daemon.
        context_length: tokens per sequence of a model_path; 0: chosen by the model and the memory.
        sequences: generations that run at the same time in this process; 0: the default.
        threads: of an engine in this process; 0: chosen by the machine.
        memory_limit_bytes: of an engine in this process; 0: chosen by the machine.
        backend: "daemon" or "in-process" instead of choosing by what is there.
        timeout: seconds of silence from the daemon after which a request fails.
        hetero_compute: devices that may share the work, see docs/hetero.md; default: $HETERO_COMPUTE. A request's own
            goes before it, and a language model is loaded accordingly where it comes from a model_path.
    Raises:
        NoSuchModel, InvalidModel, NotAuthorized: the file is missing, no model, or unreadable.
        ServiceUnavailable: a model by name, but no daemon.
        OutOfMemory: the model does not fit.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        model_path: str | os.PathLike[str] | None = None,
        context_length: int = 0,
        sequences: int = 0,
        threads: int = 0,
        memory_limit_bytes: int = 0,
        backend: Wanted = "auto",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        hetero_compute: str | None = None,
    ) -> None:
        self._client: Client | None = None
        self._engine: Engine | None = None
        self._backend: Backend = "daemon"
        _checked(model, model_path, context_length, backend)
        self._hetero = hetero_compute
        options = _local.load_options(
            {
                "context_length": context_length,
                "sequences": sequences,
                "threads": threads,
                "memory_limit_bytes": memory_limit_bytes,
                "hetero_compute": chosen(hetero_compute),
            }
        )
        if model_path is None:
            self._name = self._connect(model, timeout)
        elif backend == "daemon" or (backend == "auto" and _daemon_present()):
            self._name = self._hand_over(model_path, context_length, timeout)
        else:
            self._backend = "in-process"
            self._engine = _local.load(model_path, options)
            self._name = self._engine.info.name or Path(model_path).name

    def _connect(self, model: str | None, timeout: float | None) -> str:
        self._client = client = Client(timeout=timeout, hetero_compute=self._hetero)
        try:
            return _served(model, client.served_models())
        except ServiceUnavailable as error:
            client.close()
            raise _unreachable(error) from error
        except BaseException:
            client.close()
            raise

    def _hand_over(self, path: str | os.PathLike[str], context_length: int, timeout: float | None) -> str:
        fd = open_model_file(path)
        self._client = client = Client(timeout=timeout, hetero_compute=self._hetero)
        try:
            return client.open_model(fd, name=Path(path).stem, context_length=context_length)
        except NotAuthorized as error:
            client.close()
            raise _denied(error) from error
        except BaseException:
            client.close()
            raise
        finally:
            os.close(fd)

    @property
    def backend(self) -> Backend:
        """Where the model is: "daemon" or "in-process"."""
        return self._backend

    @property
    def model(self) -> str:
        """The model's name; for a file in this process, what the file calls itself."""
        return self._name

    def _start(self, request: GenerateRequest, keep_alive: float | str | None = None) -> TextStream:
        if self._engine is not None:
            return _local.stream(self._engine, request, self._name)
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.start(request, model=self._name, keep_alive=keep_alive)

    def _several(
        self, request: GenerateRequest, n: int, keep_alive: float | str | None
    ) -> tuple[list[_wire.Answer], str]:
        check_n(n)
        if self._engine is not None:
            return _local.several(self._engine, request, n), self._name
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.several(request, n, model=self._name, keep_alive=keep_alive)

    def generate(self, prompt: str, *, n: int = 1, **params: Unpack[GenerateParams]) -> Completion:
        """Continue a raw prompt; the result is a `str` with `usage` and `finish_reason`.

        Raises:
            InvalidArgument: a parameter is unknown, of the wrong type or out of range.
            ContextOverflow: the prompt does not fit.
            Busy: the queue is full.
            WorkerCrashed, ServiceUnavailable, Timeout: the daemon or its worker failed meanwhile.
        """
        request, keep = prompt_request(prompt, params), params.get("keep_alive")
        if n != 1:
            return completion_of(*self._several(request, n, keep))
        with self._start(request, keep) as stream:
            return stream.completion()

    def stream(self, prompt: Messages, **params: Unpack[GenerateParams]) -> TextStream:
        """Text as it is generated: a string is a raw prompt, a list of messages a conversation.

        Closing or dropping the stream cancels the generation. Errors as for `generate`.
        """
        if isinstance(prompt, str):
            return self._start(prompt_request(prompt, params), params.get("keep_alive"))
        return self._start(chat_request(prompt, params), params.get("keep_alive"))

    def chat(self, messages: Messages, *, n: int = 1, **params: Unpack[GenerateParams]) -> Message:
        """The assistant's next turn, with its `tool_calls`; a string is one user message. Errors as for `generate`."""
        request, keep = chat_request(messages, params), params.get("keep_alive")
        if n != 1:
            return message_of(*self._several(request, n, keep))
        with self._start(request, keep) as stream:
            return stream.message()

    def embed(self, texts: Sequence[str], *, hetero_compute: str | None = None) -> Results[list[float]]:
        """A vector of length 1 for each text, in their order.

        Args:
            hetero_compute: devices that may share the work, see docs/hetero.md; `devices` of the list are those used.

        Raises:
            NotSupported: this model gives no embeddings, or not on these devices.
        """
        if self._engine is not None:
            body = embed_body(self._name, texts)
            return _local.embed(self._engine, body["input"], hetero_compute, self._hetero)
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.embed(texts, model=self._name, hetero_compute=hetero_compute)

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, hetero_compute: str | None = None
    ) -> Results[Ranked]:
        """The documents that answer the query best, best first; raises `NotSupported` for models that cannot."""
        if self._engine is not None:
            return _local.rerank(self._engine, query, documents, top_n, hetero_compute, self._hetero)
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.rerank(query, documents, top_n=top_n, model=self._name, hetero_compute=hetero_compute)

    def classify(self, texts: Sequence[str], *, hetero_compute: str | None = None) -> Results[list[tuple[str, float]]]:
        """For each text its labels with their probabilities, likeliest first."""
        if self._engine is not None:
            return _local.classify(self._engine, texts, hetero_compute, self._hetero)
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.classify(texts, model=self._name, hetero_compute=hetero_compute)

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text."""
        if self._engine is not None:
            return self._engine.tokenize(text)
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.tokenize(text, model=self._name)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no whole character is U+FFFD."""
        if self._engine is not None:
            return self._engine.detokenize(list(tokens))
        if self._client is None:
            raise InvalidArgument(_CLOSED)
        return self._client.detokenize(tokens, model=self._name)

    def close(self) -> None:
        """Free the model; idempotent. A model that the daemon knows by name stays loaded there."""
        client, engine, self._client, self._engine = self._client, self._engine, None, None
        if engine is not None:
            engine.close()
        if client is not None:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Late in the interpreter's life, or after a failed __init__, anything may be missing.
        with contextlib.suppress(Exception):
            self.close()


def _daemon_present() -> bool:
    with Client() as client:
        try:
            return client.present()
        except (ServiceUnavailable, NotAuthorized):
            return False  # no bus, or one that is not for us: the file can still be loaded here


class AsyncInferenceEngine:
    """The asynchronous twin of `InferenceEngine`, with the same arguments.

    It opens on first use or in `async with`, and belongs to the event loop of that moment.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        model_path: str | os.PathLike[str] | None = None,
        context_length: int = 0,
        sequences: int = 0,
        threads: int = 0,
        memory_limit_bytes: int = 0,
        backend: Wanted = "auto",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        hetero_compute: str | None = None,
    ) -> None:
        _checked(model, model_path, context_length, backend)
        self._hetero = hetero_compute
        self._wanted: Wanted = backend
        self._path = model_path
        self._name = model or ""
        self._timeout = timeout
        self._context_length = context_length
        self._options = _local.load_options(
            {
                "context_length": context_length,
                "sequences": sequences,
                "threads": threads,
                "memory_limit_bytes": memory_limit_bytes,
                "hetero_compute": chosen(hetero_compute),
            }
        )
        self._client: AsyncClient | None = None
        self._engine: Engine | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def open(self) -> Self:
        """Connect, or load the file; nothing if that was done before. Errors as for `InferenceEngine`."""
        async with self._opening:
            if self._closed:
                raise InvalidArgument(_CLOSED)
            if self._client is not None or self._engine is not None:
                return self
            client = AsyncClient(timeout=self._timeout, hetero_compute=self._hetero)
            try:
                if self._path is None:
                    self._name = await self._connect(client)
                elif self._wanted == "daemon" or (self._wanted == "auto" and await _present(client)):
                    self._name = await self._hand_over(client, self._path)
                else:
                    self._engine = await asyncio.to_thread(_local.load, self._path, self._options)
                    self._name = self._engine.info.name or Path(self._path).name
                    await client.aclose()
                    return self
            except BaseException:
                await client.aclose()
                raise
            self._client = client
            return self

    async def _connect(self, client: AsyncClient) -> str:
        try:
            return _served(self._name, await client.served_models())
        except ServiceUnavailable as error:
            raise _unreachable(error) from error

    async def _hand_over(self, client: AsyncClient, path: str | os.PathLike[str]) -> str:
        fd = open_model_file(path)
        try:
            return await client.open_model(fd, name=Path(path).stem, context_length=self._context_length)
        except NotAuthorized as error:
            raise _denied(error) from error
        finally:
            os.close(fd)

    @property
    def backend(self) -> Backend | None:
        """Where the model is: "daemon" or "in-process"; None before it is open."""
        if self._engine is not None:
            return "in-process"
        return "daemon" if self._client is not None else None

    @property
    def model(self) -> str:
        """The model's name; empty before the default model is known."""
        return self._name

    async def _start(self, request: GenerateRequest, keep_alive: float | str | None = None) -> AsyncTextStream:
        await self.open()
        if self._engine is not None:
            return await _local.async_stream(self._engine, request, self._name)
        assert self._client is not None
        return await self._client.start(request, model=self._name, keep_alive=keep_alive)

    async def _several(
        self, request: GenerateRequest, n: int, keep_alive: float | str | None
    ) -> tuple[list[_wire.Answer], str]:
        check_n(n)
        await self.open()
        if self._engine is not None:
            return await asyncio.to_thread(_local.several, self._engine, request, n), self._name
        assert self._client is not None
        return await self._client.several(request, n, model=self._name, keep_alive=keep_alive)

    async def generate(self, prompt: str, *, n: int = 1, **params: Unpack[GenerateParams]) -> Completion:
        """Continue a raw prompt."""
        request, keep = prompt_request(prompt, params), params.get("keep_alive")
        if n != 1:
            return completion_of(*await self._several(request, n, keep))
        async with await self._start(request, keep) as stream:
            return await stream.completion()

    async def stream(self, prompt: Messages, **params: Unpack[GenerateParams]) -> AsyncTextStream:
        """`async for text in await engine.stream(…)`: a string is a raw prompt, a list a conversation."""
        if isinstance(prompt, str):
            return await self._start(prompt_request(prompt, params), params.get("keep_alive"))
        return await self._start(chat_request(prompt, params), params.get("keep_alive"))

    async def chat(self, messages: Messages, *, n: int = 1, **params: Unpack[GenerateParams]) -> Message:
        """The assistant's next turn; a string is one user message."""
        request, keep = chat_request(messages, params), params.get("keep_alive")
        if n != 1:
            return message_of(*await self._several(request, n, keep))
        async with await self._start(request, keep) as stream:
            return await stream.message()

    async def embed(self, texts: Sequence[str], *, hetero_compute: str | None = None) -> Results[list[float]]:
        """A vector of length 1 for each text, in their order."""
        body = embed_body(self._name, texts)
        await self.open()
        if self._engine is not None:
            return await asyncio.to_thread(_local.embed, self._engine, body["input"], hetero_compute, self._hetero)
        assert self._client is not None
        return await self._client.embed(texts, model=self._name, hetero_compute=hetero_compute)

    async def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, hetero_compute: str | None = None
    ) -> Results[Ranked]:
        """The documents that answer the query best, best first; raises `NotSupported` for models that cannot."""
        await self.open()
        if self._engine is not None:
            wishes = hetero_compute, self._hetero
            return await asyncio.to_thread(_local.rerank, self._engine, query, documents, top_n, *wishes)
        assert self._client is not None
        return await self._client.rerank(query, documents, top_n=top_n, model=self._name, hetero_compute=hetero_compute)

    async def classify(
        self, texts: Sequence[str], *, hetero_compute: str | None = None
    ) -> Results[list[tuple[str, float]]]:
        """For each text its labels with their probabilities, likeliest first."""
        await self.open()
        if self._engine is not None:
            return await asyncio.to_thread(_local.classify, self._engine, texts, hetero_compute, self._hetero)
        assert self._client is not None
        return await self._client.classify(texts, model=self._name, hetero_compute=hetero_compute)

    async def tokenize(self, text: str) -> list[int]:
        """The tokens of a text."""
        await self.open()
        if self._engine is not None:
            return await asyncio.to_thread(self._engine.tokenize, text)
        assert self._client is not None
        return await self._client.tokenize(text, model=self._name)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no whole character is U+FFFD."""
        await self.open()
        if self._engine is not None:
            return await asyncio.to_thread(self._engine.detokenize, list(tokens))
        assert self._client is not None
        return await self._client.detokenize(tokens, model=self._name)

    async def aclose(self) -> None:
        """Free the model; idempotent."""
        self._closed = True
        client, engine, self._client, self._engine = self._client, self._engine, None, None
        if engine is not None:
            await asyncio.to_thread(engine.close)
        if client is not None:
            await client.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _present(client: AsyncClient) -> bool:
    try:
        return await client.present()
    except (ServiceUnavailable, NotAuthorized):
        return False
