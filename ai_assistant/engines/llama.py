"""The llama engine: GGUF models through llama.cpp's low-level API, several generations at a time.

Used in process by the SDK and inside a worker by the daemon. Everything that a caller may do wrong is
checked on the caller's thread, before anything is queued; the scheduler's thread only decodes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ai_assistant.engines import gguf_rules, memory
from ai_assistant.engines.contract import (
    EngineStats,
    Event,
    Finished,
    GenerateRequest,
    LoadOptions,
    ModelInfo,
    Placement,
)
from ai_assistant.engines.gguf import Gguf, opened, read_gguf
from ai_assistant.engines.grammar import grammar_of
from ai_assistant.engines.load_checks import MAX_QUEUED, check_memory, checked_options
from ai_assistant.engines.placing import decide
from ai_assistant.engines.user_text import Piece
from ai_assistant.errors import (
    AIAssistantError,
    ContextOverflow,
    DeviceLost,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)

MAX_TOKENIZE = 4 << 20
"""Characters of a text that is only to be counted."""


class LlamaEngine:
    """A loaded GGUF model; see `Engine` in contract.py for what each method promises. Made by `open`."""

    @classmethod
    def open(
        cls,
        path_or_fd: int | str | os.PathLike[str],
        options: LoadOptions | None = None,
        progress: Callable[[float], None] | None = None,
        files: Mapping[str, int] = MappingProxyType({}),
    ) -> LlamaEngine:
        """Check and load a model.

        Args:
            path_or_fd: a path, or an open descriptor, which is neither closed nor needed afterwards.
            progress: called with 0.0 … 1.0 on this thread.
            files: open descriptors of what goes with the model, by name; they are not closed.

        Raises:
            InvalidModel: the file is no model that this engine runs.
            NotSupported: the native library is not installed.
            OutOfMemory: it does not fit `memory_limit_bytes` or the machine.
        """
        options = checked_options(options or LoadOptions())
        with opened(path_or_fd) as fd:
            header = read_gguf(fd)
            info = gguf_rules.check(header)
            options = memory.settled(gguf_rules.memory_shape(header), options)
            placement = decide(header, options)
            if not placement.devices:
                check_memory(header, options, files)
                return cls._load(fd, header, info, options, progress, files, placement)
            check_memory(header, options, files, placement.host_bytes)
            _announce(options, placement)
            try:
                return cls._load(fd, header, info, options, progress, files, placement)
            except (DeviceLost, InvalidModel, OutOfMemory) as error:
                # The library does not say whose fault it was. Without the device it is the model's, if it fails again.
                names = ", ".join(placement.devices)
                back = Placement(warning=f"{names} not used: loading failed there: {error.message[:300]}")
            _announce(options, back)
            check_memory(header, options, files)
            return cls._load(fd, header, info, options, progress, files, back)

    @classmethod
    def _load(
        cls,
        fd: int,
        header: Gguf,
        info: ModelInfo,
        options: LoadOptions,
        progress: Callable[[float], None] | None,
        files: Mapping[str, int],
        placement: Placement,
    ) -> LlamaEngine:
        from ai_assistant.engines.native import library, load_model

        parts = [(name.removeprefix("ggml:"), count) for name, count in placement.parts if name != "cpu"]
        model = load_model(fd, progress, repack=options.repack, parts=parts)
        try:
            return cls(model, header, info, options, files, placement)
        except BaseException:
            library().llama_model_free(model)
            raise

    def __init__(
        self,
        model: Any,
        header: Gguf,
        info: ModelInfo,
        options: LoadOptions,
        files: Mapping[str, int],
        placement: Placement = Placement(),  # noqa: B008 - frozen
    ) -> None:
        from ai_assistant.engines.native import default_threads, library
        from ai_assistant.engines.templates import ChatTemplate
        from ai_assistant.engines.vocabulary import Vocabulary

        self._lib = library()
        self._model = model
        self._info = info
        self._context_length = options.context_length
        self._threads = options.threads or default_threads()
        self._options = options
        self._placement = placement
        self._vocabulary = Vocabulary(self._lib, model, header.tokens[1])
        bos, eos = (self._vocabulary.text_of(each) for each in (self._vocabulary.bos, self._vocabulary.eos))
        self._template = ChatTemplate(header.chat_template, bos, eos)
        self._embedder: Any = None
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._users = 0
        self._closed = False
        self._scheduler: Any = None
        if info.architecture in gguf_rules.DECODERS:
            self._start(files)

    def _start(self, files: Mapping[str, int]) -> None:
        from ai_assistant.engines.context import ContextShape, NativeContext
        from ai_assistant.engines.scheduler import Scheduler
        from ai_assistant.engines.spill import SpillStore

        options, vocabulary = self._options, self._vocabulary
        whole = self._info.architecture in gguf_rules.RECURRENT
        guesses = (
            0 if whole or options.speculative == "off" else memory.outputs_ahead(vocabulary.size, options.sequences)
        )
        shape = ContextShape(
            cells=gguf_rules.cells_per_sequence(self._context_length),
            sequences=options.sequences,
            batch_tokens=options.batch_tokens,
            outputs=options.sequences + guesses,
            threads=self._threads,
            kv_type=options.kv_type,
            whole=whole,
            on_devices=bool(self._placement.devices),
        )
        context = NativeContext(self._lib, self._model, vocabulary.size, shape)
        context.open()
        try:
            speculation = self._speculation(shape, guesses, files)
        except BaseException:
            context.close()
            raise
        self._scheduler = Scheduler(
            context,
            vocabulary,
            context_length=self._context_length,
            sequences=options.sequences,
            batch_tokens=options.batch_tokens,
            max_queued=int(options.extra.get("max_queued", MAX_QUEUED)),
            spill=SpillStore(options.spill_memory_bytes, options.spill_disk_bytes, files.get("spill")),
            speculation=speculation,
        )

    def _speculation(self, shape: Any, guesses: int, files: Mapping[str, int]) -> Any:
        from ai_assistant.engines.speculation import Lookup, Speculation

        mode = self._options.speculative
        if mode == "draft" and "draft" not in files:
            raise InvalidArgument("speculative is draft, but no draft model came with the model", param="speculative")
        if not guesses:
            return None
        drafter: Any = Lookup()
        if mode != "lookup" and "draft" in files:
            from ai_assistant.engines.draft import open_draft

            # The small model stays on the processor.
            near = replace(shape, on_devices=False)
            drafter = open_draft(self._lib, files["draft"], self._vocabulary, near, self._context_length)
        return Speculation(drafter, measured=mode == "auto", most=guesses)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def placement(self) -> Placement:
        """Where its layers are; without parts: on the processor."""
        return self._placement

    @property
    def context_length(self) -> int:
        """Tokens that one generation may use, prompt and answer together."""
        return self._context_length

    @property
    def steps(self) -> int:
        return sum(each.steps for each in (self._scheduler, self._embedder) if each is not None)

    @property
    def broken(self) -> bool:
        return self._scheduler is not None and bool(self._scheduler.broken)

    def generate(self, request: GenerateRequest) -> LlamaGeneration:
        with self._in_use():
            return self._generate(request)

    def _generate(self, request: GenerateRequest) -> LlamaGeneration:
        started = time.monotonic()
        if self._scheduler is None:
            raise NotSupported(f"models of architecture {self._info.architecture} make embeddings, not text")
        from ai_assistant.engines.sampling import Sampler
        from ai_assistant.engines.scheduler import Task
        from ai_assistant.engines.tools import check_tools

        functions = check_tools(request.tools, request.tool_choice)
        forced = bool(functions) and request.tool_choice != "auto"
        prompt = self._prompt(request, functions)
        limit = self._limit(len(prompt), request.max_tokens)
        grammar = _grammar(request, functions if forced else ())
        sampler = Sampler(self._lib, self._vocabulary.native, self._vocabulary.size, request, grammar, prompt)
        task = Task(
            prompt, limit, sampler, _output(request, functions, forced), request.logprobs,
            priority=request.priority, ignore_end=request.ignore_eos and grammar is None,
        )  # fmt: skip
        task.submitted = started
        try:
            self._scheduler.submit(task)
        except AIAssistantError:
            sampler.close()
            raise
        return LlamaGeneration(task, self._scheduler)

    def _prompt(self, request: GenerateRequest, functions: Sequence[Any]) -> Any:
        vocabulary = self._vocabulary
        if request.messages is not None:
            pieces = self._template.pieces(request.messages, functions, vocabulary.specials)
        else:
            # Who sends a whole prompt writes control tokens on purpose.
            pieces = [Piece(request.prompt or "", True)]
        fewest = vocabulary.fewest_tokens("".join(each.text for each in pieces))
        if fewest >= self._context_length:
            raise self._overflow(f"at least {fewest}", None)
        # A template writes the beginning-of-text token itself, if the model wants one.
        tokens = vocabulary.tokenize_pieces(pieces, begin=request.messages is None)
        if not len(tokens):
            raise InvalidArgument("the prompt is empty", param="prompt" if request.messages is None else "messages")
        if request.messages is not None and vocabulary.adds_bos and tokens[0] != vocabulary.bos:
            tokens = vocabulary.tokenize_pieces(pieces, begin=True)
        return tokens

    def _limit(self, prompt: int, max_tokens: int | None) -> int:
        room = self._context_length - prompt
        if room < 1 or (max_tokens is not None and max_tokens > room):
            raise self._overflow(str(prompt), max_tokens)
        return room if max_tokens is None else max_tokens

    def _overflow(self, prompt: str, max_tokens: int | None) -> ContextOverflow:
        asked = "" if max_tokens is None else f", and {max_tokens} more are asked for"
        return ContextOverflow(
            f"the prompt has {prompt} tokens{asked}; the context is {self._context_length}",
            hint="shorten the prompt, lower max_tokens, or load the model with a larger context_length",
            param="messages" if max_tokens is None else "max_tokens",
        )

    def embed(self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None) -> tuple[list[list[float]], int]:
        if not self._info.can_embed:
            raise NotSupported(f"models of architecture {self._info.architecture} cannot make embeddings")
        with self._in_use():
            with self._lock:
                if self._embedder is None:
                    from ai_assistant.engines.embedding import Embedder

                    self._embedder = Embedder(
                        self._lib, self._model, self._vocabulary,
                        context_length=self._context_length, threads=self._threads,
                    )  # fmt: skip
            vectors, tokens = self._embedder.embed(texts, cancelled)
            return vectors, tokens

    def tokenize(self, text: str) -> list[int]:
        if len(text) > MAX_TOKENIZE:
            raise InvalidArgument(f"the text has {len(text)} characters, more than {MAX_TOKENIZE}", param="text")
        with self._in_use():
            tokens: list[int] = self._vocabulary.tokenize(text).tolist()
            return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        vocabulary = self._vocabulary
        for index, each in enumerate(tokens):
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < vocabulary.size:
                raise InvalidArgument(f"tokens[{index}] is no token of this model", param=f"tokens[{index}]")
        with self._in_use():
            return b"".join(map(vocabulary.piece, tokens)).decode("utf-8", "replace")

    def rerank(
        self, query: str, documents: Sequence[str], cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[float], int]:
        raise NotSupported(f"models of architecture {self._info.architecture} do not rank documents")

    def classify(
        self, texts: Sequence[str], cancelled: Callable[[], bool] | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        raise NotSupported(f"models of architecture {self._info.architecture} do not classify")

    def stats(self) -> EngineStats:
        return EngineStats() if self._scheduler is None else self._scheduler.stats()

    def trim(self) -> int:
        return 0 if self._scheduler is None else int(self._scheduler.trim())

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keeps `close` from freeing the model under somebody's feet."""
        with self._lock:
            if self._closed:
                raise InvalidArgument("the model is closed")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._idle.notify_all()

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._scheduler is not None:
            self._scheduler.close()
        with self._lock:
            while self._users:
                self._idle.wait()
        if self._embedder is not None:
            self._embedder.close()
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> LlamaEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LlamaGeneration:
    """A running generation: an iterator of events. Dropping it cancels it."""

    def __init__(self, task: Any, scheduler: Any) -> None:
        self._task = task
        self._scheduler = scheduler
        self._done = False
        self._failure: AIAssistantError | None = None
        self._gathered = 0.0

    def __iter__(self) -> LlamaGeneration:
        return self

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        task = self._task
        item: Event | AIAssistantError = task.events.get()
        if task.paused and task.events.qsize() < 64:
            self._scheduler.wake()
        if isinstance(item, AIAssistantError):
            self._done = True
            raise item
        if isinstance(item, Finished):
            self._done = True
        return item

    def gather(self, pace_s: float) -> list[Event]:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._done:
            return []
        wait = self._gathered + pace_s - time.monotonic()
        if wait > 0:
            # Nobody waits at the queue meanwhile, so decoding is not disturbed by waking this thread.
            self._task.ended.wait(wait)
        events = [next(self)]
        while not self._done and not self._task.events.empty():
            try:
                events.append(next(self))
            except AIAssistantError as error:
                self._failure = error
        self._gathered = time.monotonic()
        return events

    def cancel(self) -> None:
        if not self._done:
            self._task.cancelled = True
            self._scheduler.wake()

    def __del__(self) -> None:
        self.cancel()


def _announce(options: LoadOptions, placement: Placement) -> None:
    tell = options.extra.get("placing")
    if callable(tell):
        tell(placement)


def _grammar(request: GenerateRequest, forced: Sequence[Any]) -> str | None:
    if forced:
        from ai_assistant.engines.tools import forced_grammar

        return forced_grammar(forced, request.tool_choice, parallel=request.parallel_tool_calls)
    if request.response_schema is not None:
        return grammar_of(request.response_schema)
    if request.response_regex is not None:
        from ai_assistant.engines.regex_grammar import grammar_of_regex

        return grammar_of_regex(request.response_regex)
    return None


def _output(request: GenerateRequest, functions: Sequence[Any], forced: bool) -> Any:
    from ai_assistant.engines.output import AutoCalls, ForcedCall, PlainOutput

    names = frozenset(str(each["name"]) for each in functions)
    if forced:
        return ForcedCall(names)
    if names and request.response_schema is None and request.response_regex is None:
        return AutoCalls(request.stop, names, parallel=request.parallel_tool_calls)
    return PlainOutput(request.stop, enforced=request.response_schema is not None)
