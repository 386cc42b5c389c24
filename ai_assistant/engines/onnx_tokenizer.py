"""Reads a `tokenizer.json` of the BERT family and turns text into the tokens that its models were trained on.

Debian has no package of the `tokenizers` library, and building it would bring a Rust toolchain into the image for
the one algorithm that small embedding and ranking models use. So this is WordPiece alone: what a file wants beyond
that is `NotSupported` with its name, never a guess. Tests compare every token with that library's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ai_assistant.engines.onnx_text import BertText
from ai_assistant.errors import InvalidModel, NotSupported

MAX_BYTES = 16 << 20
MAX_TOKENS = 1 << 20
_MAX_WORD = 1000
_CACHED_WORDS = 1 << 16
_HINT = "models with a BERT tokenizer (WordPiece) work, for example MiniLM, BGE, E5 and GTE in English"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a text or pair, special ones included, and to which of the two each belongs (0 or 1)."""

    ids: list[int]
    types: list[int]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of what surrounds texts: a special token's numbers, or (`text` 0, 1) the place of a text."""

    type: int
    ids: tuple[int, ...] = ()
    text: int = -1


class Tokenizer:
    """A WordPiece tokenizer; safe to use from several threads."""

    def __init__(self, data: bytes) -> None:
        """
        Raises:
            InvalidModel: the file is damaged.
            NotSupported: it is another kind of tokenizer.
        """
        values = _object(_parsed(data), "the tokenizer")
        model = _object(values.get("model"), "the tokenizer's model")
        if model.get("type", "WordPiece") != "WordPiece":
            raise NotSupported(f"tokenizers of type {str(model.get('type'))[:40]} are not supported", hint=_HINT)
        self._vocabulary = _vocabulary(model.get("vocab"))
        self._prefix = _string(model.get("continuing_subword_prefix", "##"), "continuing_subword_prefix")
        self._longest = _number(model.get("max_input_chars_per_word", 100), "max_input_chars_per_word", 1, _MAX_WORD)
        unknown = _string(model.get("unk_token", "[UNK]"), "unk_token")
        if unknown not in self._vocabulary:
            raise InvalidModel(f"the tokenizer's unknown token {unknown[:40]!r} is not in its vocabulary")
        self._unknown = self._vocabulary[unknown]
        self._text = _normalizer(values.get("normalizer"))
        _only(values.get("pre_tokenizer"), ("BertPreTokenizer",), "pre-tokenizer")
        _only(values.get("decoder"), ("WordPiece", None), "decoder")
        self._added = _Added(values.get("added_tokens") or [], self._text)
        self._single, self._pair = _templates(values.get("post_processor"), {**self._vocabulary, **self._added.ids})
        self._texts = {number: text for text, number in {**self._vocabulary, **self._added.ids}.items()}
        self._words: dict[str, tuple[int, ...]] = {}

    @property
    def size(self) -> int:
        """One more than the largest token number."""
        return max(self._texts) + 1

    @property
    def added(self) -> int:
        """Tokens that surround a single text."""
        return sum(len(each.ids) for each in self._single)

    @property
    def added_to_pair(self) -> int:
        return sum(len(each.ids) for each in self._pair)

    def pad(self) -> int:
        """What fills up short rows. The mask hides it, so any token would do."""
        return self._vocabulary.get("[PAD]", 0)

    def tokens(self, text: str, limit: int | None = None) -> list[int]:
        """The tokens of a text by itself. With `limit`, at most one more than that, so that too many can be told."""
        found: list[int] = []
        for part in self._added.split(text):
            if isinstance(part, int):
                found.append(part)
            else:
                self._add(part, found, limit)
            if limit is not None and len(found) > limit:
                return found[: limit + 1]
        return found

    def single(self, tokens: Sequence[int]) -> Encoded:
        """A text with its special tokens."""
        return _filled(self._single, (tokens,))

    def pair(self, first: Sequence[int], second: Sequence[int]) -> Encoded:
        """Two texts with their special tokens."""
        return _filled(self._pair, (first, second))

    def text(self, tokens: Sequence[int]) -> str | None:
        """The text of tokens, as far as it can be had back; None if one of them is no token."""
        words: list[str] = []
        for each in tokens:
            word = self._texts.get(each)
            if word is None:
                return None
            if word.startswith(self._prefix) and words:
                words.append(word[len(self._prefix) :])
            else:
                words.append(f" {word}" if words else word)
        return "".join(words)

    def _add(self, text: str, found: list[int], limit: int | None) -> None:
        words = self._words
        for word in self._text.words(text):
            known = words.get(word)
            if known is None:
                known = self._pieces(word)
                if len(word) <= self._longest:
                    if len(words) >= _CACHED_WORDS:
                        words.clear()
                    words[word] = known
            found += known
            if limit is not None and len(found) > limit:
                return

    def _pieces(self, word: str) -> tuple[int, ...]:
        """The longest piece that is in the vocabulary, then the longest of the rest, and so on."""
        if len(word) > self._longest:
            return (self._unknown,)
        found: list[int] = []
        begin = 0
        while begin < len(word):
            prefix = self._prefix if begin else ""
            for end in range(len(word), begin, -1):
                number = self._vocabulary.get(prefix + word[begin:end])
                if number is not None:
                    break
            else:
                return (self._unknown,)
            found.append(number)
            begin = end
        return tuple(found)


