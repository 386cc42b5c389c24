"""An ONNX model on the devices that each request wishes for: the same answers, bounded work, failures with a name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ai_assistant.engines.allowance import Allowance
from ai_assistant.engines.contract import LoadOptions
from ai_assistant.engines.hetero import Wish, honour, reader
from ai_assistant.engines.onnx import OnnxEngine
from ai_assistant.engines.onnx_hetero import (
    LEAST_TOKENS,
    MAX_PLANS,
    MAX_SETS,
    ROWS,
    SESSION,
    Divided,
    bucket,
)
from ai_assistant.errors import (
    AIAssistantError,
    BackendFailed,
    Busy,
    DeviceLost,
    InvalidArgument,
    InvalidModel,
    NotSupported,
    OutOfMemory,
)
from tests.support import onnx_writer as writer

TEXTS = ["the cat sat on the mat .", "a dog", "blue sky , red sun", "cats walked", "the the the", "!"]


class TestWishes:
    @pytest.mark.parametrize("text", ["", "  ", "on,off", "cpu,cpu", "/dev/null", "a" * 2000, "cpu;rm", "ON\0", "🙂"])
    def test_nonsense_is_named(self, text: str) -> None:
        with pytest.raises(InvalidArgument) as caught:
            Wish.of(text)
        assert caught.value.param == "hetero_compute"
        assert caught.value.hint

    @pytest.mark.parametrize("value", [True, 1, 1.5, float("nan"), ["cpu"], {"cpu": 1}, b"ON"])
    def test_other_types_are_named(self, value: object) -> None:
        with pytest.raises(InvalidArgument, match="string") as caught:
            Wish.of(value)
        assert caught.value.param == "hetero_compute"

    def test_off_is_no_more_than_no_wish(self) -> None:
        assert Wish.of(None) is None
        assert [Wish(each).off for each in ("off", "OFF", "ON", "cpu")] == [True, True, False, False]

    def test_a_model_that_stays_where_it_is(self) -> None:
        here: Any = SimpleNamespace()
        for text in ("ON", "OFF", "efficiency", "cpu", "ggml:CPU,cpu", "npu,cpu"):
            wish = Wish(text)
            assert reader(here, wish) is here
            assert wish.devices == ("cpu",)
        assert reader(here, None) is here
        with pytest.raises(NotSupported, match="loaded to cpu") as caught:
            honour(here, Wish("onnxruntime"))
        assert caught.value.param == "hetero_compute"
        split: Any = SimpleNamespace(placement=SimpleNamespace(parts=(("ggml:Vulkan0", 3), ("cpu", 1))))
        wish = Wish("cpu,ggml")
        honour(split, wish)
        assert wish.devices == ("ggml:Vulkan0", "cpu")
        for text in ("cpu", "ggml:Vulkan1,cpu", "ggml:Vulkan0"):
            with pytest.raises(NotSupported, match=r"ggml:Vulkan0, cpu"):
                honour(split, Wish(text))


class TestBounds:
    def test_batches_have_few_shapes(self) -> None:
        found = {bucket(rows, tokens, 512) for rows in range(1, 65) for tokens in range(1, 513)}
        assert found == {(rows, tokens) for rows in (1, ROWS) for tokens in (32, 64, 128, 256, 512)}
        for tokens in range(1, 49):
            rows, wide = bucket(3, tokens, 48)
            assert (rows, tokens <= wide <= 48) == (ROWS, True)
        assert bucket(1, 3, 8) == (1, 8)
        assert bucket(1, 1, 8192) == (1, LEAST_TOKENS)

    def test_time_for_plans_runs_out_and_comes_back(self) -> None:
        now = 0.0
        allowance = Allowance(10, 0.1, lambda: now)
        allowance.check()
        allowance.spend(6)
        allowance.check()
        allowance.spend(6)
        with pytest.raises(Busy, match="too many") as caught:
            allowance.check()
        assert caught.value.param == "hetero_compute"
        now = 19.0
        with pytest.raises(Busy):
            allowance.check()
        now = 21.0
        allowance.check()
        now = 1e6
        allowance.check()
        allowance.spend(10)
        with pytest.raises(Busy):
            allowance.check()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    writer.write_folder(root / "embed")
    writer.write_folder(root / "places", position_ids=True, pooling_json={"pooling_mode_cls_token": True})
    writer.write_folder(root / "rerank", labels=1, seed=1)
    writer.write_folder(root / "classify", labels=3, seed=2)
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(folder: Path, **options: Any) -> OnnxEngine:
    return OnnxEngine.open(folder, LoadOptions(**{"threads": 1, "batch_tokens": 64} | options))


@pytest.fixture
def embedder(folders: Path, cache: None) -> Iterator[OnnxEngine]:
    with opened(folders / "embed") as engine:
        yield engine


def with_backends(engine: OnnxEngine, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Let the engine look for devices among others."""
    found = dict(engine._divided._found())
    engine._divided._backends = change(found)


