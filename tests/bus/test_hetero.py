"""`hetero_compute` through the real daemon and its workers: answers that are the same, and callers that are hostile."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from dbus_fast import Variant

from tests.bus.client import Client, Refused, connected
from tests.bus.test_onnx import use
from tests.bus.world import World
from tests.support import onnx_writer as writer

pytestmark = pytest.mark.engine
TEXTS = ["the cat sat on the mat .", "a dog", "blue sky , red sun", "cats walked " * 12, "the the the", "!"]
ERRORS = "org.ai_assistant1.Error."


@pytest_asyncio.fixture
async def client(serving: World) -> AsyncIterator[Client]:
    async with connected(serving.address) as made:
        yield made


async def embedded(http: httpx.AsyncClient, wish: object = None, model: str = "tiny") -> httpx.Response:
    body: dict[str, Any] = {"model": model, "input": TEXTS}
    if wish is not None:
        body["hetero_compute"] = wish
    return await http.post("embeddings", json=body)


def vectors(answer: httpx.Response) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]])


@pytest_asyncio.fixture
async def tiny(serving: World, client: Client, tmp_path: Path) -> AsyncIterator[str]:
    writer.write_folder(tmp_path)
    await use(client, tmp_path, "tiny")
    yield "tiny"
    await client.call("Model", "Remove", path=await client.call("Manager", "FindModel", "s", "tiny"))


async def test_the_same_request_in_every_way(client: Client, http: httpx.AsyncClient, tiny: str) -> None:
    plain = await embedded(http)
    assert "devices" not in plain.json()["usage"]
    expected = vectors(plain)
    for wish, devices in (
        ("OFF", ["onnxruntime"]),
        ("onnxruntime", ["onnxruntime"]),
        ("cpu", ["cpu"]),
        ("cpu,onnxruntime", None),
        ("ON", None),
        ("performance", None),
        ("efficiency", None),
    ):
        answer = await embedded(http, wish)
        assert np.allclose(vectors(answer), expected, rtol=1e-4, atol=1e-5), wish
        used = answer.json()["usage"]["devices"]
        assert used, wish
        assert devices is None or used == devices
        assert answer.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]
    # Without a wish it is what it was, to the last bit.
    assert (vectors(await embedded(http)) == expected).all()
    assert (vectors(await embedded(http, "OFF")) == expected).all()
    found, usage = await client.call("Inference", "EmbedWith", "sasa{sv}", tiny, TEXTS, {})
    assert np.allclose(found, expected, atol=1e-6)
    assert set(usage) == {"tokens"}
    options = {"hetero_compute": Variant("s", "cpu")}
    found, usage = await client.call("Inference", "EmbedWith", "sasa{sv}", tiny, TEXTS, options)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert usage["devices"].value == ["cpu"]


@pytest.mark.parametrize(
    ("wish", "status", "code"),
    [
        ("on,off", 400, "InvalidArgument"),
        ("", 400, "InvalidArgument"),
        ("🙂", 400, "InvalidArgument"),
        (["cpu"], 400, "InvalidArgument"),
        (1, 400, "InvalidArgument"),
        ("x" * 5000, 400, "InvalidArgument"),
        ("tpu", 400, "InvalidArgument"),
        ("null", 400, "InvalidArgument"),
        ("onnxruntime:CPUExecutionProvider*9999", 400, "InvalidArgument"),
        ("onnxruntime:CPUExecutionProvider@4000", 501, "NotSupported"),
        ("cpu:../../etc/passwd", 400, "InvalidArgument"),
        ("openvino", 501, "NotSupported"),
    ],
)
async def test_nonsense_is_named(
    serving: World, http: httpx.AsyncClient, tiny: str, wish: object, status: int, code: str
) -> None:
    expected = vectors(await embedded(http))
    workers = set(serving.worker_pids())
    answer = await embedded(http, wish)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, "hetero_compute")
    assert "Traceback" not in error["message"]
    assert (vectors(await embedded(http)) == expected).all()
    assert workers <= set(serving.worker_pids())


async def test_the_bus_names_it_as_well(client: Client, tiny: str) -> None:
    for value, name in (
        (Variant("s", "on,off"), "InvalidArgument"),
        (Variant("b", True), "InvalidArgument"),
        (Variant("as", ["cpu"]), "InvalidArgument"),
        (Variant("s", "null"), "InvalidArgument"),
        (Variant("s", "openvino"), "NotSupported"),
    ):
        with pytest.raises(Refused) as caught:
            await client.call("Inference", "EmbedWith", "sasa{sv}", tiny, ["cat"], {"hetero_compute": value})
        assert caught.value.name == ERRORS + name
    with pytest.raises(Refused, match="unknown option"):
        await client.call("Inference", "EmbedWith", "sasa{sv}", tiny, ["cat"], {"speed": Variant("s", "high")})


async def test_a_language_model_says_where_it_is(client: Client, http: httpx.AsyncClient) -> None:
    body = {"model": "assistant", "prompt": "abc", "max_tokens": 3, "seed": 1}
    plain = (await http.post("completions", json=body)).json()
    assert "devices" not in plain["usage"]
    for wish in ("ON", "OFF", "cpu", "efficiency"):
        answer = (await http.post("completions", json=body | {"hetero_compute": wish})).json()
        assert answer["usage"]["devices"] == ["cpu"]
        assert answer["choices"][0]["text"] == plain["choices"][0]["text"]
    refused = await http.post("completions", json=body | {"hetero_compute": "onnxruntime"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (501, "NotSupported", "hetero_compute")
    options = {"max_tokens": Variant("i", 3), "hetero_compute": Variant("s", "ON")}
    _, usage = await client.call("Inference", "Generate", "ssa{sv}", "assistant", "abc", options)
    assert usage["devices"].value == ["cpu"]
    refused = await embedded(http, "npu", "assistant")
    assert refused.json()["error"]["code"] == "NotSupported"


async def test_many_at_once(serving: World, http: httpx.AsyncClient, tiny: str) -> None:
    expected = vectors(await embedded(http))
    wishes = ["OFF", "ON", "cpu", None, "cpu,onnxruntime", "tpu", "null", "performance"] * 4
    answers = await asyncio.gather(*(embedded(http, wish) for wish in wishes))
    for wish, answer in zip(wishes, answers, strict=True):
        if wish in ("tpu", "null"):
            assert answer.json()["error"]["code"] == "InvalidArgument"
        else:
            assert np.allclose(vectors(answer), expected, rtol=1e-4, atol=1e-5), wish
    assert serving.alive


async def test_cycling_through_devices_is_bounded(serving: World, http: httpx.AsyncClient, tiny: str) -> None:
    """Every order of every few devices: the worker keeps what it may, and others are served."""
    expected = vectors(await embedded(http))
    workers = set(serving.worker_pids())
    names = ["cpu", "onnxruntime:XnnpackExecutionProvider", "onnxruntime:DnnlExecutionProvider", "ggml"]
    wishes = [",".join(each) for count in (1, 2, 3) for each in itertools.permutations(names, count)]
    before = max(threads(pid) for pid in workers)
    for wish in wishes:
        answer = await embedded(http, wish)
        if answer.status_code == 200:
            assert np.allclose(vectors(answer), expected, rtol=1e-4, atol=1e-5), wish
            continue
        error = answer.json()["error"]
        # This provider cannot run what it says it can, sometimes only when it runs.
        unable = "Dnnl" in wish and error["code"] in ("NotSupported", "BackendFailed")
        assert unable or error["code"] == "Busy", (wish, error)
    assert (vectors(await embedded(http)) == expected).all()
    assert workers <= set(serving.worker_pids())
    # Plans are kept, so a few threads more; not some for each list of devices.
    assert max(threads(pid) for pid in workers) < before + 64
    assert serving.alive


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