class _Added:
    """Tokens that are found in the text before anything else is done to it, such as [SEP]."""

    def __init__(self, rows: Any, text: BertText) -> None:
        if not isinstance(rows, list) or len(rows) > MAX_TOKENS:
            raise InvalidModel("the tokenizer's added tokens are no list")
        self.ids: dict[str, int] = {}
        self._text = text
        raw: list[Mapping[str, Any]] = []
        normalized: list[Mapping[str, Any]] = []
        for row in rows:
            values = _object(row, "an added token")
            content = _string(values.get("content"), "an added token")
            number = _number(values.get("id"), "an added token's id", 0, MAX_TOKENS)
            if not content or self.ids.setdefault(content, number) != number:
                raise InvalidModel(f"the tokenizer's added token {content[:40]!r} is empty or there twice")
            if values.get("single_word"):
                raise NotSupported(f"the added token {content[:40]!r} is for whole words only", hint=_HINT)
            (normalized if values.get("normalized") else raw).append(values)
        self._raw = _pattern(raw, lambda each: each)
        self._normalized = _pattern(normalized, text.normalize)
        self._numbers = {text.normalize(each["content"]): each["id"] for each in normalized} | {
            each["content"]: each["id"] for each in raw
        }

    def split(self, text: str) -> Iterator[int | str]:
        """Numbers of added tokens, and normalized text between them."""
        for part, token in _cut(self._raw, text):
            if token:
                yield self._numbers[token]
                continue
            for inner, found in _cut(self._normalized, self._text.normalize(part)):
                yield self._numbers[found] if found else inner


def _cut(pattern: re.Pattern[str] | None, text: str) -> Iterator[tuple[str, str]]:
    """(text, "") and ("", added token) in turn."""
    at = 0
    if pattern is not None:
        for match in pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()], ""
            yield "", str(match[match.lastindex or 0])
            at = match.end()
    if at < len(text):
        yield text[at:], ""


def _pattern(rows: Sequence[Mapping[str, Any]], content: Any) -> re.Pattern[str] | None:
    if not rows:
        return None
    # The longest first, as the library takes the leftmost and longest.
    ordered = sorted(rows, key=lambda each: -len(each["content"]))
    parts = [
        (r"\s*" if each.get("lstrip") else "")
        + f"({re.escape(content(each['content']))})"
        + (r"\s*" if each.get("rstrip") else "")
        for each in ordered
    ]
    return re.compile("|".join(parts))


