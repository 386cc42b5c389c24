"""Chooses the next token of one sequence: the library's C samplers, a grammar, and log-probabilities.

Nothing here loops over the vocabulary in Python. Plain greedy sampling, the commonest case of a
measured appliance, is one numpy argmax over the library's own buffer.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from ai_assistant.engines.contract import GenerateRequest, TokenLogprob
from ai_assistant.errors import InvalidArgument, InvalidModel, NotSupported

LEAST_LOGPROB = -9999.0
_PENALTY_WINDOW = 1 << 16
"""Tokens of the answer that count for the penalties."""
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Scratch:
    """Buffers that all sequences of one engine share, because they are sampled one after the other."""

    def __init__(self, lib: Any, vocabulary: int) -> None:
        self.size = vocabulary
        self._ids = np.arange(vocabulary, dtype=np.int32)
        self._candidates = np.empty(vocabulary, dtype=_CANDIDATE)
        self._data = self._candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        self.array = lib.llama_token_data_array()
        self.reference = ctypes.pointer(self.array)
        self._one = lib.llama_token_data()
        self._one_array = lib.llama_token_data_array(ctypes.pointer(self._one), 1, -1, False)
        self._one_reference = ctypes.pointer(self._one_array)

    def fill(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
        """All tokens with their logits, as the samplers want them."""
        self._candidates["id"] = self._ids
        self._candidates["logit"] = logits
        array = self.array
        array.data, array.size, array.selected, array.sorted = self._data, self.size, -1, False
        return self.reference

    def fill_one(self, token: int) -> Any:
        self._one.id, self._one.logit, self._one.p = token, 1.0, 0.0
        self._one_array.size, self._one_array.selected = 1, -1
        return self._one_reference

    @property
    def one_is_allowed(self) -> bool:
        return bool(self._one.logit != -np.inf)


class Logits:
    """Views of the library's output rows. A view is made once per address, since that costs 2 µs."""

    def __init__(self, lib: Any, context: Any, vocabulary: int) -> None:
        get = lib._lib["llama_get_logits_ith"]
        get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_void_p
        self._get: Callable[[Any, int], int | None] = get
        self._context = ctypes.cast(context, ctypes.c_void_p)
        self._row = ctypes.c_float * vocabulary
        self._views: dict[int, np.ndarray[Any, np.dtype[np.float32]]] = {}

    def row(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits of the batch's token `index`, shape (vocabulary,); valid until the next decode."""
        address = self._get(self._context, index)
        if not address:
            raise InvalidModel("the model gave no output")
        view = self._views.get(address)
        if view is None:
            if len(self._views) > 1024:
                self._views.clear()
            view = np.frombuffer(memoryview(self._row.from_address(address)), dtype=np.float32)
            self._views[address] = view
        return view


class Sampler:
    """The choice for one sequence. Freed by `close`; not for several threads at once.

    Raises:
        InvalidArgument: the grammar does not parse.
    """

    def __init__(self, lib: Any, vocabulary: Any, size: int, request: GenerateRequest, grammar: str | None) -> None:
        self._lib = lib
        self._chain: Any = None
        self._grammar: Any = None
        self.top = request.logprobs
        if grammar is not None:
            self._grammar = lib.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
            if not self._grammar:
                raise InvalidArgument("the schema is too complex to be enforced", param="response_schema")
        if request.temperature > 0 or request.frequency_penalty or request.presence_penalty:
            self._chain = _chain(lib, size, request)

    def choose(self, logits: np.ndarray[Any, np.dtype[np.float32]], scratch: Scratch) -> int:
        """The next token, which counts as accepted.

        Raises:
            InvalidModel: the weights compute something that is not a number.
            NotSupported: no token continues what the grammar wants.
        """
        token = self._pick(logits, scratch, masked=False)
        if self._grammar is not None and not self._allowed(token, scratch):
            token = self._pick(logits, scratch, masked=True)
        if not np.isfinite(logits[token]):
            raise InvalidModel("the model computes values that are not numbers; its weights are damaged")
        if self._chain is not None:
            self._lib.llama_sampler_accept(self._chain, token)
        if self._grammar is not None:
            self._lib.llama_sampler_accept(self._grammar, token)
        return token

    def _pick(self, logits: np.ndarray[Any, np.dtype[np.float32]], scratch: Scratch, *, masked: bool) -> int:
        if not masked and self._chain is None:
            return int(logits.argmax())
        lib = self._lib
        reference = scratch.fill(logits)
        array = scratch.array
        if masked:
            lib.llama_sampler_apply(self._grammar, reference)
        if self._chain is None:
            candidates = scratch._candidates
            at = int(candidates["logit"].argmax())
            token, value = int(candidates["id"][at]), float(candidates["logit"][at])
        else:
            lib.llama_sampler_apply(self._chain, reference)
            if not 0 <= array.selected < array.size:
                raise InvalidModel("the model computes values that are not numbers; its weights are damaged")
            chosen = array.data[array.selected]
            token, value = int(chosen.id), float(chosen.logit)
        if masked and not np.isfinite(value):
            raise NotSupported("this model's vocabulary cannot express what the schema demands")
        return token

    def _allowed(self, token: int, scratch: Scratch) -> bool:
        # One candidate is checked in microseconds, the whole vocabulary takes milliseconds; and the
        # model's own choice is nearly always allowed.
        self._lib.llama_sampler_apply(self._grammar, scratch.fill_one(token))
        return scratch.one_is_allowed

    def close(self) -> None:
        for each in (self._chain, self._grammar):
            if each is not None:
                self._lib.llama_sampler_free(each)
        self._chain = self._grammar = None


def _chain(lib: Any, vocabulary: int, request: GenerateRequest) -> Any:
    parameters = lib.llama_sampler_chain_default_params()
    parameters.no_perf = True
    chain = lib.llama_sampler_chain_init(parameters)

    def add(sampler: Any) -> None:
        lib.llama_sampler_chain_add(chain, sampler)

    if request.frequency_penalty or request.presence_penalty:
        frequency, presence = request.frequency_penalty, request.presence_penalty
        add(lib.llama_sampler_init_penalties(vocabulary, _PENALTY_WINDOW, 1.0, frequency, presence))
    if request.temperature == 0:
        add(lib.llama_sampler_init_greedy())
        return chain
    if request.top_k:
        add(lib.llama_sampler_init_top_k(request.top_k))
    if request.top_p < 1:
        add(lib.llama_sampler_init_top_p(request.top_p, 1))
    if request.min_p > 0:
        add(lib.llama_sampler_init_min_p(request.min_p, 1))
    if request.temperature != 1:
        add(lib.llama_sampler_init_temp(request.temperature))
    add(lib.llama_sampler_init_dist(_seed(request.seed)))
    return chain


def _seed(seed: int | None) -> int:
    # 2³² − 1 means "random" to the library, so it is never passed on as somebody's seed.
    return secrets.randbelow(0xFFFFFFFE) if seed is None else seed % 0xFFFFFFFE


def logprobs_of(
    logits: np.ndarray[Any, np.dtype[np.float32]], token: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """The log-probability of `token` under the model alone (before temperature, cuts and grammar), and of
    the `top` likeliest tokens."""
    highest = logits.max()
    total = float(highest) + float(np.log(np.exp(logits - highest, dtype=np.float64).sum()))
    best: list[TokenLogprob] = []
    if top:
        count = min(top, len(logits))
        chosen = np.argpartition(logits, -count)[-count:]
        for each in chosen[np.argsort(-logits[chosen], kind="stable")]:
            best.append(_entry(int(each), float(logits[each]) - total, piece))
    return _entry(token, float(logits[token]) - total, piece, tuple(best))


def _entry(
    token: int, logprob: float, piece: Callable[[int], bytes], top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    raw = piece(token)
    # JSON has no infinity, and a masked token has that.
    return TokenLogprob(raw.decode(errors="replace"), tuple(raw), max(logprob, LEAST_LOGPROB), top)
