"""The onnx engine: vectors, ranking and classification of texts by BERT-like encoders, through ONNX Runtime.

Texts of a request are sorted by length and computed in batches, so that little is padded; requests of several
threads take turns between batches. Everything a caller may do wrong is checked before anything is computed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ai_assistant.engines import memory
from ai_assistant.engines.contract import EngineStats, GenerateRequest, Generation, LoadOptions, ModelInfo
from ai_assistant.engines.gguf import opened
from ai_assistant.engines.hetero import Wish
from ai_assistant.engines.onnx_hetero import PLAN_BYTES, Divided
from ai_assistant.engines.onnx_package import MODEL, Package, folder_package, is_archive, package_of
from ai_assistant.engines.onnx_rules import Checked, Pooling, Task, check
from ai_assistant.engines.onnx_session import Session
from ai_assistant.engines.onnx_tokenizer import Encoded
from ai_assistant.errors import Cancelled, ContextOverflow, InvalidArgument, InvalidModel, NotSupported, OutOfMemory

MAX_TEXTS = 16_384
MAX_ROWS = 64
MAX_CHARACTERS = 4 << 20
"""Of one text; longer ones are longer than any model reads."""
_ASKED_EVERY = 64
"""Texts between two questions whether the work was cancelled: they are tokenized in microseconds."""
Floats = npt.NDArray[np.float32]
Asked = Callable[[], bool] | None


class OnnxEngine:
    """A loaded ONNX model; see `Engine` in contract.py for what each method promises. Made by `open`."""

    @classmethod
    def open(
        cls,
        path_or_fd: int | str | os.PathLike[str],
        options: LoadOptions | None = None,
        progress: Callable[[float], None] | None = None,
        files: Mapping[str, int] = MappingProxyType({}),
    ) -> OnnxEngine:
        """Check and load a model.

        Args:
            path_or_fd: a folder; an uncompressed .tar or .zip of one; model.onnx in such a folder; or a descriptor of
                the archive or, together with `files`, of model.onnx. Descriptors are not needed afterwards.
            files: descriptors of the other files by name.

        Raises:
            InvalidModel: something is damaged or missing.
            NotSupported: a kind of model or tokenizer that is not run here, or no ONNX Runtime.
            OutOfMemory: it does not fit `memory_limit_bytes` or the machine.
        """
        options = options or LoadOptions()
        with _package(path_or_fd, files) as package:
            checked = check(package)
            _check_memory(checked, options)
            if progress is not None:
                progress(0.1)
            session = Session(package.member(MODEL), checked.file, checked.plan, options.threads)
            # Read again, taken apart, put together for a device, and what that one makes of it.
            needed = 2 * checked.file.size_bytes + checked.memory.compute_bytes + PLAN_BYTES
            pad = checked.tokenizer.pad()
            divided = Divided(package.member(MODEL), checked.plan, options, pad=pad, needed_bytes=needed)
        engine = cls(checked, session, options, divided)
        if progress is not None:
            progress(0.9)
        try:
            engine._try_out()
        except BaseException:
            engine.close()
            raise
        if progress is not None:
            progress(1.0)
        return engine

    def __init__(self, checked: Checked, session: Session, options: LoadOptions, divided: Divided) -> None:
        self._session: Session | None = session
        self._divided = divided
        self._tokenizer = checked.tokenizer
        self._plan = checked.plan
        self._info = checked.info
        self._names = [each.name for each in checked.plan.inputs]
        self._length = min(checked.plan.length, options.context_length or checked.plan.length)
        self._budget = max(options.batch_tokens, 1)
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._running = 0
        self._shrink = False
        self._closed = False
        self.steps = 0
        """Batches computed so far."""
        self.broken = False

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def context_length(self) -> int:
        """Tokens that a text may have, special ones included."""
        return self._length

    def generate(self, request: GenerateRequest) -> Generation:
        raise NotSupported("this model makes no text", hint=f"it can {self._plan.task}")

    def wished(self, wish: Wish) -> Wished:
        """The engine on the devices that a request wishes for; see `Divisible` in hetero.py."""
        return Wished(self, wish)

    def embed(
        self, texts: Sequence[str], cancelled: Asked = None, wish: Wish | None = None
    ) -> tuple[list[list[float]], int]:
        self._wants(Task.EMBED, "make vectors")
        encoded = self._texts(texts, "input", cancelled)
        vectors: list[list[float]] = [[]] * len(encoded)
        for rows, output, mask in self._computed(encoded, cancelled, wish):
            pooled = _pooled(output, mask, self._plan.pooling)
            norms = np.linalg.norm(pooled.astype(np.float64), axis=1, keepdims=True)
            if not norms.all():
                raise InvalidModel("the model computes vectors of length 0; its weights are damaged")
            for row, vector in zip(rows, (pooled / norms).astype(np.float32).tolist(), strict=True):
                vectors[row] = vector
        return vectors, _count(encoded)

    def rerank(
        self, query: str, documents: Sequence[str], cancelled: Asked = None, wish: Wish | None = None
    ) -> tuple[list[float], int]:
        self._wants(Task.RERANK, "rank documents")
        _check_count(documents, "documents")
        tokenizer = self._tokenizer
        room = self._length - tokenizer.added_to_pair
        asked = self._tokens(query, "query", room)
        if not asked:
            raise InvalidArgument("query is empty", param="query")
        if len(asked) >= room:
            raise ContextOverflow(
                f"query has at least {len(asked)} tokens and leaves no room for a document; "
                f"the model reads {self._length} in all",
                hint="shorten the query",
                param="query",
            )
        room -= len(asked)
        encoded: list[Encoded] = []
        for index, document in enumerate(documents):
            _ask(cancelled, index)
            # What does not fit of a document is left out; the query always counts whole.
            encoded.append(tokenizer.pair(asked, self._tokens(document, f"documents[{index}]", room)[:room]))
        scores = [0.0] * len(encoded)
        for rows, output, _mask in self._computed(encoded, cancelled, wish):
            for row, score in zip(rows, _sigmoid(output[:, 0]).tolist(), strict=True):
                scores[row] = score
        return scores, _count(encoded)

    def classify(
        self, texts: Sequence[str], cancelled: Asked = None, wish: Wish | None = None
    ) -> tuple[list[list[tuple[str, float]]], int]:
        self._wants(Task.CLASSIFY, "classify")
        plan = self._plan
        encoded = self._texts(texts, "input", cancelled)
        found: list[list[tuple[str, float]]] = [[]] * len(encoded)
        for rows, output, _mask in self._computed(encoded, cancelled, wish):
            if output.shape[1] != len(plan.labels):
                raise InvalidModel(f"the model gives {output.shape[1]} values for {len(plan.labels)} labels")
            shares = _sigmoid(output) if plan.independent else _softmax(output)
            for row, share in zip(rows, shares.tolist(), strict=True):
                found[row] = sorted(zip(plan.labels, share, strict=True), key=lambda each: -each[1])
        return found, _count(encoded)

    def tokenize(self, text: str) -> list[int]:
        """Without the special tokens that surround a text."""
        if len(text) > MAX_CHARACTERS:
            raise InvalidArgument(f"the text has {len(text)} characters, more than {MAX_CHARACTERS}", param="text")
        return self._tokenizer.tokens(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        for index, each in enumerate(tokens):
            if isinstance(each, bool) or not isinstance(each, int) or self._tokenizer.text([each]) is None:
                raise InvalidArgument(f"tokens[{index}] is no token of this model", param=f"tokens[{index}]")
        return self._tokenizer.text(tokens) or ""

    def stats(self) -> EngineStats:
        return EngineStats(running=self._running, waiting=self._waiting, sequences=1)

    def trim(self) -> int:
        """Give plans and the working memory of earlier batches back; bytes as the kernel counts them."""
        with self._turn:
            if self._session is None:
                return 0
            before = _resident_bytes()
            self._divided.drop()
            self._shrink = True
            self._run([self._tokenizer.single([])])
            return max(0, before - _resident_bytes())

    def close(self) -> None:
        self._closed = True
        with self._turn:
            self._session = None
        self._divided.close()

    def __enter__(self) -> OnnxEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- texts

    def _wants(self, task: Task, what: str) -> None:
        if self._closed:
            raise InvalidArgument("the model is closed")
        if self._plan.task is not task:
            raise NotSupported(f"this model does not {what}", hint=f"it can {self._plan.task}")

    def _tokens(self, text: str, what: str, limit: int) -> list[int]:
        if len(text) > MAX_CHARACTERS:
            raise ContextOverflow(
                f"{what} has {len(text)} characters; the model reads {self._length} tokens",
                param=what.partition("[")[0],
            )
        return self._tokenizer.tokens(text, limit)

    def _texts(self, texts: Sequence[str], param: str, cancelled: Asked) -> list[Encoded]:
        _check_count(texts, param)
        room = self._length - self._tokenizer.added
        encoded: list[Encoded] = []
        for index, text in enumerate(texts):
            _ask(cancelled, index)
            tokens = self._tokens(text, f"{param}[{index}]", room)
            if len(tokens) > room:
                raise ContextOverflow(
                    f"{param}[{index}] has more than {room} tokens, the most that the model reads",
                    hint="cut it into pieces",
                    param=param,
                )
            if not tokens:
                raise InvalidArgument(f"{param}[{index}] is empty", param=param)
            encoded.append(self._tokenizer.single(tokens))
        return encoded

    # ---- batches

    def _computed(
        self, encoded: Sequence[Encoded], cancelled: Asked, wish: Wish | None = None
    ) -> Iterator[tuple[list[int], Floats, npt.NDArray[np.int64]]]:
        """(rows of `encoded`, the output for them, their mask), batch by batch."""
        with self._counting:
            self._waiting += 1
        try:
            for rows in batches([len(each.ids) for each in encoded], self._budget):
                _ask(cancelled)
                # Before its turn: where a plan has to be made, others need not wait for that.
                longest = max(len(encoded[row].ids) for row in rows)
                lease = nullcontext() if wish is None else self._divided.lease(wish, len(rows), max(1, longest))
                with lease as run, self._turn:
                    _ask(cancelled)
                    if self._session is None:
                        raise Cancelled("the model was closed")
                    with self._counting:
                        self._waiting, self._running = self._waiting - 1, self._running + 1
                    try:
                        output, mask = self._run([encoded[row] for row in rows], run)
                    finally:
                        with self._counting:
                            self._waiting, self._running = self._waiting + 1, self._running - 1
                yield rows, output, mask
        finally:
            with self._counting:
                self._waiting -= 1

    def _run(
        self, encoded: Sequence[Encoded], run: Callable[[Mapping[str, Any]], Floats] | None = None
    ) -> tuple[Floats, npt.NDArray[np.int64]]:
        """
        Args:
            run: what computes; default: the session.
        """
        assert self._session is not None
        shape = len(encoded), max(1, max(len(each.ids) for each in encoded))
        ids = np.full(shape, self._tokenizer.pad(), np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        for row, each in enumerate(encoded):
            count = len(each.ids)
            ids[row, :count], mask[row, :count], types[row, :count] = each.ids, 1, each.types
        values: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        values["position_ids"] = np.broadcast_to(np.arange(shape[1]), shape)
        given = {name: values[name] for name in self._names}
        if run is not None:
            output = run(given)
        else:
            shrink, self._shrink = self._shrink, False
            output = self._session.run(given, shrink=shrink)
        self.steps += 1
        real = output if output.ndim == 2 else output[mask.astype(bool)]
        if not np.isfinite(real).all():
            raise InvalidModel("the model computes values that are not numbers; its weights are damaged")
        return output, mask

    def _try_out(self) -> None:
        """Two texts of different lengths: a graph whose shapes do not work out should fail now, not at a request."""
        number = self._tokenizer.pad()
        pair = self._plan.task is Task.RERANK
        tokenizer = self._tokenizer
        texts = [[number], [number] * 3]
        with self._turn:
            output, _ = self._run(
                [tokenizer.pair([number], each) if pair else tokenizer.single(each) for each in texts]
            )
        if pair and output.shape[1] != 1:
            raise InvalidModel(f"a model that ranks gives one value for a pair, not {output.shape[1]}")
        if self._plan.task is Task.CLASSIFY and output.shape[1] != len(self._plan.labels):
            raise InvalidModel(f"the model gives {output.shape[1]} values for {len(self._plan.labels)} labels")


class Wished:
    """An engine as one request wants it: `Reader` in hetero.py."""

    def __init__(self, engine: OnnxEngine, wish: Wish) -> None:
        self._engine = engine
        self._wish = wish

    def embed(self, texts: Sequence[str], cancelled: Asked = None) -> tuple[list[list[float]], int]:
        return self._engine.embed(texts, cancelled, self._wish)

    def rerank(self, query: str, documents: Sequence[str], cancelled: Asked = None) -> tuple[list[float], int]:
        return self._engine.rerank(query, documents, cancelled, self._wish)

    def classify(self, texts: Sequence[str], cancelled: Asked = None) -> tuple[list[list[tuple[str, float]]], int]:
        return self._engine.classify(texts, cancelled, self._wish)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Which texts are computed together: of similar length, and at most `budget` tokens with what is padded.

    The longest come first, so that memory is asked for once and a text too many for the memory fails at once. A text
    longer than the budget is alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    at = 0
    while at < len(order):
        fitting = min(MAX_ROWS, max(1, budget // max(1, lengths[order[at]])))
        yield order[at : at + fitting]
        at += fitting


@contextmanager
def _package(path_or_fd: int | str | os.PathLike[str], files: Mapping[str, int]) -> Iterator[Package]:
    if isinstance(path_or_fd, int):
        yield package_of(path_or_fd, files)
        return
    path = Path(path_or_fd)
    if path.is_dir():
        with folder_package(path) as package:
            yield package
        return
    with opened(path) as fd:
        if files or is_archive(os.pread(fd, 512, 0)):
            yield package_of(fd, files)
            return
    # Hubs keep model.onnx in a folder of its own below everything else.
    with folder_package(path.parent.parent if path.parent.name == "onnx" else path.parent, path) as package:
        yield package


def _check_memory(checked: Checked, options: LoadOptions) -> None:
    needed = memory.estimate(checked.memory, options).total_bytes
    if options.memory_limit_bytes and needed > options.memory_limit_bytes:
        raise OutOfMemory(
            f"the model needs about {needed} bytes of memory; the limit is {options.memory_limit_bytes}",
            hint="unload another model",
        )


def _check_count(texts: Sequence[str], param: str) -> None:
    if not texts or len(texts) > MAX_TEXTS:
        raise InvalidArgument(f"give 1 to {MAX_TEXTS} texts, not {len(texts)}", param=param)


def _ask(cancelled: Asked, index: int = 0) -> None:
    if cancelled is not None and index % _ASKED_EVERY == 0 and cancelled():
        raise Cancelled("the request was cancelled")


def _count(encoded: Sequence[Encoded]) -> int:
    return sum(len(each.ids) for each in encoded)


def _pooled(output: Floats, mask: npt.NDArray[np.int64], pooling: Pooling) -> Floats:
    if pooling is Pooling.NONE:
        return output
    if pooling is Pooling.CLS:
        return output[:, 0]
    if pooling is Pooling.LAST:
        return np.asarray(output[np.arange(len(output)), mask.sum(axis=1) - 1])
    weight = mask[:, :, None].astype(np.float32)
    # The rows of padding may hold anything, and zero times anything is not always zero.
    return np.asarray(np.where(weight > 0, output, 0).sum(axis=1) / weight.sum(axis=1))


def _sigmoid(values: Floats) -> npt.NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(values.astype(np.float64), -500, 500))))


def _softmax(values: Floats) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
