"""A model's tokenizer: text to tokens, tokens to bytes. May be used from any thread."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ai_assistant.engines.user_text import Piece, Specials
from ai_assistant.errors import InternalError

Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Vocabulary:
    """Wraps the vocabulary of a native model, which must outlive it.

    Args:
        longest: bytes of the longest token; no shorter text can need fewer tokens than its share.
    """

    def __init__(self, lib: Any, model: Any, longest: int) -> None:
        self._lib = lib
        self.native = lib.llama_model_get_vocab(model)
        self.size = int(lib.llama_vocab_n_tokens(self.native))
        self.bos = int(lib.llama_vocab_bos(self.native))
        self.eos = int(lib.llama_vocab_eos(self.native))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(self.native)) and self.bos >= 0
        self._longest = max(1, longest)
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    def fewest_tokens(self, text: str) -> int:
        """A lower bound for the tokens of `text` that costs nothing, to refuse megabytes without reading them."""
        return len(text) // self._longest

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> Tokens:
        """Tokens of `text`, shape (n,).

        Args:
            special: text such as `<|im_end|>` means that token.
            begin: add what the model wants at the beginning of a text (usually BOS).
        """
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8
        buffer = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self.native, raw, len(raw), buffer, room, begin, special)
        if count < 0:
            room = -count
            buffer = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self.native, raw, len(raw), buffer, room, begin, special)
        if count < 0:
            raise InternalError("the tokenizer failed")
        return np.array(buffer[:count], dtype=np.int32)

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens stand for nothing."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._read_piece(token, special=False)
        return found

    def text_of(self, token: int) -> str:
        """A special token's own name, as templates want it; "" if there is no such token."""
        return self._read_piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._lib.llama_token_to_piece(self.native, token, buffer, room, 0, special)
            if count >= 0:
                return bytes(buffer.raw[:count])
            room = -count

    @cached_property
    def specials(self) -> Specials:
        """The control tokens, whose names must not be read as these tokens where a user wrote them."""
        lib = self._lib
        mask = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        found = [each for each in range(self.size) if lib.llama_vocab_get_attr(self.native, each) & mask]
        return Specials(map(self.text_of, found))

    def tokenize_pieces(self, pieces: Sequence[Piece], *, begin: bool = False) -> Tokens:
        """Tokens of a text whose pieces are read each by itself, shape (n,)."""
        read = [
            self.tokenize(each.text, special=each.special, begin=begin and not index)
            for index, each in enumerate(pieces)
        ]
        return np.concatenate(read) if read else np.zeros(0, dtype=np.int32)

    def is_end(self, token: int) -> bool:
        """Whether the model says with this token that it is done."""
        found = self._ends.get(token)
        if found is None:
            found = self._ends[token] = bool(self._lib.llama_vocab_is_eog(self.native, token))
        return found
