"""Chooses the next token of one sequence: the library's C samplers, a grammar, and log-probabilities.

Nothing here loops over the vocabulary in Python. Plain greedy sampling, the commonest case of a
measured appliance, is one numpy argmax over the library's own buffer.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ai_assistant.engines.constraint import Constraint
from ai_assistant.engines.contract import GenerateRequest, TokenLogprob
from ai_assistant.errors import InvalidArgument, InvalidModel

LEAST_LOGPROB = -9999.0
_PENALTY_WINDOW = 1 << 16
"""Tokens of the answer that count for the penalties."""
_COLDEST = 1e-4
"""Temperatures below count as 0: dividing by them leaves the range of a float."""
_MIROSTAT_TOKENS = 100
"""Likeliest tokens from which version 1 estimates the distribution; the library's own default."""
_NO_NUMBER = "the model computes values that are not numbers; its weights are damaged"
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

Row = np.ndarray[Any, np.dtype[np.float32]]
"""Logits of all tokens, shape (vocabulary,)."""


class Scratch:
    """Buffers that all sequences of one engine share, because they are sampled one after the other."""

    def __init__(self, lib: Any, vocabulary: int) -> None:
        self.size = vocabulary
        self._lib = lib
        self._ids = np.arange(vocabulary, dtype=np.int32)
        self.candidates = np.empty(vocabulary, dtype=_CANDIDATE)
        """What the samplers work on, shape (vocabulary,)."""
        self._data = self.candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        self.array = lib.llama_token_data_array()
        self.reference = ctypes.pointer(self.array)
        self._one = lib.llama_token_data()
        self._one_array = lib.llama_token_data_array(ctypes.pointer(self._one), 1, -1, False)
        self._one_reference = ctypes.pointer(self._one_array)
        self._pieces: dict[int, bytes | None] = {}
        self._piece = ctypes.create_string_buffer(256)

    def fill(self, logits: Row) -> None:
        """Take all tokens with their logits."""
        self.candidates["id"] = self._ids
        self.candidates["logit"] = logits
        array = self.array
        array.data, array.size, array.selected, array.sorted = self._data, self.size, -1, False

    def compact(self) -> int:
        """Drop the candidates that are impossible, since not every sampler can bear them; how many are left."""
        left = np.flatnonzero(self.candidates["logit"] != -np.inf)
        self.candidates[: len(left)] = self.candidates[left]
        self.array.size = len(left)
        return len(left)

    def fill_one(self, token: int) -> Any:
        self._one.id, self._one.logit, self._one.p = token, 1.0, 0.0
        self._one_array.size, self._one_array.selected = 1, -1
        return self._one_reference

    @property
    def one_is_allowed(self) -> bool:
        return bool(self._one.logit != -np.inf)

    def piece(self, vocabulary: Any, token: int) -> bytes | None:
        """The bytes that a token shows; None if it has a name but shows nothing, as control tokens do."""
        if token not in self._pieces:
            count = self._lib.llama_token_to_piece(vocabulary, token, self._piece, len(self._piece), 0, False)
            if count < 0:
                self._piece = ctypes.create_string_buffer(-count)
                count = self._lib.llama_token_to_piece(vocabulary, token, self._piece, len(self._piece), 0, False)
            self._pieces[token] = bytes(self._piece.raw[:count]) or None
        return self._pieces[token]


class Logits:
    """Views of the library's output rows. A view is made once per address, since that costs 2 µs."""

    def __init__(self, lib: Any, context: Any, vocabulary: int) -> None:
        get = lib._lib["llama_get_logits_ith"]
        get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_void_p
        self._get: Callable[[Any, int], int | None] = get
        self._context = ctypes.cast(context, ctypes.c_void_p)
        self._row = ctypes.c_float * vocabulary
        self._views: dict[int, Row] = {}

    def row(self, index: int) -> Row:
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

    Args:
        size: tokens of the vocabulary.
        prompt: the tokens before the answer, which the repetition penalty looks at too.

    Raises:
        InvalidArgument: the grammar cannot be followed, or a bias is for no token of this model.
    """

    def __init__(
        self,
        lib: Any,
        vocabulary: Any,
        size: int,
        request: GenerateRequest,
        grammar: str | None,
        prompt: Sequence[int] | np.ndarray[Any, np.dtype[np.int32]] = (),
    ) -> None:
        self._lib = lib
        self._vocabulary = vocabulary
        self._chain: Any = None
        self._grammar: Constraint | None = None
        self.top = request.logprobs
        biases = _biases(request, size)
        # A grammar ends by itself; under it an end that is not allowed to be said would be a dead end.
        self._endless = request.ignore_eos and grammar is None
        self._ends: list[int] = []
        """Tokens that were about to end an answer that must go on."""
        if grammar is not None:
            self._grammar = Constraint(lib, vocabulary, grammar, _source(request))
        try:
            self._chain = chain_of(lib, size, request, biases, prompt)
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        """The grammar has been followed to where only the end can come."""
        return self._grammar is not None and self._grammar.complete

    def choose(self, logits: Row, scratch: Scratch) -> int:
        """The next token, which counts as accepted.

        Raises:
            InvalidArgument: the grammar has become too ambiguous to be followed.
            InvalidModel: the weights compute something that is not a number.
            NotSupported: no token continues what the grammar wants.
        """
        token = self._pick(logits, scratch)
        grammar = self._grammar
        if grammar is not None and not grammar.allows(token, scratch):
            token = self._pick(logits, scratch, masked=True)
            if not grammar.allows(token, scratch):
                token = self._pick(logits, scratch, masked=True, strictly=True)
        while self._endless and self._lib.llama_vocab_is_eog(self._vocabulary, token):
            self._ends.append(token)
            token = self._pick(logits, scratch)
        if not math.isfinite(logits[token]):
            raise InvalidModel(_NO_NUMBER)
        if grammar is not None:
            grammar.accept(token, scratch)
        if self._chain is not None:
            self._lib.llama_sampler_accept(self._chain, token)
        return token

    def _pick(self, logits: Row, scratch: Scratch, *, masked: bool = False, strictly: bool = False) -> int:
        if not masked and self._chain is None and not self._ends:
            return int(logits.argmax())
        # The samplers sort, and sorting what cannot be compared may end anywhere.
        if not math.isfinite(logits.max()):
            raise InvalidModel(_NO_NUMBER)
        scratch.fill(logits)
        if self._ends:
            scratch.candidates["logit"][self._ends] = -np.inf
        if masked:
            assert self._grammar is not None
            count = self._grammar.mask(scratch, strictly=strictly)
        else:
            count = scratch.compact() if self._ends else scratch.size
        if self._chain is None:
            left = scratch.candidates[:count]
            return int(left["id"][left["logit"].argmax()])
        array = scratch.array
        self._lib.llama_sampler_apply(self._chain, scratch.reference)
        if not 0 <= array.selected < array.size:
            raise InvalidModel(_NO_NUMBER)
        return int(array.data[array.selected].id)

    def close(self) -> None:
        """Free what is native; idempotent."""
        if self._grammar is not None:
            self._grammar.close()
        if self._chain is not None:
            self._lib.llama_sampler_free(self._chain)
        self._chain = None


def _source(request: GenerateRequest) -> str:
    """The parameter that a request's grammar comes from."""
    if request.tools and request.tool_choice not in ("none", "auto"):
        return "tools"
    return "response_regex" if request.response_regex is not None else "response_schema"


