"""A grammar that one answer must follow: the native matcher, and what it leaves to be watched."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ai_assistant.engines.gbnf import TooComplex, Walk, parsed
from ai_assistant.errors import InvalidArgument, NotSupported

if TYPE_CHECKING:
    from ai_assistant.engines.sampling import Scratch


class Constraint:
    """Tells which tokens may come next. Freed by `close`; not for several threads at once.

    The native matcher sees tokens as they are named, and bytes loosely. So beside it every token must show what
    it is named (a control token within a string would vanish from the answer), and be UTF-8 together with what
    came before.

    Args:
        param: the parameter of the request that the grammar comes from.

    Raises:
        InvalidArgument: following the grammar would take too much time or memory.
    """

    def __init__(self, lib: Any, vocabulary: Any, grammar: str, param: str) -> None:
        self._lib = lib
        self._vocabulary = vocabulary
        self._param = param
        self._native: Any = None
        with self._named():
            self._walk = Walk(parsed(grammar))
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._ended = False
        self._native = lib.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
        if not self._native:
            raise InvalidArgument("what is asked for is too complex to be enforced", param=param)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except TooComplex as error:
            error.param = self._param
            raise

    @property
    def complete(self) -> bool:
        """Nothing but the end may follow."""
        return self._ended or self._walk.must_end

    def allows(self, token: int, scratch: Scratch) -> bool:
        # One candidate is checked in microseconds, the whole vocabulary takes milliseconds; and the
        # model's own choice is nearly always allowed.
        self._lib.llama_sampler_apply(self._native, scratch.fill_one(token))
        return scratch.one_is_allowed and self._shows(token, scratch)

    def _shows(self, token: int, scratch: Scratch) -> bool:
        if self._lib.llama_vocab_is_eog(self._vocabulary, token):
            return True
        piece = scratch.piece(self._vocabulary, token)
        return piece is not None and self._continues(piece)

    def _continues(self, piece: bytes) -> bool:
        before = self._decoder.getstate()
        try:
            self._decoder.decode(piece)
            begun = self._decoder.getstate()[0]
        except UnicodeDecodeError:
            return False
        finally:
            self._decoder.setstate(before)
        # Half of a pair of UTF-16 is refused at its third byte only, and then nothing could follow.
        return not (begun[:1] == b"\xed" and begun[1:2] >= b"\xa0")

    def mask(self, scratch: Scratch, *, strictly: bool) -> int:
        """Leave only the tokens that may come next among the candidates, all of which are there.

        Args:
            strictly: look at each token's bytes too, which takes some milliseconds more.

        Returns how many are left.

        Raises:
            NotSupported: none is.
        """
        self._lib.llama_sampler_apply(self._native, scratch.reference)
        if strictly:
            left = np.flatnonzero(scratch.candidates["logit"] != -np.inf)
            unfit = [token for token in left.tolist() if not self._shows(token, scratch)]
            scratch.candidates["logit"][unfit] = -np.inf
        count = scratch.compact()
        if not count:
            raise NotSupported("this model's vocabulary cannot express what the schema demands")
        return count

    def accept(self, token: int, scratch: Scratch) -> None:
        """Go on with a token that is allowed.

        Raises:
            InvalidArgument: there are too many ways now in which the answer may have come about.
        """
        if self._lib.llama_vocab_is_eog(self._vocabulary, token):
            self._ended = True
        else:
            piece = scratch.piece(self._vocabulary, token)
            assert piece is not None
            # Counted here first: the library has no limit.
            with self._named():
                self._walk.feed(self._decoder.decode(piece))
        self._lib.llama_sampler_accept(self._native, token)

    def close(self) -> None:
        if self._native is not None:
            self._lib.llama_sampler_free(self._native)
        self._native = None