def _parsed(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise InvalidModel(f"the tokenizer has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidModel("the tokenizer is damaged: it is no JSON", hint="download it again") from None


def _vocabulary(values: Any) -> dict[str, int]:
    if not isinstance(values, dict) or not 1 <= len(values) <= MAX_TOKENS:
        raise InvalidModel("the tokenizer has no usable vocabulary")
    for text, number in values.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MAX_TOKENS:
            raise InvalidModel(f"the tokenizer's token {text[:40]!r} has no usable number")
    if len(set(values.values())) != len(values):
        raise InvalidModel("the tokenizer has the same number for two tokens")
    return values


def _normalizer(values: Any) -> BertText:
    settings = _only(values, ("BertNormalizer",), "normalizer")
    flags = {key: settings.get(key, True) for key in ("clean_text", "handle_chinese_chars", "lowercase")}
    accents = settings.get("strip_accents")
    accents = flags["lowercase"] if accents is None else accents
    if any(not isinstance(each, bool) for each in (*flags.values(), accents)):
        raise InvalidModel("the tokenizer's normalizer has a setting that is neither true nor false")
    return BertText(flags["clean_text"], flags["handle_chinese_chars"], accents, flags["lowercase"])


def _only(values: Any, kinds: tuple[str | None, ...], what: str) -> Mapping[str, Any]:
    if values is None and None in kinds:
        return {}
    found = _object(values, f"the tokenizer's {what}") if values is not None else {}
    if found.get("type") not in kinds:
        raise NotSupported(f"the tokenizer's {what} {str(found.get('type'))[:40]} is not supported", hint=_HINT)
    return found


def _templates(values: Any, known: Mapping[str, int]) -> tuple[tuple[_Piece, ...], tuple[_Piece, ...]]:
    """What surrounds a text, and a pair of texts."""
    if values is None:
        return (_Piece(0, text=0),), (_Piece(0, text=0), _Piece(1, text=1))
    kind = _object(values, "the post-processor").get("type")
    if kind == "BertProcessing":
        end, begin = (_special(values.get(each), known) for each in ("sep", "cls"))
        single = (_Piece(0, begin), _Piece(0, text=0), _Piece(0, end))
        return single, (*single, _Piece(1, text=1), _Piece(1, end))
    if kind != "TemplateProcessing":
        raise NotSupported(f"the tokenizer's post-processor {str(kind)[:40]} is not supported", hint=_HINT)
    special = _object(values.get("special_tokens"), "the post-processor's special tokens")
    return _template(values.get("single"), special, known, 1), _template(values.get("pair"), special, known, 2)


def _special(value: Any, known: Mapping[str, int]) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != 2 or value[1] not in known.values():
        raise InvalidModel("the tokenizer's post-processor names no special token")
    return (value[1],)


def _template(rows: Any, special: Mapping[str, Any], known: Mapping[str, int], texts: int) -> tuple[_Piece, ...]:
    if not isinstance(rows, list) or len(rows) > 16:
        raise InvalidModel("the tokenizer's template is no short list")
    pieces: list[_Piece] = []
    numbers = frozenset(known.values())
    for row in rows:
        values = _object(row, "a part of the template")
        kind = next(iter(values), "")
        inner = _object(values.get(kind), "a part of the template")
        token_type = _number(inner.get("type_id"), "type_id", 0, 1)
        if kind == "Sequence" and inner.get("id") in ("A", "B"):
            pieces.append(_Piece(token_type, text="AB".index(inner["id"])))
            continue
        ids = _object(special.get(str(inner.get("id"))), "a special token of the template").get("ids")
        if not isinstance(ids, list) or not 1 <= len(ids) <= 4 or any(each not in numbers for each in ids):
            raise InvalidModel("the tokenizer's template has a special token that is not in the vocabulary")
        pieces.append(_Piece(token_type, tuple(ids)))
    if sorted(each.text for each in pieces if each.text >= 0) != list(range(texts)):
        raise InvalidModel("the tokenizer's template does not hold each text once")
    return tuple(pieces)


def _filled(pieces: Sequence[_Piece], texts: Sequence[Sequence[int]]) -> Encoded:
    ids: list[int] = []
    types: list[int] = []
    for piece in pieces:
        part = texts[piece.text] if piece.text >= 0 else piece.ids
        ids += part
        types += [piece.type] * len(part)
    return Encoded(ids, types)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidModel(f"{what} is not a JSON object")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidModel(f"the tokenizer's {what} is no text")
    return value


def _number(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidModel(f"the tokenizer's {what} is no number from {low} to {high}")
    return value
