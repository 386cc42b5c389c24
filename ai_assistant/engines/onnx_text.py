"""Text as BERT's tokenizers see it before they cut it into pieces: cleaned, plain letters, words and punctuation apart.

The rules are those of `BertNormalizer` and `BertPreTokenizer` in a `tokenizer.json`. Each acts on single characters
(apart from the decomposition of accents), so it is a table that fills itself as characters turn up.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

_TABLE_ENTRIES = 1 << 16
_REPLACEMENT = 0xFFFD
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
"""Blocks of Chinese characters, each of which is a word. BERT's own list ends the sixth at 0x2B820, and the tokenizers
that models are published with begin it at 0x2B920: what is in files counts."""
_SPACES = frozenset("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)
"""White_Space in Unicode, which is not quite `str.isspace`."""


class _Table(dict[int, "str | int | None"]):
    """A table for `str.translate` that asks `rule` about each character once."""

    def __init__(self, rule: Callable[[str], str | None]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str | int | None:
        if len(self) >= _TABLE_ENTRIES:
            self.clear()
        found = self[code] = self._rule(chr(code))
        return found


@dataclass(frozen=True, slots=True)
class BertText:
    """The settings of a normalizer and what they do to text."""

    clean: bool = True
    """Drop control characters; every kind of white space becomes a space."""
    cjk: bool = True
    """Chinese characters become words of their own."""
    strip_accents: bool = True
    lowercase: bool = True
    _first: _Table = field(init=False, repr=False, compare=False)
    _accents: _Table = field(init=False, repr=False, compare=False)
    _split: _Table = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_first", _Table(self._cleaned))
        object.__setattr__(self, "_accents", _Table(lambda each: None if unicodedata.category(each) == "Mn" else each))
        object.__setattr__(self, "_split", _Table(_apart))

    def normalize(self, text: str) -> str:
        if not text.isascii() or self.clean:
            text = text.translate(self._first)
        if self.strip_accents and not text.isascii():
            text = unicodedata.normalize("NFD", text).translate(self._accents)
        if self.lowercase:
            # Python makes a capital sigma at the end of a word another letter; here each letter is on its own.
            text = "".join(map(str.lower, text)) if "Σ" in text else text.lower()
        return text

    def words(self, normalized: str) -> list[str]:
        """Words and single punctuation marks, in order."""
        return [each for each in normalized.translate(self._split).split(" ") if each]

    def _cleaned(self, character: str) -> str | None:
        if self.clean:
            if character in "\t\n\r":
                return " "
            if character == "\0" or ord(character) == _REPLACEMENT or unicodedata.category(character) in _CONTROL:
                return None
            if character in _SPACES:
                return " "
        if self.cjk and any(low <= ord(character) <= high for low, high in _CJK):
            return f" {character} "
        return character


_CONTROL = ("Cc", "Cf", "Co", "Cs")


def _apart(character: str) -> str:
    if character in _SPACES:
        return " "
    if character in string.punctuation or unicodedata.category(character).startswith("P"):
        return f" {character} "
    return character