def wished(engine: OnnxEngine, text: str, texts: list[str] | None = None) -> tuple[list[list[float]], tuple[str, ...]]:
    wish = Wish(text)
    vectors, _ = engine.wished(wish).embed(TEXTS if texts is None else texts)
    return vectors, wish.devices


@pytest.mark.engine
class TestAnswers:
    @pytest.mark.parametrize("name", ["embed", "places"])
    def test_they_are_the_same_wherever_they_are_computed(self, folders: Path, cache: None, name: str) -> None:
        with opened(folders / name) as engine:
            texts = [*TEXTS, "cat " * 50, *("dog " * count for count in range(1, 12))]
            expected = engine.embed(texts)[0]
            for text, devices in (
                ("OFF", {(SESSION,)}),
                ("onnxruntime", {(SESSION,)}),
                ("cpu", {("cpu",)}),
                ("ON", None),
                ("performance", None),
                ("cpu,onnxruntime", None),
                ("onnxruntime:XnnpackExecutionProvider", None),
            ):
                vectors, used = wished(engine, text, texts)
                assert np.allclose(vectors, expected, rtol=1e-4, atol=1e-5), text
                assert used, text
                assert devices is None or used in devices, (text, used)
            assert wished(engine, "OFF", texts)[0] == expected
            # And what was computed meanwhile without a wish is what it always was.
            assert engine.embed(texts)[0] == expected

    def test_ranks_and_classes(self, folders: Path, cache: None) -> None:
        with opened(folders / "rerank") as ranker:
            wish = Wish("cpu")
            scores, tokens = ranker.wished(wish).rerank("red cat", TEXTS)
            assert wish.devices == ("cpu",)
            expected = ranker.rerank("red cat", TEXTS)
            assert scores == pytest.approx(expected[0], abs=1e-4)
            assert tokens == expected[1]
        with opened(folders / "classify") as judge:
            found = judge.wished(Wish("cpu")).classify(TEXTS)[0]
            for mine, theirs in zip(found, judge.classify(TEXTS)[0], strict=True):
                assert dict(mine) == pytest.approx(dict(theirs), abs=1e-4)

    def test_what_a_device_cannot_goes_to_the_processor(self, embedder: OnnxEngine) -> None:
        expected = embedder.embed(TEXTS)[0]
        with_backends(embedder, lambda found: found | {"partial": Partial()})
        vectors, used = wished(embedder, "partial")
        assert set(used) == {"partial", "cpu"}
        assert np.allclose(vectors, expected, rtol=1e-4, atol=1e-5)

    def test_several_at_once(self, embedder: OnnxEngine) -> None:
        expected = embedder.embed(TEXTS)[0]
        wishes = ["OFF", "ON", "cpu", "cpu,onnxruntime", "performance", "null", "nonsense", "cpu:7"] * 3
        with ThreadPoolExecutor(8) as pool:

            def one(text: str) -> object:
                try:
                    return wished(embedder, text)[0]
                except AIAssistantError as error:
                    return error

            for text, answer in zip(wishes, pool.map(one, wishes), strict=True):
                if text in ("null", "nonsense", "cpu:7"):
                    assert isinstance(answer, InvalidArgument | NotSupported), (text, answer)
                    assert answer.param == "hetero_compute"
                else:
                    assert np.allclose(np.array(answer), expected, rtol=1e-4, atol=1e-5), text
        assert embedder.stats().running == embedder.stats().waiting == 0