def _biases(request: GenerateRequest, size: int) -> list[tuple[int, float]]:
    out: list[tuple[int, float]] = []
    for name, bias in request.logit_bias.items():
        param = f"logit_bias.{str(name)[:20]}"
        if not str(name).isascii() or not str(name).isdecimal() or int(name) >= size:
            raise InvalidArgument(
                f"logit_bias names {str(name)[:20]!r}, but the tokens of this model are 0 to {size - 1}", param=param
            )
        if not math.isfinite(bias):
            raise InvalidArgument("a bias must be a number between -100 and 100", param=param)
        out.append((int(name), bias))
    return out


def chain_of(
    lib: Any,
    size: int,
    request: GenerateRequest,
    biases: Sequence[tuple[int, float]],
    prompt: Sequence[int] | np.ndarray[Any, np.dtype[np.int32]],
) -> Any:
    """The samplers that a request asks for, in the library's own order; None if that is the greatest logit."""
    repeats = request.repeat_penalty != 1 and request.repeat_last_n > 0
    counts = bool(request.frequency_penalty or request.presence_penalty)
    greedy = request.temperature < _COLDEST
    if greedy and not (biases or repeats or counts):
        return None
    parameters = lib.llama_sampler_chain_default_params()
    parameters.no_perf = True
    chain = lib.llama_sampler_chain_init(parameters)

    def add(sampler: Any) -> None:
        lib.llama_sampler_chain_add(chain, sampler)

    if biases:
        native = (lib.llama_logit_bias * len(biases))(*biases)
        add(lib.llama_sampler_init_logit_bias(size, len(biases), native))
    if repeats:
        penalty = lib.llama_sampler_init_penalties(size, request.repeat_last_n, request.repeat_penalty, 0.0, 0.0)
        for token in prompt[-request.repeat_last_n :]:
            lib.llama_sampler_accept(penalty, int(token))
        add(penalty)
    if counts:
        frequency, presence = request.frequency_penalty, request.presence_penalty
        add(lib.llama_sampler_init_penalties(size, _PENALTY_WINDOW, 1.0, frequency, presence))
    seed = _seed(request.seed)
    if greedy:
        add(lib.llama_sampler_init_greedy())
        return chain
    if not request.mirostat:
        if request.top_k:
            add(lib.llama_sampler_init_top_k(request.top_k))
        if request.typical_p < 1:
            add(lib.llama_sampler_init_typical(request.typical_p, 1))
        if request.top_p < 1:
            add(lib.llama_sampler_init_top_p(request.top_p, 1))
        if request.min_p > 0:
            add(lib.llama_sampler_init_min_p(request.min_p, 1))
    if request.temperature != 1:
        add(lib.llama_sampler_init_temp(request.temperature))
    if request.mirostat == 1:
        tau, eta = request.mirostat_tau, request.mirostat_eta
        add(lib.llama_sampler_init_mirostat(size, seed, tau, eta, _MIROSTAT_TOKENS))
    elif request.mirostat == 2:
        add(lib.llama_sampler_init_mirostat_v2(seed, request.mirostat_tau, request.mirostat_eta))
    else:
        add(lib.llama_sampler_init_dist(seed))
    return chain


def _seed(seed: int | None) -> int:
    # 2³² − 1 means "random" to the library, so it is never passed on as somebody's seed.
    return secrets.randbelow(0xFFFFFFFE) if seed is None else seed % 0xFFFFFFFE


def logprobs_of(logits: Row, token: int, top: int, piece: Callable[[int], bytes]) -> TokenLogprob:
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