@pytest.mark.engine
class TestFailures:
    @pytest.mark.parametrize(
        ("text", "kind", "words"),
        [
            ("null", InvalidArgument, "computes nothing"),
            ("null:0,cpu", InvalidArgument, "computes nothing"),
            ("tpu", InvalidArgument, "no backend"),
            ("onnxruntime:CUDAExecutionProvider", NotSupported, "no device"),
            ("onnxruntime:CPUExecutionProvider@999", NotSupported, "core 999"),
            ("openvino", NotSupported, "openvino"),
        ],
    )
    def test_devices_that_are_not_here(
        self, embedder: OnnxEngine, text: str, kind: type[AIAssistantError], words: str
    ) -> None:
        for _ in range(2):
            with pytest.raises(kind, match=words) as caught:
                wished(embedder, text)
            assert caught.value.param == "hetero_compute"
        assert embedder._divided.count == (0, 0)
        assert wished(embedder, "cpu")[1] == ("cpu",)

    def test_a_device_that_goes_away(self, embedder: OnnxEngine) -> None:
        expected = embedder.embed(TEXTS)[0]
        partial = Partial()
        with_backends(embedder, lambda found: found | {"partial": partial})
        assert "partial" in wished(embedder, "partial")[1]
        partial.fail = DeviceLost("unplugged")
        # What is left takes over, within the same request.
        vectors, used = wished(embedder, "partial")
        assert used == ("cpu",)
        assert np.allclose(vectors, expected, rtol=1e-4, atol=1e-5)

    def test_a_device_that_fails_is_named_and_opened_anew(self, embedder: OnnxEngine) -> None:
        partial = Partial()
        with_backends(embedder, lambda found: found | {"partial": partial})
        wished(embedder, "partial")
        partial.fail = BackendFailed("the driver says no")
        with pytest.raises(BackendFailed, match="says no"):
            wished(embedder, "partial")
        assert embedder._divided.count == (0, 0)
        partial.fail = None
        assert "partial" in wished(embedder, "partial")[1]
        assert partial.opened == 2

    def test_making_a_plan_fails_and_the_next_request_works(self, embedder: OnnxEngine) -> None:
        partial = Partial()
        with_backends(embedder, lambda found: found | {"partial": partial})
        for error, kind in (
            (RuntimeError("a defect"), BackendFailed),
            (MemoryError(), OutOfMemory),
            (OutOfMemory("full"), OutOfMemory),
            (BackendFailed("no compiler"), BackendFailed),
        ):
            partial.no_program = error
            with pytest.raises(kind):
                wished(embedder, "partial")
            partial.no_program = None
            assert "partial" in wished(embedder, "partial")[1]
            embedder.trim()
            assert embedder._divided.count == (0, 0)

    def test_a_file_that_was_changed(self, tmp_path: Path, cache: None) -> None:
        writer.write_folder(tmp_path)
        with opened(tmp_path) as engine:
            expected = engine.embed(TEXTS)[0]
            (tmp_path / "model.onnx").write_bytes(b"something else")
            with pytest.raises(InvalidModel, match="changed"):
                wished(engine, "cpu")
            assert engine.embed(TEXTS)[0] == expected

    def test_memory_is_the_models_own(self, folders: Path, cache: None) -> None:
        from ai_assistant.engines.trimming import resident_bytes

        with opened(folders / "embed", memory_limit_bytes=resident_bytes() + (1 << 30)) as engine:
            assert wished(engine, "cpu")[1] == ("cpu",)
            engine._divided._needed = 2 << 30
            assert wished(engine, "cpu")[1] == ("cpu",)  # it is there already
            with pytest.raises(OutOfMemory, match="it was given") as caught:
                wished(engine, "cpu", ["cat " * 40])
            assert caught.value.param == "hetero_compute"
            assert len(engine.embed(TEXTS)[0]) == len(TEXTS)

    def test_a_plan_that_is_larger_than_thought(
        self, folders: Path, cache: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ai_assistant.engines import onnx_hetero

        limit = 4 << 30
        with opened(folders / "embed", memory_limit_bytes=limit) as engine:
            wished(engine, "cpu")
            # Room before it is made, too little afterwards, enough once the others are gone.
            readings = iter([0, limit + 1, limit])
            monkeypatch.setattr(onnx_hetero, "resident_bytes", lambda: next(readings))
            assert wished(engine, "cpu", ["cat " * 40])[1] == ("cpu",)
            assert next(readings, None) is None
            assert engine._divided.count == (1, 1)
            readings = iter([0, limit + 1, limit + 1, limit + 5])
            with pytest.raises(OutOfMemory, match=f"takes {limit + 5} bytes in all; it was given {limit}"):
                wished(engine, "cpu")
            assert next(readings, None) is None
            assert engine._divided.count == (0, 0)
            monkeypatch.setattr(onnx_hetero, "resident_bytes", lambda: 0)
            assert wished(engine, "cpu")[1] == ("cpu",)

    def test_a_closed_engine(self, folders: Path, cache: None) -> None:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        engine = opened(folders / "embed")
        wished(engine, "cpu")
        engine.close()
        engine.close()
        with pytest.raises(InvalidArgument, match="closed"):
            wished(engine, "cpu")
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.engine
class TestHostile:
    def test_cycling_through_devices_keeps_little(self, embedder: OnnxEngine) -> None:
        names = [f"d{number}" for number in range(12)]
        with_backends(embedder, lambda found: found | {name: Partial(name) for name in names})
        threads = threading.active_count()
        for _ in range(2):
            for name in names:
                for texts in (["cat"], ["cat", "dog"], ["cat " * 40]):
                    assert name in wished(embedder, name, texts)[1]
                    plans, sets = embedder._divided.count
                    assert plans <= MAX_PLANS
                    assert sets <= MAX_SETS
        assert threading.active_count() <= threads + 4 * MAX_PLANS
        embedder.trim()
        assert embedder._divided.count == (0, 0)
        assert threading.active_count() <= threads

    def test_cycling_is_refused_when_the_time_is_spent(self, embedder: OnnxEngine) -> None:
        now = 0.0
        embedder._divided._allowance = Allowance(1, 0.1, lambda: now)
        expected = wished(embedder, "cpu")[0]
        embedder._divided._allowance.spend(2)
        with pytest.raises(Busy) as caught:
            wished(embedder, "ON")
        assert caught.value.param == "hetero_compute"
        # Everybody else goes on.
        assert wished(embedder, "cpu")[0] == expected
        assert wished(embedder, "OFF")[1] == (SESSION,)
        assert len(embedder.embed(TEXTS)[0]) == len(TEXTS)
        now = 20.0
        assert wished(embedder, "ON")[1]

    def test_planning_is_charged_also_when_it_fails(self, embedder: OnnxEngine) -> None:
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += 1.0
            return now

        embedder._divided._allowance = Allowance(5, 0.001, clock)
        found = []
        for _ in range(20):
            with pytest.raises((InvalidArgument, Busy)) as caught:
                wished(embedder, "tpu")
            found.append(caught.type)
        refused = found.index(Busy)
        assert 1 <= refused <= 6
        assert set(found[refused:]) == {Busy}


def test_a_lease_without_a_plan_needs_no_library(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    plan: Any = SimpleNamespace(inputs=(), length=64)
    from ai_assistant.engines.onnx_package import Member

    with file.open("rb") as stream:
        divided = Divided(Member(stream.fileno(), 0, 8), plan, LoadOptions(), pad=0, needed_bytes=0)
    for text in ("OFF", "onnxruntime", "onnxruntime:CPUExecutionProvider"):
        wish = Wish(text)
        with divided.lease(wish, 1, 1) as run:
            assert run is None
        assert wish.devices == (SESSION,)
    divided.close()
    divided.close()


class Partial:
    """The processor's backend without some operators, which fails when it is told to."""

    def __init__(self, name: str = "partial", without: tuple[str, ...] = ("Softmax", "Erf")) -> None:
        self.name = name
        self.version = "1"
        self.without = without
        self.fail: AIAssistantError | None = None
        self.no_program: Exception | None = None
        self.opened = 0

    def probe(self) -> Any:
        from ai_assistant.hal.contract import BackendDevice, Probe

        return Probe((BackendDevice("0", self.name, "npu"),))

    def open(self, device: str = "") -> Any:
        from ai_assistant.hal import backends
        from ai_assistant.hal.operators import Support

        self.opened += 1
        context: Any = backends.load("cpu").open()
        supports, compile_ = context.supports, context.compile

        def without(node: Any, graph: Any) -> Any:
            return Support(False, "left out") if node.op in self.without else supports(node, graph)

        def compiled(graph: Any) -> Any:
            if self.no_program is not None:
                raise self.no_program
            program = compile_(graph)
            run = program.run

            def failing(*arguments: Any) -> Any:
                if self.fail is not None:
                    raise self.fail
                return run(*arguments)

            program.run = failing
            return program

        context.supports, context.compile = without, compiled
        return context
